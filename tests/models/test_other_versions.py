"""What a run writes, opened by the library versions that other programs pin: each pair in an environment of its own.

Slow: pip fetches some 250 MB for each pair. The pairs are what InvokeAI 6.14 and OneTrainer pin, and sd-scripts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_world import save_pairs, tiny_pipeline, tiny_xl

from inpo_fast.config import parse
from inpo_fast.training import loop
from inpo_fast.training.set_up import prepare

pytestmark = pytest.mark.slow
VERSIONS = {
    "transformers-5.5": ["transformers==5.5.4", "diffusers==0.39.0", "peft==0.18.1"],
    "transformers-4.54": ["transformers==4.54.1", "diffusers==0.32.2", "peft==0.17.1", "numpy<2.4"],
}
KINDS = {"sd15": tiny_pipeline, "sdxl": tiny_xl}
PROMPT = "A small red circle, Ünïcode 12's"  # capitals, accents and digits go through every part of a tokenizer
# Runs with nothing but torch, diffusers, transformers, peft: no import of ours
DRAW = """
import json, sys, torch
from diffusers import DiffusionPipeline
jobs = json.loads(sys.stdin.read())
for out, folder, lora, prompt in jobs:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    seen = {}
    with torch.no_grad():
        for i in ("", "_2"):
            encoder, tokenizer = getattr(pipe, "text_encoder" + i, None), getattr(pipe, "tokenizer" + i, None)
            if encoder is None:
                continue
            ids = tokenizer(prompt, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
            seen["ids" + i], seen["embedding" + i] = ids, encoder(ids).last_hidden_state
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 8, 8, generator=draw)
        hidden = torch.randn(2, 9, pipe.unet.config.cross_attention_dim, generator=draw)
        more = {"text_embeds": torch.randn(2, 96, generator=draw), "time_ids": torch.full((2, 6), 32.0)}
        seen["prediction"] = pipe.unet(x, torch.tensor([10, 600]), hidden, added_cond_kwargs=more).sample
        picture = pipe(prompt, num_inference_steps=3, height=32, width=32, output_type="np",
                       generator=torch.Generator().manual_seed(1)).images[0]
        seen["picture"] = torch.from_numpy(picture)
    torch.save(seen, out)
"""


def draw(python: Path | str, jobs: list[tuple]) -> list[dict[str, torch.Tensor]]:
    """Each job: (file to write, folder, LoRA or None, prompt)."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), "-c", DRAW],
        input=json.dumps([[str(part) if isinstance(part, Path) else part for part in job] for job in jobs]),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    assert "newly initialized" not in done.stderr and "MISSING" not in done.stderr, done.stderr
    return [torch.load(job[0]) for job in jobs]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """kind -> (folder of the base as it was saved, run with full fine-tuning, run with a LoRA of alpha != rank).

    OTHER_VERSIONS_WORLD: a folder that holds all that already, e.g. to hold another writer to the same test.
    """
    if "OTHER_VERSIONS_WORLD" in os.environ:
        return Path(os.environ["OTHER_VERSIONS_WORLD"])
    folder = tmp_path_factory.mktemp("world")
    save_pairs(folder / "pairs.parquet")
    for kind, make in KINDS.items():
        make().save_pretrained(folder / kind / "base")
        for mode, more in {"full": [], "lora": ["--models.lora.rank=4", "--models.lora.alpha=6"]}.items():
            config = parse(
                "test",
                [
                    f"--models.base={folder / kind / 'base'}",
                    f"--data.source={folder / 'pairs.parquet'}",
                    f"--output={folder / kind / mode}",
                    "--train.steps=2",
                    "--train.pairs_per_step=4",
                    "--train.micro_batch=4",
                    "--inversion.steps=2",
                    "--optim.lr=0.01",
                    "--optim.warmup_steps=0",
                    *more,
                ],
            )
            started = prepare(config, 0, 1, torch.device("cpu"))
            loop.train(started, Console(quiet=True))
            loop.finish(started)
    return folder


@pytest.fixture(scope="module", params=VERSIONS)
def python(request, tmp_path_factory):
    """The interpreter of an environment with the pinned versions. OTHER_VERSIONS_PYTHON_<name>: one that is there."""
    ready = os.environ.get("OTHER_VERSIONS_PYTHON_" + request.param.replace("-", "_").replace(".", "_"))
    if ready:
        return ready
    place = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    own = f"torch=={torch.__version__.split('+')[0]}"
    command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", own, *VERSIONS[request.param], "pillow"]
    subprocess.run([str(part) for part in command], check=True)
    return place / "bin" / "python"


def hold(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        # the same weights by other versions of the same formulas in fp32: rounding, not more
        torch.testing.assert_close(found[name], x, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_opens_with_other_versions(world, python, tmp_path, kind, mode):
    folder = world / kind / mode / "model"
    (ours,) = draw(sys.executable, [(tmp_path / "ours.pt", folder, None, PROMPT)])
    (theirs,) = draw(python, [(tmp_path / "theirs.pt", folder, None, PROMPT)])
    hold(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_means_the_same_to_other_versions(world, python, tmp_path, kind):
    """The folder as it is, and each file in it by its name."""
    run = world / kind / "lora"
    base = world / kind / "full" / "model"  # any folder that the other version opens: the adapter is put beside it
    files = [run / "lora", *sorted((run / "lora").glob("*.safetensors"))]
    ours = draw(sys.executable, [(tmp_path / f"ours{i}.pt", base, file, PROMPT) for i, file in enumerate(files)])
    theirs = draw(python, [(tmp_path / f"theirs{i}.pt", base, file, PROMPT) for i, file in enumerate(files)])
    (without,) = draw(sys.executable, [(tmp_path / "without.pt", base, None, PROMPT)])
    assert (ours[0]["prediction"] - without["prediction"]).abs().max() > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        hold(ours[0], mine)  # every file says the same
        hold(mine, other)
