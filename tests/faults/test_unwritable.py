"""Outputs on a disk that takes nothing, inside a file, or of a name that cannot be: refused before any work. The models
and pairs that the commands name do not exist, and nobody comes to look for them."""

import importlib
import sys

import pytest

from inpo_fast.runtime.errors import UserError

OUTPUTS = {
    "cache": ("--data.cache={}/c", "--models.base=no/model", "--data.source=no.parquet"),
    "evaluate": ("--output={}/c", "--model=no/model", "--base=no/model", "--evaluate.prompts=no.txt"),
    "export": ("--output={}/a.safetensors", "--model=no-model"),
    "model_card": ("{}",),
    "profile": ("--json={}/a.json", "--models.base=no/model"),
    "relabel": ("--output={}/a.parquet", "--source=no.parquet", "--judge=pocket-rules"),
    "sample": ("--output={}/a.png", "--base=no/model", "--model=no/model", "--prompt=p"),
    "validate": ("--json={}/a.json", "--source=no.parquet"),
    "vote": ("--output={}/a.parquet", "--source=no.parquet"),
}
MORE = {
    "profile": ("--trace={}/a.json", "--models.base=no/model"),
    "validate": ("--sheet={}/a.png", "--source=no.parquet"),
}
CASES = [*OUTPUTS.items(), *MORE.items()]


def said(monkeypatch, command: str, words: tuple[str, ...], place: object) -> str:
    monkeypatch.setattr(sys, "argv", [command, *(word.format(place) for word in words)])
    with pytest.raises(UserError) as caught:
        importlib.import_module(f"inpo_fast.{command}").main()
    return str(caught.value)


@pytest.mark.parametrize(("command", "words"), CASES)
def test_on_a_read_only_disk(command, words, disk, monkeypatch):
    place = disk("ro")
    assert "cannot be written (Read-only file system)" in said(monkeypatch, command, words, place)


@pytest.mark.parametrize(("command", "words"), [case for case in CASES if case[0] != "model_card"])
def test_inside_a_file_and_of_a_name_that_cannot_be(command, words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for place, told in ((tmp_path / "file", ""), (tmp_path / ("z" * 300), "File name too long")):
        assert f"cannot be written ({told}" in said(monkeypatch, command, words, place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("key", ["output", "data.cache", "inversion.cache"])
def test_what_a_run_writes_is_not_the_root_of_all_folders(key):
    from inpo_fast.config import parse

    for place in ("/", "/tmp/..", "//"):
        with pytest.raises(UserError, match=f"{key}={place} is the root of all folders"):
            parse("prog", [f"--{key}={place}", "--inversion.model=reference"])


@pytest.mark.parametrize("key", ["output", "data.cache", "inversion.cache"])
def test_what_a_run_writes_is_no_address(key):
    from inpo_fast.config import parse

    with pytest.raises(UserError, match=f"{key}=s3://bucket/run is an address"):
        parse("prog", [f"--{key}=s3://bucket/run", "--inversion.model=reference"])
