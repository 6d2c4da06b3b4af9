"""Configuration: YAML and command line against the dataclasses; every mistake is one line that names key and remedy."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from inpo_fast.config import RunConfig, TrainConfig, parse, split_batch, to_dict, to_yaml
from inpo_fast.config.rules import check
from inpo_fast.config.run import OptimConfig
from inpo_fast.data.loader import DataConfig
from inpo_fast.method.config import ObjectiveConfig, Timesteps
from inpo_fast.runtime.errors import UserError


def from_file(tmp_path, text: str, *arguments: str, name: str = "mine.yaml") -> RunConfig:
    path = tmp_path / name
    path.write_text(text)
    return parse("prog", ["--config", str(path), *arguments])


def user_error(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


RECIPE = """
method: dpo
seed: 3
models: {base: some/folder}
objective:
  beta: 500
  timesteps: {min: 100}
optim: {lr: 1.0e-4, betas: [0.8, 0.9], decay: cosine}
evaluate: {prompts: null, seeds: 2}
"""


def test_defaults_are_the_dataclasses(tmp_path):
    assert parse("prog", []) == replace(RunConfig(), output="runs/unnamed")
    assert from_file(tmp_path, "seed: 0") == replace(RunConfig(), output="runs/mine")


def test_file_then_command_line(tmp_path):
    config = from_file(tmp_path, RECIPE, "--objective.beta=700", "--train.steps=9", "--objective.timesteps.max=800")
    assert (config.method, config.seed, config.models.base) == ("dpo", 3, "some/folder")
    assert config.objective == ObjectiveConfig(beta=700.0, timesteps=Timesteps(100, 800))
    assert config.optim == OptimConfig(lr=1e-4, betas=(0.8, 0.9), decay="cosine")
    assert config.train == TrainConfig(steps=9)
    assert config.data == DataConfig()
    assert (config.evaluate.prompts, config.evaluate.seeds) == (None, 2)
    assert from_file(tmp_path, RECIPE).objective.beta == 500.0


def test_later_file_wins_and_names_the_run(tmp_path):
    (tmp_path / "first.yaml").write_text("seed: 1\nmethod: dpo\n")
    config = from_file(tmp_path, "seed: 2", name="second.yaml")
    both = parse("prog", ["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "second.yaml")])
    assert (both.seed, both.method, both.output) == (2, "dpo", "runs/second")
    assert config.output == "runs/second"
    assert from_file(tmp_path, "seed: 2", "--output=elsewhere/x").output == "elsewhere/x"
    assert from_file(tmp_path, "output: elsewhere/y").output == "elsewhere/y"


def test_switches_may_stand_alone():
    assert parse("prog", ["--resume"]).resume
    assert parse("prog", ["--overwrite", "--seed=1"]).overwrite
    assert not parse("prog", ["--resume=false"]).resume


UNKNOWN = [
    ("optim.lrr", "optim.lr"),
    ("optm.lr", "optim.lr"),
    ("objective.timesteps.mn", "objective.timesteps.min"),
    ("train.step", "train.steps"),
    ("metod", "method"),
    ("beta", "objective.beta"),  # the group forgotten
]


@pytest.mark.parametrize(("key", "near"), UNKNOWN)
def test_unknown_key_is_refused_with_the_nearest_name(tmp_path, key, near):
    expected = f"unknown key '{key}'; did you mean '{near}'?"
    assert expected in user_error(lambda: parse("prog", [f"--{key}=1"]))
    tree = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert expected in user_error(lambda: from_file(tmp_path, yaml.safe_dump(tree)))


def test_unknown_key_without_a_near_name(tmp_path):
    assert user_error(lambda: parse("prog", ["--zzz=1"])) == "unknown key 'zzz' (--help lists all)"
    assert "unknown key 'zzz'" in user_error(lambda: from_file(tmp_path, "zzz: 1"))


WRONG = """
    train.steps=many train.steps=1.5 optim.lr=fast optim.lr=nan optim.betas=[0.9] method=ppo data.crop=left
    inversion.grid=coarse optim.average=swa train.steps=0 train.pairs_per_step=0 train.micro_batch=0
    train.checkpoint_every=0 train.keep_checkpoints=0 train.threads=-1 data.resolution=0 data.prompt_dropout=1.1
    data.bad_pair_limit=-0.1 inversion.steps=0 inversion.batch=0 inversion.eta=-0.1 optim.lr=0 optim.betas=[0.9,1.0]
    optim.eps=-1 optim.weight_decay=-1 optim.warmup_steps=-1 optim.clip=0 optim.ema_decay=1 objective.beta=0
    objective.winner_preserving=1.5 objective.label_smoothing=0.5 objective.label_smoothing=-0.1 objective.gamma=0
    inversion.refinements=0 inversion.estimator=newton
"""


@pytest.mark.parametrize("argument", WRONG.split())
def test_wrong_value_is_refused_with_key_and_value(argument):
    key, value = argument.split("=")
    message = user_error(lambda: parse("prog", [f"--{argument}"]))
    assert key in message
    assert str(yaml.safe_load(value)).strip("[]") in message


@pytest.mark.parametrize(
    ("low", "high", "key"),
    [
        (500, 400, "objective.timesteps=500..400"),
        (-1, 10, "objective.timesteps.min=-1"),
        (0, 1000, "max=1000"),
    ],
)
def test_timesteps_outside_the_schedule_are_refused(low, high, key):
    span = [f"--objective.timesteps.min={low}", f"--objective.timesteps.max={high}"]
    assert f"{key}: must be within 0..999" in user_error(lambda: parse("prog", span))


def test_values_at_their_limits_are_accepted():
    check(replace(RunConfig(), objective=ObjectiveConfig(winner_preserving=1.0, timesteps=Timesteps(999, 999))))
    check(replace(RunConfig(), data=DataConfig(prompt_dropout=1.0, bad_pair_limit=0.0, resolution=1)))
    check(replace(RunConfig(), train=TrainConfig(1, 1, 1, 1, 1), optim=OptimConfig(warmup_steps=0, betas=(0, 0))))


def test_sft_has_no_loser_to_preserve_from():
    text = user_error(lambda: parse("prog", ["--method=sft", "--objective.winner_preserving=0.5"]))
    assert "winner_preserving needs a loser" in text


SENSELESS = {
    "method=kto objective.winner_preserving=0.5": "method=kto takes images alone",
    "method=sft objective.label_smoothing=0.1": "label_smoothing needs a label",
    "method=inpo objective.gamma=5": "objective.gamma=5 is of method=smpo; for method=inpo change objective.beta",
    "method=dpo inversion.estimator=fixed-point": "method=dpo has no inversion; take inpo or smpo",
    "inversion.refinements=2": "inversion.estimator=ddim refines nothing",
    "method=smpo inversion.estimator=renoise inversion.eta=0.1": "a step without noise; take inversion.eta=0",
    "inversion.estimator=gradient models.fast=fused": "take models.fast=off",
    "inversion.estimator=renoise inversion.model=reference inversion.cache=x": "more evaluations a level; take ddim",
}


@pytest.mark.parametrize("words", SENSELESS)
def test_senseless_combinations_are_refused(words):
    assert SENSELESS[words] in user_error(lambda: parse("prog", [f"--{word}" for word in words.split()]))


def test_files_that_are_no_configuration(tmp_path):
    assert "/nowhere/x.yaml" in user_error(lambda: parse("prog", ["--config=/nowhere/x.yaml"]))
    assert str(tmp_path) in user_error(lambda: parse("prog", [f"--config={tmp_path}"]))
    user_error(lambda: from_file(tmp_path, "- a\n- b"))
    user_error(lambda: from_file(tmp_path, "seed: [1"))


@pytest.mark.parametrize(("text", "key"), [("train: 3", "train"), ("optim: null", "optim"), ("train: []", "train")])
def test_value_where_a_group_belongs_is_refused(tmp_path, text, key):
    assert f"mine.yaml: {key} is " in user_error(lambda: from_file(tmp_path, text))
    assert "mine.yaml: objective.timesteps is 3" in user_error(lambda: from_file(tmp_path, "objective: {timesteps: 3}"))
    assert "mine.yaml: objective is 3" in user_error(lambda: from_file(tmp_path, "objective: 3"))


def test_split_batch():
    assert split_batch(TrainConfig(pairs_per_step=64, micro_batch=8), 1) == 8
    assert split_batch(TrainConfig(pairs_per_step=64, micro_batch=8), 4) == 2
    assert split_batch(TrainConfig(pairs_per_step=64, micro_batch=16), 4) == 1
    assert split_batch(TrainConfig(pairs_per_step=3, micro_batch=1), 3) == 1


@pytest.mark.parametrize(
    ("pairs", "micro", "world", "message"),
    [
        (65, 1, 4, "train.pairs_per_step=65 does not divide over 4 processes; take a multiple of 4 such as 64"),
        (3, 1, 8, "train.pairs_per_step=3 does not divide over 8 processes; take a multiple of 8 such as 8"),
        (64, 5, 1, "train.micro_batch=5 does not divide the 64 pairs that each of 1 processes"),
        (48, 10, 2, "the 24 pairs that each of 2 processes has per step; take a divisor such as 8"),
        (8, 16, 2, "train.micro_batch=16 does not divide the 4 pairs"),
    ],
)
def test_split_batch_refuses_with_a_value_that_works(pairs, micro, world, message):
    text = user_error(lambda: split_batch(TrainConfig(pairs_per_step=pairs, micro_batch=micro), world))
    assert message in text
    remedy = int(text.split("such as ")[1])
    pairs, micro = (remedy, micro) if "pairs_per_step=" in text else (pairs, remedy)
    split_batch(TrainConfig(pairs_per_step=pairs, micro_batch=micro), world)


@settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate])
@given(
    lr=st.floats(1e-12, 1e3),
    base=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"])),
    threads=st.none() | st.integers(1, 64),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    low=st.integers(0, 999),
)
def test_yaml_round_trip(tmp_path_factory, lr, base, threads, betas, low):
    config = RunConfig(
        method="sft",
        output="runs/other",
        models=replace(RunConfig().models, base=base),
        objective=ObjectiveConfig(timesteps=Timesteps(low, 999)),
        train=TrainConfig(threads=threads),
        optim=OptimConfig(lr=lr, betas=betas),
    )
    again = from_file(tmp_path_factory.mktemp("round"), to_yaml(config))
    assert again == config
    assert to_dict(config)["optim"]["betas"] == list(betas)  # plain values, for json as well


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"optim:\n  lr: \t.0e-3\n", "not YAML"),
        (b"output: caf\xe9\n", "not text in UTF-8"),
        (b"optim: {lr: null}\n", "optim.lr is null"),
    ],
)
def test_files_that_fuzzing_found_are_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        parse("test", ["--config", str(path)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_is_read_without_models_and_kernels():
    """--help and refusals must not wait for them."""
    command = "import sys, inpo_fast.config; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.split())
    assert "inpo_fast" in loaded and not loaded & {"diffusers", "transformers", "triton", "inpo_kernels"}
