"""CLIP-H, PickScore and HPS on tiny weights of the true layout against float64 OpenCLIP; pixels and tokens against the
published definitions."""

import json
import re
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip_oracle as oracle
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from inpo_fast.judges import judge_id
from inpo_fast.judges.clip import ClipJudge, HpsJudge
from inpo_fast.judges.open_clip import clip_model
from inpo_fast.judges.preprocess import MEAN, STD, letterbox
from inpo_fast.judges.registry import make_judge, make_judges
from inpo_fast.models.files.original_keys import open_clip_tensors
from inpo_fast.runtime.errors import UserError

TOKENIZER = str(Path(__file__).resolve().parents[2] / "inpo_fast/pocket/assets/clip")
PROMPTS = ["a small red circle", "A  LARGE &amp; green\tstar on grey, 12 it's", "a red " * 30, "", "a small red circle"]


def pictures(sizes=((28, 28), (40, 70), (90, 33), (64, 64), (20, 24))):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """CLIP-H's layout as the hub has it: model, tokenizer, image processor. And HPS's .pt."""
    place = tmp_path_factory.mktemp("clip")
    clip_model(oracle.random_state()).save_pretrained(place)
    CLIPTokenizer.from_pretrained(TOKENIZER).save_pretrained(place)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(place)
    torch.save({"state_dict": oracle.random_state(), "epoch": 3, "name": "tiny"}, place / "hps.pt")
    return place


def test_a_judge_takes_what_fits(folder, monkeypatch, caplog):
    """As many pictures and prompts at once as its GPU holds: the same scores, and the next time tried at once."""
    roomy, judge = (ClipJudge(str(folder), batch=4) for _ in range(2))
    want, asked = roomy.score(pictures(), PROMPTS).total, []

    def crowded(plain, name):
        def forward(**inputs):
            count = len(inputs[name])
            asked.append(count)
            if count > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(**inputs)

        return forward

    for method, name in (("get_image_features", "pixel_values"), ("get_text_features", "input_ids")):
        monkeypatch.setattr(judge.model, method, crowded(getattr(judge.model, method), name))
    np.testing.assert_allclose(judge.score(pictures(), PROMPTS).total, want, rtol=1e-4, atol=1e-4)
    assert max(asked) == 4 and caplog.text.count("pictures and prompts to judge now come in batches of 2") == 1
    asked.clear()
    judge.score(pictures(), PROMPTS)
    assert max(asked) == 2


def shown_clip(image: np.ndarray, side: int = 28) -> torch.Tensor:
    """CLIP's published transform: short side to `side` (bicubic, 8 bits), centre cut out, normalised."""
    picture = Image.fromarray(image)
    w, h = picture.size
    short = min(w, h)
    size = (side, int(side * h / w)) if w == short else (int(side * w / h), side)
    picture = picture.resize(size, Image.BICUBIC)
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    cut = np.asarray(picture.crop((left, top, left + side, top + side))).astype(np.float64) / 255
    return torch.from_numpy(((cut - MEAN) / STD).transpose(2, 0, 1))


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, torch's without antialiasing."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_axis(n: int, m: int) -> np.ndarray:
    """(m, n): bicubic without antialiasing, half-pixel centres, the edge repeated."""
    out = np.zeros((m, n))
    for i in range(m):
        centre = (i + 0.5) * n / m - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            out[i, min(max(tap, 0), n - 1)] += cubic(centre - tap)
    return out


def shown_hps(image: np.ndarray, side: int = 28) -> torch.Tensor:
    """HPS's: float pixels, long side to `side` without antialiasing, black around, normalised."""
    h, w = image.shape[:2]
    pixels = image.astype(np.float64) / 255
    high, wide = round(h * side / max(h, w)), round(w * side / max(h, w))
    if max(h, w) != side:
        pixels = np.einsum("ih,hwc,jw->ijc", resize_axis(h, high), pixels, resize_axis(w, wide))
    top, left = (side - high) // 2, (side - wide) // 2
    out = np.zeros((side, side, 3))
    out[top : top + high, left : left + wide] = pixels
    return torch.from_numpy(((out - MEAN) / STD).transpose(2, 0, 1))


def bpe_ids(text: str) -> list[int]:
    """CLIP's byte-pair encoding, anew: lower case, words by its pattern, merges by rank; 16 tokens, the end kept."""
    table = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text())["model"]
    rank = {tuple(m): i for i, m in enumerate(table["merges"])}
    text = re.sub(r"\s+", " ", text).strip().lower()
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+"
    ids = []
    for word in re.findall(pattern, text):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: rank.get(pair, 10**9))
            if best not in rank:
                break
            i = pairs.index(best)
            parts[i : i + 2] = ["".join(best)]
        ids += [table["vocab"][part] for part in parts]
    start, end = 582, 583
    return [start, *ids[:14], end] + [end] * (14 - len(ids[:14]))


def test_pixels_are_the_published_ones(folder):
    judge = ClipJudge(str(folder))
    for image in pictures():
        torch.testing.assert_close(judge.pixels([image])[0].double(), shown_clip(image), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            letterbox([image], 28, False)[0].double(), shown_hps(image), rtol=0, atol=5e-5
        )  # fp32, divided by 0.27


def test_antialiasing_matters_and_a_fitting_picture_is_left_alone():
    fine = pictures()[3]
    assert (letterbox([fine], 28, False) - letterbox([fine], 28, True)).abs().max() > 0.5
    fitting = pictures()[0]
    expected = (torch.from_numpy(fitting).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(
        STD
    )[:, None, None]
    torch.testing.assert_close(letterbox([fitting], 28, False)[0], expected)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_the_published_ones(folder, prompt):
    cleaned = HpsJudge.clean(prompt)
    ours = CLIPTokenizer.from_pretrained(folder)(cleaned, padding="max_length", max_length=16, truncation=True)
    assert ours.input_ids == bpe_ids(prompt.replace("&amp;", "&"))


def expected(kind: str) -> np.ndarray:
    shown = shown_hps if kind.startswith("hps") else shown_clip
    text = [p.replace("&amp;", "&") for p in PROMPTS] if kind.startswith("hps") else PROMPTS
    ids = torch.tensor([bpe_ids(prompt) for prompt in text])
    return oracle.score(oracle.random_state(), torch.stack([shown(i) for i in pictures()]), ids).numpy()


@pytest.mark.parametrize("kind", ["clip", "clip-h", "pickscore", "hps-v2.0", "hps-v2.1"])
@pytest.mark.parametrize("batch", [2, 64])
def test_score_is_100_cos_in_float64(folder, kind, batch):
    weights = folder / "hps.pt" if kind.startswith("hps") else folder
    judge = make_judge(f"{kind}:{weights}@{folder}", batch=batch)
    scores = judge.score(pictures(), PROMPTS)
    # fp32 through two layers of width 64; the values spread over tens of points
    np.testing.assert_allclose(scores.total, expected(kind), rtol=0, atol=2e-3)
    assert np.ptp(scores.total) > 5 and scores.parts == {}
    assert judge.score([], []).total.shape == (0,)


def test_converter_round_trip(folder):
    """transformers' text tower back in OpenCLIP's words, by the exporter: the tensors that went in, bit for bit."""
    state = oracle.random_state()
    ours = clip_model(state)
    text = {k: v for k, v in ours.state_dict().items() if k.startswith("text_") and "position_ids" not in k}
    back = open_clip_tensors({k: v for k, v in text.items() if not k.startswith("text_projection")})
    back["text_projection"] = text["text_projection.weight"].T
    expected = {k: v for k, v in state.items() if not k.startswith("visual.") and k != "logit_scale"}
    assert back.keys() == expected.keys() and all(torch.equal(back[k], expected[k]) for k in expected)
    # no tensor of the image tower is lost or mixed up either: as many numbers, and their sums
    names = [n for n, _ in ours.named_parameters()]
    assert sum(p.numel() for p in ours.parameters()) == sum(v.numel() for v in state.values()) and len(set(names))


def test_pickscore_takes_its_processor_from_clip_h(folder, monkeypatch, tmp_path):
    """The published model has none of its own that would be used: tokens and pixels are CLIP-H's."""
    from inpo_fast.judges import clip

    clip_model(oracle.random_state()).save_pretrained(tmp_path)
    monkeypatch.setattr(clip, "CLIP_H", str(folder))
    judge = make_judge(f"pickscore:{tmp_path}")
    np.testing.assert_allclose(judge.score(pictures(), PROMPTS).total, expected("pickscore"), rtol=0, atol=2e-3)


def test_id_names_weights_and_preprocessing(folder, tmp_path):
    state = oracle.random_state()
    same = HpsJudge("hps-v2.0", folder / "hps.pt", str(folder))
    assert judge_id(same) == judge_id(HpsJudge("hps-v2.0", folder / "hps.pt", str(folder)))
    state["ln_final.bias"][3] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    other = HpsJudge("hps-v2.0", tmp_path / "other.safetensors", str(folder))
    sharp = HpsJudge("hps-v2.0", folder / "hps.pt", str(folder), antialias=True)
    assert len({judge_id(judge) for judge in (same, other, sharp)}) == 3


RAN = Path(tempfile.gettempdir()) / "inpo-fast-pickle-ran"


class Bomb:
    def __reduce__(self):
        return (Path.touch, (RAN,))


def test_a_pickle_is_never_run(folder, tmp_path):
    torch.save({"state_dict": oracle.random_state(), "more": Bomb()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt is damaged or holds more than tensors.*safetensors"):
        make_judge(f"hps-v2.0:{tmp_path / 'evil.pt'}@{folder}")
    assert not RAN.exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nobody", "unknown judge 'nobody'.*hps-v2.0"),
        ("pocket-rules:", "judge pocket-rules:: has no weights; write pocket-rules"),
        ("pocket-rules:x", "has no weights"),
        ("clip", "names no model"),
        ("clip:/no/where", "no such folder"),
        ("hps-v2.1:/no/file.pt", "no such file"),
        ("aesthetic", "names no file"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(spec, words):
    with pytest.raises(UserError, match=words) as caught:
        make_judge(spec)
    assert "\n" not in str(caught.value)


def test_foreign_tensors_are_refused(folder, tmp_path):
    for change, words in (({"visual.head": torch.zeros(3)}, "unknown tensor"), ({"ln_final.bias": None}, "no tensor")):
        state = {k: v for k, v in (oracle.random_state() | change).items() if v is not None}
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(UserError, match=words):
            make_judge(f"hps-v2.0:{tmp_path / 'x.pt'}@{folder}")
    with pytest.raises(UserError, match="twice"):
        make_judges([f"clip:{folder}", f"clip:{folder}"])
