"""RunFolder.check: never two runs in one folder by accident, and a continuation needs the same recipe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from inpo_fast.config import EvaluateConfig, RunConfig, TrainConfig, to_yaml
from inpo_fast.config.run import OptimConfig
from inpo_fast.runtime import sealed_json
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.run_folder import RunFolder

MANIFEST = {"variant": "inpo", "config_sha256": "0", "data": {}, "model": {}, "inputs": {}}


def taken(path: Path, **changes) -> RunConfig:
    """The configuration of a run that stands in the folder."""
    config = replace(RunConfig(output=str(path)), **changes)
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    (path / "manifest.json").write_text(sealed_json.dumps(MANIFEST))
    return config


def test_taken_folder_is_refused_without_a_word(tmp_path):
    path = tmp_path / "run"
    RunFolder(path, RunConfig()).check()  # absent
    config = taken(path)
    with pytest.raises(
        UserError, match=r"run already holds a run \(config\.yaml, metrics\.jsonl, man.*\); .*--resume.*--overw"
    ):
        RunFolder(path, config).check()
    for word in ("resume", "overwrite"):
        RunFolder(path, replace(config, **{word: True})).check()
    with pytest.raises(UserError, match="--resume and --overwrite contradict"):
        RunFolder(path, replace(config, resume=True, overwrite=True)).check()
    assert {p.name for p in path.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "manifest.json",
    }  # check() touches nothing


def test_folder_with_other_things_is_free(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path, RunConfig()).check()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"already holds a run \(checkpoints\)"):
        RunFolder(tmp_path, RunConfig()).check()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run is a file; name a folder"):
        RunFolder(tmp_path / "run", RunConfig()).check()


def test_continuation_needs_the_same_recipe(tmp_path):
    path = tmp_path / "run"
    config = replace(taken(path, optim=OptimConfig(lr=1e-5, betas=(0.8, 0.9))), resume=True)
    RunFolder(path, config).check()
    other = replace(config, optim=replace(config.optim, lr=2e-5))
    with pytest.raises(UserError, match=r"--resume: optim\.lr is 2e-05 but the run in .*run has 1e-05; give the same"):
        RunFolder(path, other).check()
    with pytest.raises(UserError, match=r"train\.pairs_per_step is 8 but"):
        RunFolder(path, replace(config, train=TrainConfig(pairs_per_step=8))).check()
    free = TrainConfig(micro_batch=2, threads=1, checkpoint_every=3, keep_checkpoints=5)
    RunFolder(path, replace(config, output="moved", train=free, evaluate=EvaluateConfig(seeds=9))).check()


@pytest.mark.parametrize("content", [b"", b"- a", b"seed: [", b"\xff\xfe\xfa"])
def test_unreadable_recipe_is_refused(tmp_path, content):
    config = replace(taken(tmp_path / "run"), resume=True)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        RunFolder(tmp_path / "run", config).check()
