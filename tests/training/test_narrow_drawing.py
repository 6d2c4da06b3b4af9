"""fp16 and bf16 draw everywhere: SD and SDXL, whose VAE diffusers itself raises to fp32 (force_upcast), and with fp16
where no other VAE is named, a VAE in fp32 beside a half network."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_runs import metrics, run_command, save_recipe, train_in
from tiny_world import one_level, tiny_pipeline, tiny_xl

from inpo_fast.data.images import decode
from inpo_fast.pocket.scenes import split_scenes

CAPTIONS = [scene.caption for scene in split_scenes()[1][:2]]
CASES = [
    pytest.param((kind, precision), marks=() if precision == "fp16" else pytest.mark.slow, id=f"{kind}-{precision}")
    for kind in ("sd", "sdxl")
    for precision in ("fp16", "bf16")
]


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    """A run that draws in all three of its ways: after some steps, in a round of online training, at its end."""
    kind, precision = request.param
    folder = tmp_path_factory.mktemp(f"{kind}-{precision}")
    pipeline = one_level(tiny_pipeline() if kind == "sd" else tiny_xl())
    pipeline.vae.register_to_config(force_upcast=kind == "sdxl")
    pipeline.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    evaluate = {"prompts": str(folder / "prompts.txt"), "seeds": 1, "sampler_steps": 2, "guidance": 2.0, "batch": 2}
    save_recipe(
        folder,
        models={"base": str(folder / "model"), "precision": precision},
        train={"steps": 2, "pairs_per_step": 2},
        observe={"images_every": 1, "images": 2},
        online={"every": 1, "sampler_steps": 2, "guidance": 2.0, "judge": "pocket-rules"},
        evaluate=evaluate,
    )
    return folder, precision, train_in(folder, "run")


def assert_drawn(pixels: np.ndarray) -> None:
    """Not black, which is what numbers beyond fp16 become."""
    assert pixels.dtype == np.uint8 and pixels.astype(float).std() > 3


@pytest.mark.filterwarnings("ignore")
def test_a_run_draws(run):
    _, _, out = run
    assert [line["step"] for line in metrics(out)] == [1, 2]
    strips = sorted((out / "images").glob("*.png"))
    assert [path.stem for path in strips] == ["000001", "000002"]
    for path in (*strips, out / "samples.png"):
        assert_drawn(np.asarray(decode(path.read_bytes(), 10**8)))
    drawn = [line["online_pairs"] + line["online_ties"] for line in metrics(out) if "online_pairs" in line]
    assert drawn == [2]
    assert json.loads((out / "evaluation.json").read_text())["prompts"] == 2


@pytest.mark.filterwarnings("ignore")
def test_commands_draw(run, tmp_path, capsys):
    folder, precision, out = run
    base, model = str(folder / "model"), str(out / "model")
    sheet = tmp_path / "sheet.png"
    words = ["--base", base, "--model", model, "--prompt", CAPTIONS[0], "--steps", "2", "--output", str(sheet)]
    run_command("inpo_fast.sample", *words, "--precision", precision)
    assert_drawn(np.asarray(Image.open(sheet).convert("RGB")))
    words = ["--base", base, "--model", f"one={model}", "--model", f"two={base}", "--output", str(tmp_path / "table")]
    run_command("inpo_fast.evaluate", *words, "--config", str(folder / "tiny.yaml"))
    pictures = list((tmp_path / "table").glob("pictures/*/*.png"))
    assert len(pictures) == 8  # the base, two models and the negative control, for two prompts
    for path in pictures:
        assert_drawn(np.asarray(decode(path.read_bytes(), 10**8)))
    run_command(
        "inpo_fast.evaluate", *words[:4], "--output", str(tmp_path / "one"), "--config", str(folder / "tiny.yaml")
    )
    assert (tmp_path / "one" / "evaluation.json").exists()
