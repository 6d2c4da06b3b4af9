"""A GPU that is full wherever a batch is computed: each place comes down to what fits, all ask one owner of the sizes,
and a run has the results of one with room to rounding, also continued."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_runs import metrics, policy, same_bits, save_recipe, train_in
from tiny_world import save_pairs
from transformers import CLIPTextModel

from inpo_fast.pocket.scenes import split_scenes
from inpo_fast.runtime import memory

CAPTIONS = [scene.caption for scene in split_scenes()[1][:3]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that looks at held-out pairs, draws online, now and then, and at its end."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    save_recipe(
        folder,
        objective={"beta": 50.0},
        train={"micro_batch": 4, "keep_checkpoints": 9, "checkpoint_every": 1, "steps": 3},
        optim={"lr": 1e-4},
        observe={"images_every": 2, "images": 3, "held_out_pairs": 4, "held_out_every": 1},
        online={"every": 2, "start": 2, "mix": 0.5, "sampler_steps": 2, "guidance": 2.0, "judge": "pocket-rules"},
        evaluate={"prompts": str(folder / "prompts.txt"), "seeds": 1, "sampler_steps": 2, "batch": 3},
    )
    save_pairs(folder / "held.parquet", rows=24)
    return folder


@contextmanager
def full_above(**limits: int):
    """unet, vae, text: how many their forward takes at once. Gives the largest number that each was given and took."""
    classes = {"unet": (UNet2DConditionModel, "forward"), "vae": (AutoencoderKL, "encode")}
    classes["text"] = (CLIPTextModel, "forward")
    took = dict.fromkeys(limits, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, limit in limits.items():
            patch.setattr(*classes[name], _crowded(name, limit, getattr(*classes[name]), took))
        yield took


def _crowded(name, limit, plain, took):
    def crowded(self, *args, **how):
        x = args[0] if args else how["input_ids"]
        if x.device.type != "meta":  # the count that a size comes from
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            took[name] = max(took[name], len(x))
        return plain(self, *args, **how)

    return crowded


@pytest.fixture(scope="module")
def runs(world):
    words = (f"--observe.held_out={world / 'held.parquet'}", "--data.vae_batch=4")
    roomy = train_in(world, "roomy", *words)
    with full_above(unet=2, vae=1, text=2) as took:
        crowded = train_in(world, "crowded", *words)
    return roomy, crowded, took, words


def test_a_run_with_little_memory_is_the_same_run(runs):
    roomy, crowded, took, _ = runs
    assert took == {"unet": 2, "vae": 1, "text": 2}
    halved, whole = policy(crowded, 2), policy(roomy, 2)  # trained on stored pairs; then on what was drawn
    for name, value in whole.items():
        torch.testing.assert_close(halved[name], value, rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(metrics(crowded), metrics(roomy), strict=True):
        for name in ("held_out_margin", "held_out_winner_delta", "loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), name
    results = [json.loads((run / "evaluation.json").read_text()) for run in (roomy, crowded)]
    assert results[0]["win_rate"] == pytest.approx(results[1]["win_rate"], abs=0.34)
    assert results[0]["total"]["base_mean"] == pytest.approx(results[1]["total"]["base_mean"], abs=0.02)


def test_sizes_are_kept_and_a_resume_has_the_same_bits(runs, world, capsys):
    """Where there is room again by then: what was halved decides how results are rounded."""
    _, crowded, _, words = runs
    state = json.loads((crowded / "checkpoints" / "step-0003" / "state.json").read_text())
    assert state["lowered"] == {
        "data.vae_batch": 1,
        "inversion.batch": 2,
        "train.micro_batch": 1,
        memory.PROMPTS: 2,
        memory.PICTURES: 1,
    }
    shutil.copytree(crowded, world / "cut")
    shutil.rmtree(world / "cut" / "checkpoints" / "step-0003")
    with full_above(unet=99, vae=99, text=99) as took:
        again = train_in(world, "cut", *words, "--resume")
    assert took["unet"] == 2 and took["vae"] == 1 and same_bits(again, crowded, 3)
    said = capsys.readouterr().out
    assert "out of memory" not in said and "train.micro_batch is at most 1, which fitted before" in said


def test_text_encoders_alone(world, caplog):
    with full_above(text=1):
        found = metrics(train_in(world, "text", "--observe.images_every=0"))
    assert len(found) == 3 and "prompts to encode now come in batches of 1" in caplog.text


@pytest.mark.parametrize("what", ["vae", "text", "unet"])
def test_where_not_one_fits_it_is_one_line(world, what):
    with full_above(**{what: 0}), pytest.raises(memory.TooLarge, match=r"^out of memory (at|with 1 of) .*; take "):
        train_in(world, f"none-{what}")
