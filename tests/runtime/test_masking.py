"""Secrets of addresses: what `masked` hides and what it leaves, and a real run whose files and words are searched."""

import io
import json
import logging
import sys
from pathlib import Path

import fsspec
import pytest
import tiny_world
import yaml
from tiny_runs import save_recipe, train_in

from inpo_fast import relabel as relabel_command
from inpo_fast import validate as validate_command
from inpo_fast.runtime import masking, unforeseen
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.masking import keep_secret, keep_secrets_of, masked, masked_tree, without_secrets

PLACE = "memory://reader:{password}@host/pairs.parquet?token={token}"
SECRETS = {"password": "hunter2hunter2", "token": "tok-4711-secret"}
OTHERS = {"password": "rotated-password", "token": "tok-0815-rotated"}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(masking, "_told", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a.parquet: 404", "https://***@host/a.parquet: 404"),
        ("http://TOKEN@host:81/", "http://***@host:81/"),
        ("https://me:p@ss@host/a", "https://***@host/a"),
        ("https://me:p/a?ss@host/a", "https://***@host/a"),
        ("('https://me:pw@host/x')", "('https://***@host/x')"),
        ('{"a": "https://me:pw@host/?key=v"}', '{"a": "https://***@host/?key=***"}'),
        ("s3://bucket/a?X-Amz-Signature=1f&X-Amz-Credential=AK%2F1", "s3://bucket/a?X-Amz-Signature=***&X-Amz-Credential=***"),
        ("https://h/a?revision=main&api-version=2&sv=1&sig=q%3D", "https://h/a?revision=main&api-version=2&sv=***&sig=***"),
        ("zip://*.parquet::https://me:pw@h/x.zip?key=1", "zip://*.parquet::https://***@h/x.zip?key=***"),
        ("sftp://me:pw@h/x", "sftp://***@h/x"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        ("Authorization: Bearer sk-12345", "Authorization: Bearer ***"),
        ("https:\\/\\/me:pw@host\\/x", "https:\\/\\/***@host\\/x"),
    ],
)  # fmt: skip
def test_what_is_hidden(text, shown):
    assert masked(text) == shown and masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "abfs://container@account.dfs.core.windows.net/a", "sftp://me@host/a", "hf://datasets/a/b@main/x.parquet",
        "s3://bucket/part-?.parquet", "s3://bucket/year=2024/x", "http://127.0.0.1:8000/v1", "/home/a@b/c?x=1", "a:b@c",
        "file:///a@b/c", "http://host:8000/a@b", "C:\\data\\x", "", "bearer of news", "mailto:me@host",
    ],
)  # fmt: skip
def test_what_stays(text):
    assert masked(text) == text


def test_what_was_told_is_hidden_wherever_it_stands():
    keep_secrets_of("https://me:pass%20word@host/x?key=abcdefg&revision=branch-1&v=12")
    assert masked("pass word, pass%20word, abcdefg, branch-1, 12") == "***, ***, ***, branch-1, 12"
    keep_secret("line1-of-a-key")
    assert str(UserError("no line1-of-a-key here")) == "no *** here"
    assert masked_tree({"a": ["https://u:p@h", 1, None], "b": ("x",)}) == {"a": ["https://***@h", 1, None], "b": ("x",)}


def test_what_tells_addresses_apart_has_no_secret():
    one, other = (
        without_secrets(f"https://me:{k}@h/a?deployment={d}&api-key={k}") for k, d in (("k1", "x"), ("k2", "x"))
    )
    assert one == other == "https://h/a?deployment=x&api-key"
    assert without_secrets("https://h/a?deployment=y") != without_secrets("https://h/a?deployment=x")


def test_logs_are_masked():
    before = logging.getLogRecordFactory()
    try:
        masking.mask_logs()
        out = io.StringIO()
        log = logging.getLogger("some.library")
        log.addHandler(handler := logging.StreamHandler(out))
        log.warning("GET %s failed", "https://me:pw@host/")
        log.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before)
    assert out.getvalue() == "GET https://***@host/ failed\n"


@pytest.fixture
def served(tmp_path):
    """Pairs in fsspec's memory, under the same name for both keys; a recipe that reads them."""
    content = Path(tiny_world.save_pairs(tmp_path / "pairs.parquet")).read_bytes()
    for secrets in (SECRETS, OTHERS):
        with fsspec.open(PLACE.format(**secrets), "wb") as file:
            file.write(content)
    save_recipe(tmp_path, data={"source": PLACE.format(**SECRETS)}, train={"steps": 2, "checkpoint_every": 1})
    yield tmp_path
    for secrets in (SECRETS, OTHERS):
        fsspec.filesystem("memory").rm(PLACE.format(**secrets).removeprefix("memory:/"))


def leaks(folder, said):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    found = [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]
    return found + [secret for secret in SECRETS.values() if secret in said]


def test_no_file_and_no_word_of_a_run_has_the_key_and_the_key_may_change(served, capsys, caplog):
    out = train_in(served, "run")
    said = "".join(capsys.readouterr()) + caplog.text
    assert leaks(out, said) == []
    shown = PLACE.format(password="x", token="y").replace("reader:x", "***").replace("=y", "=***")
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["source"] == shown
    assert json.loads((out / "manifest.json").read_text())["data"]["source"] == shown
    train_in(served, "run", f"--data.source={PLACE.format(**OTHERS)}", "--resume", "--train.keep_checkpoints=2")
    with pytest.raises(UserError, match=r"data\.source: memory://\*\*\*@elsewhere/pairs") as refused:
        other = PLACE.format(**SECRETS).replace("@host", "@elsewhere")
        train_in(served, "run", f"--data.source={other}", "--resume")
    assert leaks(out, str(refused.value) + "".join(capsys.readouterr())) == []


def test_other_commands_show_no_key_either(served, monkeypatch, capsys):
    source = PLACE.format(**SECRETS)
    words = ["validate", "--source", source, "--json", str(served / "found.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        validate_command.main()
    words = ["relabel", "--source", source, "--judge", "clip:inpo_fast/pocket/assets/clip"]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(served / "l.parquet")])
    relabel_command.main()
    (served / "tiny.yaml").unlink()  # in which the user wrote it
    assert leaks(served, "".join(capsys.readouterr())) == []
    with pytest.raises(UserError) as refused:
        monkeypatch.setattr(sys, "argv", ["validate", "--source", source.replace("pairs", "nothing")])
        validate_command.main()
    assert not any(secret in str(refused.value) for secret in SECRETS.values())


def test_what_nobody_foresaw_is_kept_without_secrets(tmp_path, monkeypatch):
    """The file with the traceback has the command in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = "https://me:hunter2hunter2@host/p.parquet?token=4711-secret"
    monkeypatch.setattr(sys, "argv", ["train", f"--data.source={source}"])
    said = unforeseen.line("train", RuntimeError(f"no answer of {source}"))
    (kept,) = tmp_path.iterdir()
    assert "hunter2" not in kept.read_text() and "https://***@host/p.parquet?token=***" in kept.read_text()
    assert "hunter2" not in str(UserError(said))
