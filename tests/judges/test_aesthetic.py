"""The aesthetic judge on tiny weights against its five layers one after another, in float64."""

from itertools import pairwise

import numpy as np
import open_clip_oracle as oracle
import pytest
import torch
from transformers import CLIPImageProcessorPil

from inpo_fast.judges import judge_id
from inpo_fast.judges.open_clip import clip_model
from inpo_fast.judges.registry import make_judge
from inpo_fast.runtime.errors import UserError

WIDTHS = (oracle.JOINT, 32, 16, 8, 4, 1)  # published: 768, 1024, 128, 64, 16, 1


def head(seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for layer, (n, m) in zip((0, 2, 4, 6, 7), pairwise(WIDTHS), strict=True):
        out |= {f"layers.{layer}.weight": torch.randn(m, n, generator=g), f"layers.{layer}.bias": torch.randn(m)}
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    clip_model(oracle.random_state()).save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(place)
    torch.save(head(), place / "head.pth")
    return place


def test_score_is_the_layers_one_by_one(folder):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, 40, 3), dtype=np.uint8) for h in (40, 33, 80, 28, 41)]
    judge = make_judge(f"aesthetic:{folder / 'head.pth'}@{folder}", batch=2)
    x = oracle.encode_image(oracle.random_state(), judge.pixels(images))
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    state = torch.load(folder / "head.pth", weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    scores = judge.score(images, ["any"] * 5).total
    np.testing.assert_allclose(scores, x[:, 0].numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(scores, judge.score(images, ["other"] * 5).total)
    assert np.ptp(scores) > 0.1


def test_other_heads_are_refused_and_have_another_id(folder, tmp_path):
    own = judge_id(make_judge(f"aesthetic:{folder / 'head.pth'}@{folder}"))
    torch.save(head(2), tmp_path / "other.pth")
    assert judge_id(make_judge(f"aesthetic:{tmp_path / 'other.pth'}@{folder}")) != own
    for name, value in (("layers.7.weight", None), ("layers.2.weight", torch.zeros(16, 33)), ("x", torch.zeros(1))):
        state = {k: v for k, v in (head() | {name: value}).items() if v is not None}
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=r"bad\.pth is not the predictor"):
            make_judge(f"aesthetic:{tmp_path / 'bad.pth'}@{folder}")
    wide = {k: v for k, v in head().items() if k != "layers.0.weight"} | {"layers.0.weight": torch.zeros(32, 30)}
    torch.save(wide, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"embeddings of 30.*gives 24"):
        make_judge(f"aesthetic:{tmp_path / 'wide.pth'}@{folder}")
