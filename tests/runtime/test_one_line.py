"""What a user is told: one line, no long values, and nothing lost of what nobody foresaw."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inpo_fast.runtime import errors
from inpo_fast.runtime.arguments import number, seed, whole
from inpo_fast.runtime.errors import UserError, command_line, one_line, shortened
from inpo_fast.runtime.outputs import check_file, check_folder

PROGRAM = """
import sys
from inpo_fast.runtime.errors import UserError, command_line, run_command
def main():
    parser = command_line("tried", "about")
    parser.add_argument("--place")
    own = parser.parse_args()
    {body}
run_command("tried", main)
"""


def ran(body: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM.format(body=body), *words]
    done = subprocess.run(command, capture_output=True, env={"PYTHONPATH": str(Path.cwd()), **environment})
    done.stderr = done.stderr.decode(errors="surrogateescape")
    return done


def test_a_short_value_is_quoted_whole_and_a_long_one_by_its_ends():
    assert shortened("x" * 200) == "x" * 200
    long = "begin" + "x" * 5000 + "end"
    said = shortened(long)
    assert len(said) == 200 and said.startswith("begin") and said.endswith("end") and "5,008 characters" in said


def test_a_message_keeps_its_beginning_and_its_remedy():
    value = "a b " * 3000
    said = str(UserError(f"data.source={value!r}: no such file; name another"))
    assert said.startswith("data.source='a b") and said.endswith(": no such file; name another") and len(said) < 300
    unquoted = str(UserError(f"data.source={value}: no such file; name another"))
    assert unquoted.startswith("data.source=a b") and unquoted.endswith("name another") and len(unquoted) <= errors.LINE
    assert len(str(UserError(f"x={'y' * 5000}: must be z"))) < 230


def test_what_a_library_said_at_length_is_quoted_shortly():
    with pytest.raises(UserError) as caught:
        try:
            raise RuntimeError("expected one of:\n * (Tensor start, int steps)\n" * 200)
        except RuntimeError as problem:
            raise UserError(f"models.base: x cannot be made ({problem}); take another") from problem
    said = str(caught.value)
    assert said.startswith("models.base: x cannot be made (expected") and said.endswith("); take another")
    assert len(said) < 260 and "\n" not in said


def test_a_message_is_one_line_whatever_a_library_said():
    assert one_line("first\n  second\r\n\tthird") == "first second third"
    assert one_line("\x1b[31mred\0") == r"\x1b[31mred\x00"
    assert one_line("a\udcff") == r"a\udcff"
    assert (
        one_line("words  two spaces apart, 'that isn't long' stay") == "words  two spaces apart, 'that isn't long' stay"
    )


def test_a_long_word_of_the_command_line_is_quoted_shortly():
    long = "some words of a path " * 50
    done = ran('raise UserError(f"--place {own.place}: no such file; name another")', "--place", long)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert len(done.stderr) < 300 and done.stderr.endswith(": no such file; name another\n")


def test_a_word_that_is_no_text_is_refused():
    done = ran("print(own.place)", "--place", b"\xff\xfe")
    assert done.returncode == 2 and "not text in UTF-8" in done.stderr and done.stderr.count("\n") == 1


def test_a_mistake_on_the_command_line_is_one_line():
    for words in (["--place"], ["--unknown"], ["--place=--"]):
        done = ran("pass", *words)
        assert done.returncode == 2 and done.stderr.startswith("tried: ") and done.stderr.count("\n") == 1, done.stderr


def test_what_nobody_foresaw_is_one_line_and_a_file(tmp_path):
    body = 'raise RuntimeError("first line\\nsecond line")'
    done = ran(body, "--place", "somewhere", TMPDIR=str(tmp_path))
    assert done.returncode == 70 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    (kept,) = tmp_path.glob("inpo-fast-*.txt")
    assert str(kept) in done.stderr and "RuntimeError: first line second line" in done.stderr
    text = kept.read_text()
    assert "Traceback (most recent call last)" in text and "command: tried --place somewhere" in text
    secret = ran(body, "--place", "https://me:hunter22@example.com/x", TMPDIR=str(tmp_path))
    (hidden,) = set(tmp_path.glob("inpo-fast-*.txt")) - {kept}
    assert "hunter22" not in hidden.read_text() + secret.stderr
    hidden.unlink()
    assert re.search(r"^torch \d", text, re.MULTILINE) and re.search(r"^python \d", text, re.MULTILINE)
    shown = ran(body, TMPDIR=str(tmp_path), INPO_FAST_TRACEBACK="1")
    assert "Traceback (most recent call last)" in shown.stderr and len(list(tmp_path.iterdir())) == 1
    nowhere = ran(body, TMPDIR=str(tmp_path / "kept"))  # falls back to another folder, or says how to see it
    assert nowhere.returncode == 70 and nowhere.stderr.count("\n") == 1


def test_what_the_system_refuses_is_named_by_its_option(tmp_path):
    done = ran("open(own.place)", "--place", str(tmp_path / "missing"))
    assert (done.returncode, done.stderr) == (2, f"tried: --place {tmp_path / 'missing'}: No such file or directory\n")
    done = ran('open(own.place + "/inside")', f"--place={tmp_path / 'missing'}")
    assert done.stderr == f"tried: --place {tmp_path / 'missing'}/inside: No such file or directory\n"
    done = ran("open(own.place)", "--place", "z" * 300)
    assert done.returncode == 2 and "File name too long" in done.stderr and len(done.stderr) < 300


@pytest.mark.parametrize("kind", [whole(), seed, number(above=0), number(least=0), number()])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "1" + "0" * 30, "text", "", "9" * 5000])
def test_numbers_of_options(kind, text):
    parser = command_line("tried", "about")
    parser.add_argument("--n", type=kind)
    with pytest.raises(UserError, match=r"argument --n: (.*must be a|is empty)"):
        parser.parse_args([f"--n={text}"])


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to(tmp_path / "absent")
    for check, path, told in [
        (check_file, tmp_path / "folder", "is a folder; name a file"),
        (check_file, Path(""), "is a folder; name a file"),
        (check_file, Path("/"), "is a folder; name a file"),
        (check_file, tmp_path / "file" / "inside" / "a.png", "cannot be written"),
        (check_folder, tmp_path / "file", "is no folder"),
        (check_folder, tmp_path / "gone", "gone is a link to .*absent, which leads nowhere"),
        (check_folder, tmp_path / "gone" / "run", "gone is a link to .*absent, which leads nowhere"),
        (check_file, tmp_path / "gone" / "a.png", "gone is a link to .*absent, which leads nowhere"),
        (check_folder, tmp_path / "file" / "inside", "cannot be written"),
        (check_folder, tmp_path / ("z" * 256), "File name too long"),
        (check_folder, Path("a/" * 3000), "File name too long"),
        (check_folder, Path("/proc/nothing"), "cannot be written"),
        (check_folder, Path("/"), "is the root of all folders"),
        (check_folder, Path("/tmp/.."), "is the root of all folders"),
        (check_file, tmp_path / "pipe", "is a device or a pipe"),
        (check_file, Path("/dev/null"), "is a device or a pipe"),
        (check_file, Path("s3://bucket/a.png"), "is an address"),
        (check_file, Path("http:/x/a.png"), "is an address"),
    ]:
        with pytest.raises(UserError, match=f"^--output .*{told}"):
            check("--output", path)
    with pytest.raises(UserError, match=r"must end with \.png"):
        check_file("--output", tmp_path / "pairs.parquet", (".png",))
    check_file("--output", tmp_path / "new" / "a.PNG", (".png",))
    check_folder("--output", tmp_path / "new" / "deeper")
    check_file("--output", tmp_path / "colon:ed" / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "gone", "pipe"]
