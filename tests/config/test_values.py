"""One rule for each kind of value, for every key that there is; YAML as recipes are written."""

import math
from types import NoneType
from typing import get_args, get_origin

import pytest
import yaml

from inpo_fast.config import RunConfig, parse, to_yaml
from inpo_fast.config.limits import LIMITS
from inpo_fast.config.values import leaves, quoted
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.yaml_text import read_yaml, to_text

LEAVES = leaves(RunConfig)


def kinds(key: str) -> set:
    kind = LEAVES[key]
    return {kind} if get_origin(kind) is tuple else {one for one in get_args(kind) or (kind,) if one is not NoneType}


FLOATS = [key for key in LEAVES if kinds(key) == {float}]
WHOLE = [key for key in LEAVES if kinds(key) == {int}]
SWITCHES = [key for key in LEAVES if kinds(key) == {bool}]
WORDS = [key for key in LEAVES if kinds(key) == {str}]


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse("prog", list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_in_file(tmp_path, key: str, value: object) -> str:
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return refused("--config", str(tmp_path / "mine.yaml"))


def test_there_are_keys_of_every_kind():
    assert len(FLOATS) > 15 and len(WHOLE) > 30 and len(SWITCHES) > 8 and len(WORDS) > 12


def test_every_number_has_limits():
    assert {*FLOATS, *WHOLE} == LIMITS.keys() - {"optim.betas"}


@pytest.mark.parametrize("key", FLOATS)
def test_every_float_is_a_finite_number_within_limits(key, tmp_path):
    for value in (math.inf, -math.inf, math.nan):
        assert f"{key}={value}: must be a finite number" in refused_in_file(tmp_path, key, value)
        assert f"{key}={value}: must be a finite number" in refused(f"--{key}={value}")
    assert f"{key}=inf" in refused(f"--{key}=1e400")
    assert f"{key}=1e+300" in refused(f"--{key}=1e300")  # finite, and infinite in fp32
    for value in (True, "many", [0.5], {"a": 1}):
        assert f"{key}={value!r}: must be a number" in refused_in_file(tmp_path, key, value)


@pytest.mark.parametrize("key", WHOLE)
def test_every_whole_number_is_one_within_limits(key, tmp_path):
    for value in (True, 1.5, "many", [1], {"a": 1}):
        assert f"{key}={value!r}: must be a whole number" in refused_in_file(tmp_path, key, value)
    for number in ("-1", "1" + "0" * 30):
        assert f"{key}={number}: must be" in refused(f"--{key}={number}")
    assert "must be a whole number" in refused(f"--{key}={'9' * 5000}")
    assert "without a 0 before it" in refused(f"--{key}=0123")


@pytest.mark.parametrize("key", SWITCHES)
def test_every_switch_is_true_or_false(key, tmp_path):
    for value in (1, 0, 0.5, "maybe", [True]):
        assert f"{key}={value!r}: must be true or false" in refused_in_file(tmp_path, key, value)


@pytest.mark.parametrize("key", WORDS)
def test_every_word_is_a_text(key, tmp_path):
    for value in (7, 0.5, True, ["a"], {"a": 1}):
        assert f"{key}={value!r}: must be a text" in refused_in_file(tmp_path, key, value)
    assert "holds a character that is no text" in refused_in_file(tmp_path, key, "a\0b")
    assert "is empty" in refused(f"--{key}= ")
    long = "a long word " * 1000
    said = refused(f"--{key}={long}")
    assert f"{key}=" in said and "4,096 is the most" in said and len(said) < 350
    assert "not text in UTF-8" in refused(f"--{key}=\udcff")


def test_a_list_has_as_many_as_it_should():
    assert "optim.betas=[0.9]: must be a list of 2" in refused("--optim.betas=[0.9]")
    assert "optim.betas[1]=inf: must be a finite number" in refused("--optim.betas=[0.9, inf]")
    assert "evaluate.judges='a': must be a list such as [a, b]" in refused("--evaluate.judges=a")
    assert "data.filters.weights.cat=nan" in refused("--data.filters.weights={cat: .nan}")


REPEATED = {
    "train: {steps: 1}\nseed: 2\ntrain: {micro_batch: 1}\n": "'train' stands on lines 1 and 3",
    "seed: 1\nmethod: dpo\nseed: 2\n": "'seed' stands on lines 1 and 3",
    "train:\n  steps: 1\n  steps: 2\n": "'steps' stands on lines 2 and 3",
    "objective:\n  timesteps:\n    min: 1\n    min: 2\n": "'min' stands on lines 3 and 4",
    "data: {filters: {weights: {a: 1, a: 2}}}\n": "'a' stands twice on line 1",
    "train.steps: 3\ntrain: {steps: 4}\n": "train.steps stands twice",
}


@pytest.mark.parametrize("text", REPEATED)
def test_a_key_that_stands_twice_is_refused_with_its_lines(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    assert f"{tmp_path / 'mine.yaml'}: {REPEATED[text]}" in refused("--config", str(tmp_path / "mine.yaml"))


def test_later_ones_win_only_where_somebody_gave_them_later():
    assert parse("prog", ["--seed=1", "--seed=2"]).seed == 2
    assert parse("prog", ["--config={seed: 1}", "--config={seed: 2}", "--train={steps: 3}"]).seed == 2
    assert "stands twice" in refused("--config={seed: 1, seed: 2}")
    assert "stands twice" in refused("--train={steps: 1, steps: 2}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False),
        ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("0123", "0123"), ("~", None), ("", None), ("null", None),
        ("1e-3", 1e-3), ("1.0e-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("1_000", 1000), ("0x10", 16), ("0o17", 15),
        ("-3", -3), ("1e5", 1e5), ("'7'", "7"), (".inf", math.inf),
    ],
)  # fmt: skip
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    found = read_yaml(f"a: {text}\n", "x")["a"]
    assert found == value and type(found) is type(value)


def test_off_is_a_word_where_a_word_belongs(tmp_path):
    (tmp_path / "a.yaml").write_text("models: {fast: off, gradient_checkpointing: on}\ndata: {flip: no}\n")
    config = parse("prog", ["--config", str(tmp_path / "a.yaml")])
    assert (config.models.fast, config.models.gradient_checkpointing, config.data.flip) == ("off", True, False)


@pytest.mark.parametrize(
    "word", ["1e-3", "off", "0123", "2024-01-01", "1:30", "null", "7", "true", "~", "a: b", "größer"]
)
def test_both_readers_take_what_is_written_for_the_same(word):
    text = to_text({"base": word})
    assert read_yaml(text, "x") == yaml.safe_load(text) == {"base": word}
    config = parse("prog", [f"--models.base={word}"])
    assert read_yaml(to_yaml(config), "x")["models"]["base"] == word


NO_RECIPE = {
    "a:\n\tb: 1": "tabs cannot indent a line",
    "1: 2": "the key '1' is no word",
    "[1]: 2": "is no word",
    "seed: !!python/object:os.system x": "not YAML",
    "seed: 1\n---\nseed: 2": "not YAML on line 2",
    "[" * 1000: "without end",
    "seed: " + "9" * 5000: "a value is not what it says",
    "&a [*a]": "holds no settings",
    "config: b.yaml": "config is of the command line",
}


@pytest.mark.parametrize("text", NO_RECIPE)
def test_what_is_no_recipe_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    said = refused("--config", str(tmp_path / "mine.yaml"))
    assert NO_RECIPE[text] in said and len(said) < 600


def test_a_value_is_quoted_shortly_even_where_it_grows_without_end(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "mine.yaml").write_text("\n".join(lines) + "\nseed: *a29\n")
    said = refused("--config", str(tmp_path / "mine.yaml"))  # the first unknown key
    (tmp_path / "mine.yaml").write_text(f"optim: {{betas: {'[' * 50}{']' * 50}}}\n")
    assert len(said) < 300 and len(refused("--config", str(tmp_path / "mine.yaml"))) < 300


def test_only_the_beginning_of_a_list_is_looked_at():
    """A recipe of a few lines can hold, by its anchors, more than any memory."""
    asked = []

    class Loud:
        def __repr__(self):
            asked.append(self)
            return "loud"

    assert quoted([[Loud()] * 1000] * 1000).startswith("[[loud, loud") and len(asked) < 200


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stray"], "unrecognized arguments: 'stray'"),
        (["--seed"], "--seed has no value; write --seed=VALUE"),
        (["--seed", "--resume"], "--seed has no value"),
        (["--train.stepss", "3"], "unknown key 'train.stepss'; did you mean 'train.steps'?"),
        (["--train=3"], "train is 3, expected keys below it"),
        (["--config"], "--config has no value"),
    ],
)
def test_words_that_are_no_settings(words, told):
    assert told in refused(*words)


@pytest.mark.parametrize("word", ["1_", "1__0", "_1", "+", "9" * 5000])
def test_a_whole_number_is_one_for_python_too(word):
    assert "train.steps" in refused(f"--train.steps={word}")


@pytest.mark.parametrize(
    "line",
    [
        "train: {shard_states: !!bool abc}",
        'train: {steps: !!int ""}',
        'optim: {lr: !!float ""}',
        "data: {source: !!timestamp abc}",
        "data: {source: !!binary a}",
    ],
)
def test_a_value_that_is_not_what_its_tag_says(line):
    with pytest.raises(UserError, match="here: "):
        read_yaml(line, "here")
