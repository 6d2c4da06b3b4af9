"""--config: the file that is there, else the shipped recipe of that name; whose paths lead into the package."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import inpo_fast
from inpo_fast.config import RunConfig, flat, parse, to_dict, to_yaml
from inpo_fast.runtime.errors import UserError
from inpo_fast.training.run_folder import RunFolder

PACKAGE = Path(inpo_fast.__file__).resolve().parent
NAMES = ["pocket", "sd15", "sd15-lora", "sd15-published", "sdxl", "sdxl-lora", "sdxl-published"]
# key of the pocket recipe: what it leads to
POCKET = {
    "models.base": "pocket/assets/model",
    "data.source": "pocket/assets/pairs.parquet",
    "evaluate.prompts": "pocket/assets/prompts-held-out.txt",
    "evaluate.seen_prompts": "pocket/assets/prompts-seen.txt",
    "evaluate.outside_judge": "pocket/assets/reader",
}


def settings(*words: str) -> dict:
    return flat(to_dict(parse("prog", list(words))))


def user_error(make) -> str:
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_that_ship_are_tried_here():
    assert sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_means_the_same_recipe(name, monkeypatch):
    monkeypatch.chdir(PACKAGE.parent)
    written = flat(yaml.safe_load((PACKAGE / "configs" / f"{name}.yaml").read_text()))
    for spelling in (name, f"{name}.yaml", f"configs/{name}.yaml", f"./configs/{name}.yaml"):
        found = settings("--config", spelling)
        assert {key: found[key] for key in written} == written  # in a checkout, a path is what the recipe says
        assert found["output"] == f"runs/{name}"
    assert settings(f"--config={name}") == found


@pytest.mark.parametrize("spelling", ["pocket", "pocket.yaml", "configs/pocket.yaml"])
def test_elsewhere_the_recipes_paths_lead_into_the_package(spelling, elsewhere):
    found = settings("--config", spelling, "--train.steps=3")
    for key, path in POCKET.items():
        kind = "pocket-reader:" if key == "evaluate.outside_judge" else ""
        assert found[key] == f"{kind}{PACKAGE / path}"
        assert (PACKAGE / path).exists()
    assert (found["train.steps"], found["objective.tau_norm"], found["output"]) == (3, "rms", "runs/pocket")


def test_other_paths_of_a_recipe_are_the_users(elsewhere):
    assert settings("--config=sd15")["data.source"] == "data/pickapic_v2"


def test_a_path_of_the_users_stays_what_it_says(elsewhere):
    (elsewhere / "mine.yaml").write_text((PACKAGE / "configs" / "pocket.yaml").read_text())
    assert settings("--config=mine.yaml")["models.base"] == "inpo_fast/pocket/assets/model"
    given = "inpo_fast/pocket/assets/pairs.parquet"
    found = settings("--config=pocket", f"--data.source={given}")
    assert found["data.source"] == given and found["models.base"] == str(PACKAGE / "pocket/assets/model")


def test_the_file_that_is_there_wins(elsewhere):
    (elsewhere / "configs").mkdir()
    for place in ("configs/pocket.yaml", "sd15", "sdxl.yaml"):
        (elsewhere / place).write_text("seed: 5\n")
        assert settings(f"--config={place}")["seed"] == 5
        assert settings(f"--config={place}")["models.base"] == RunConfig().models.base
    assert settings("--config=sdxl")["seed"] == 0  # no file of that name
    (elsewhere / "pocket").mkdir()  # a folder is no file
    assert settings("--config=pocket")["objective.tau_norm"] == "rms"


@pytest.mark.parametrize("asked", ["pokcet", "configs/sd16.yaml", "/nowhere/pocket.yaml", "../configs/sd15.yaml", ""])
def test_neither_file_nor_recipe_is_one_line_with_what_ships(asked, elsewhere):
    said = user_error(lambda: settings("--config", asked))
    assert f"--config {asked}: no such file" in said and ", ".join(NAMES) in said


def test_a_folder_is_no_recipe(elsewhere):
    said = user_error(lambda: settings("--config", str(elsewhere)))
    assert f"--config {elsewhere}: a folder, not a YAML file" in said and ", ".join(NAMES) in said


@pytest.mark.parametrize("text", ["", "# only a remark\n", "just words\n", "3\n"])
def test_a_file_without_settings_is_named(text, elsewhere):
    (elsewhere / "mine.yaml").write_text(text)
    assert "--config mine.yaml: holds no settings" in user_error(lambda: settings("--config=mine.yaml"))


def test_settings_may_stand_on_the_command_line(elsewhere):
    assert settings("--config", "{seed: 5, train: {steps: 7}}")["train.steps"] == 7
    assert settings("--config=pocket", "--config={seed: 5}")["seed"] == 5


def test_what_a_run_saves_is_the_same_run(elsewhere):
    config = parse("prog", ["--config=pocket"])
    (elsewhere / "config.yaml").write_text(to_yaml(config))
    assert parse("prog", ["--config=config.yaml"]) == config


def test_a_run_is_continued_from_another_folder(tmp_path, monkeypatch):
    def begin(folder: Path, *words: str) -> RunFolder:
        monkeypatch.chdir(folder)
        return RunFolder(tmp_path / "run", parse("prog", ["--config=pocket", f"--output={tmp_path / 'run'}", *words]))

    (tmp_path / "run").mkdir()
    for here, there in ((PACKAGE.parent, tmp_path), (tmp_path, PACKAGE.parent)):
        config = replace(begin(here).config, resume=False)
        (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
        begin(there, "--resume").check()
        said = user_error(lambda there=there: begin(there, "--resume", "--data.source=other.parquet").check())
        assert "data.source is 'other.parquet'" in said
