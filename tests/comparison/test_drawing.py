"""`python -m inpo_fast.sample`: base beside aligned from the same noise, whatever kind of model it is given."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import tiny_pipeline

from inpo_fast import sample as sample_command
from inpo_fast.comparison import drawing
from inpo_fast.handover.output_model import save_adapter
from inpo_fast.models.config import LoraSettings, ModelsConfig
from inpo_fast.models.loading import load_pipeline, open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, other/ (another UNet) and lora/ (an adapter of base)."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "base")
    tiny_pipeline(seed=5).save_pretrained(folder / "other")
    config = ModelsConfig(base=str(folder / "base"), lora=LoraSettings(rank=2))
    models = Models(open_pipeline(config), torch.device("cpu"), config)
    with torch.no_grad():
        for master in models.weights.masters:
            master.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save_adapter(models, folder / "lora")
    return folder


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    def run(model: str, *words: str) -> np.ndarray:
        arguments = ["--base", str(folder / "base"), "--model", str(folder / model), "--steps", "2", "--guidance", "2"]
        monkeypatch.setattr(
            sys, "argv", ["sample", *arguments, "--output", str(tmp_path / "out" / "sheet.png"), *words]
        )
        sample_command.main()
        with Image.open(tmp_path / "out" / "sheet.png") as sheet:
            return np.asarray(sheet.convert("RGB"))

    return run


def rows(sheet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first picture above and the first below: 32 pixels enlarged five times, beside the names."""
    return sheet[8:168, 68:228], sheet[172:332, 68:228]


@pytest.mark.parametrize("model", ["other", "lora"])
def test_sheet(run, model):
    above, below = rows(run("base", "--prompt", "a red circle"))
    assert np.array_equal(above, below)  # the base beside itself: same prompt, same noise
    base, aligned = rows(run(model, "--prompt", "a red circle"))
    assert np.array_equal(base, above) and not np.array_equal(aligned, base)


def test_prompts_from_a_file_and_seeds(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square  \n")
    sheet = run("other", "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "a green ring", "--seeds", "2")
    assert sheet.shape[1] == 68 + 6 * 168  # (1 + 2) prompts x 2 seeds side by side
    assert not np.array_equal(sheet[8:168, 68:228], sheet[8:168, 236:396])  # two seeds


def test_afterwards_the_pipeline_is_its_own_again(folder):
    pipeline = load_pipeline(str(folder / "base"))
    unet, before = pipeline.unet, {n: p.clone() for n, p in pipeline.unet.named_parameters()}
    for model in ("lora", "other"):
        with drawing.aligned(pipeline, str(folder / model)):
            pass
        assert pipeline.unet is unet
        after = dict(unet.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(after[n], p) for n, p in before.items())


def test_user_errors(run, tmp_path):
    with pytest.raises(UserError, match="no prompts"):
        run("other")
    with pytest.raises(UserError, match=r"--prompts .*: No such file"):
        run("other", "--prompts", str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"--model: (no such folder|cannot open)"):
        run("missing", "--prompt", "a")
