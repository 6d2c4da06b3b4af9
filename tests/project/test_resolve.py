""".ci/resolve.py: what it makes of uv's and pip's words, and that it tells a conflict from an index that is not there.
The words are those of uv 0.9 and 0.13 and of pip 23.2, shortened."""

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from index_on_this_machine import served

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("resolve", ROOT / ".ci" / "resolve.py")
resolve = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(resolve)

UV_13 = """error: No solution found when resolving dependencies
  cause: Because torch==2.13.0 depends on triton{python_full_version < '3.15' and sys_platform == 'linux'}==3.7.1 and
         triton{python_full_version < '3.15' and sys_platform == 'linux'}==3.9.0, we can conclude that
         torch==2.13.0 cannot be used.
         And because inpo-fast depends on torch==2.13.0, we can conclude that your requirements are unsatisfiable.
"""
UV_9 = """  \x1b[31m×\x1b[0m No solution found when resolving dependencies:
  ╰─▶ Because torch==2.13.0 depends on triton{python_full_version < '3.15' and
      sys_platform == 'linux'}==3.7.1 and triton{python_full_version < '3.15'
      and sys_platform == 'linux'}==3.9.0, we can conclude that torch==2.13.0
      cannot be used.
      And because inpo-fast depends on torch==2.13.0, we can conclude that
      your requirements are unsatisfiable.
"""
PIP = """INFO: pip is looking at multiple versions of torch. This could take a while.
ERROR: Cannot install torch==2.13.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    torch 2.13.0 depends on triton==3.7.1; platform_system == "Linux" and python_version < "3.15"
    fsspec[gcs] 2026.9.0 depends on fsspec 2026.9.0 (from https://index.example/fsspec-2026.9.0.whl (from https://i/f/))
    The user requested (constraint) triton==3.9.0

To fix this you could try to:
1. loosen the range of package versions you've specified

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/
"""
NO_NETWORK = {
    "uv 0.13": """warning: The requested Python version 3.12 is not available; 3.11.7 will be used instead.
error: Request failed after 3 retries in 4.5s
  cause: Failed to fetch: https://index.example/simple/numpy/
  cause: error sending request for url (https://index.example/simple/numpy/)
  cause: Connection refused (os error 111)
""",
    "uv 0.9": """error: Failed to fetch: `https://index.example/simple/diffusers/`
  Caused by: Request failed after 3 retries
  Caused by: error sending request for url (https://index.example/simple/diffusers/)
  Caused by: Connection refused (os error 111)
""",
    "pip": """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(<…>: Failed to establish
a new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch (from versions: none)
""",
}


@pytest.fixture
def constraints(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# versions\nTorch==2.13.0\ntriton==3.9.0\ntriton_windows==3.9.0\nnumpy==2.4.6\n")
    return path


@pytest.mark.parametrize("said", [UV_13, UV_9], ids=["0.13", "0.9"])
def test_a_conflict_in_uvs_words(said, constraints):
    assert resolve.explain(said, constraints) == (
        "conflict",
        "torch==2.13.0 depends on triton==3.7.1 and triton==3.9.0. And because inpo-fast depends on torch==2.13.0 "
        "[mine.txt has torch==2.13.0, triton==3.9.0]",
    )


def test_a_conflict_in_pips_words(constraints):
    assert resolve.explain(PIP, constraints) == (
        "conflict",
        "torch 2.13.0 depends on triton==3.7.1; fsspec[gcs] 2026.9.0 depends on fsspec 2026.9.0; The user requested "
        "(constraint) triton==3.9.0 [mine.txt has triton==3.9.0]",
    )


@pytest.mark.parametrize("said", NO_NETWORK.values(), ids=NO_NETWORK)
def test_an_index_that_does_not_answer_is_no_conflict(said, constraints):
    kind, line = resolve.explain(said, constraints)
    assert kind == "network" and "\n" not in line


def test_anything_else_is_said_as_it_is(constraints):
    said = "error: Couldn't parse requirement in `mine.txt` at position 370\n"
    assert resolve.explain(said, constraints) == ("other", said.strip())
    assert resolve.explain("", constraints) == ("other", "it said nothing")


def test_pins_are_read_under_one_name():
    text = "# x==1\nPre_Commit==4.7.0\nzope.interface==7  # why\ntorch==2.13.0 ; sys_platform == 'linux'\nnumpy>=2\n"
    assert resolve.pins(text) == {"pre-commit": "4.7.0", "zope-interface": "7", "torch": "2.13.0"}


def test_nothing_that_names_a_place_of_packages_is_passed_on():
    places = {
        "PIP_FIND_LINKS",
        "PIP_CONSTRAINT",
        "PIP_EXTRA_INDEX_URL",
        "PIP_INDEX_URL",
        "UV_FIND_LINKS",
        "UV_INDEX_URL",
    }
    environment = dict.fromkeys(places, "x") | {"PIP_CONFIG_FILE": "mine.conf", "PIP_CERT": "bundle", "HOME": "/h"}
    kept = resolve.clean(environment)
    assert not kept.keys() & places
    assert (kept["PIP_CONFIG_FILE"], kept["PIP_CERT"], kept["HOME"]) == (os.devnull, "bundle", "/h")


# against an index on this machine

uv = pytest.mark.skipif(not shutil.which("uv") and not (Path(sys.executable).parent / "uv").exists(), reason="no uv")
PROJECT = """[project]
name = "inpo-fast"
version = "0"
requires-python = ">=3.11"
dependencies = ["torch>=2.11"]
[project.optional-dependencies]
data = ["fsspec"]
"""


def publish(folder: Path, name: str, version: str, *needs: str) -> None:
    wheel = folder / "simple" / name / f"{name}-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True, exist_ok=True)
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}-{version}.dist-info/METADATA", head + "".join(f"Requires-Dist: {x}\n" for x in needs))
        file.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    links = "".join(f'<a href="{x.name}">{x.name}</a>' for x in wheel.parent.glob("*.whl"))
    (wheel.parent / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """torch 2.13.0 asks for one triton, as the published one does; s3fs stands for what an extra brings."""
    publish(tmp_path, "torch", "2.11.0", "triton==3.6.0")
    publish(tmp_path, "torch", "2.13.0", "triton==3.7.1")
    for version in ("3.6.0", "3.7.1", "3.9.0"):
        publish(tmp_path, "triton", version)
    publish(tmp_path, "fsspec", "2026.9.0")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with served(tmp_path) as address:
        yield f"{address}/simple"


def run(folder: Path, index: str, text: str, capsys, *words: str) -> tuple[int, list[str]]:
    (folder / "mine.txt").write_text(text)
    words = ["--constraints", str(folder / "mine.txt"), "--project", str(folder), "--index", index, *words]
    status = resolve.main(words)
    return status, capsys.readouterr().out.splitlines()


@uv
def test_every_combination_has_its_line(index, tmp_path, capsys):
    publish(tmp_path, "torch", "2.13.0", "triton==3.7.1", "older==1; python_version < '3.12'")
    publish(tmp_path, "older", "1")
    status, lines = run(tmp_path, index, "torch==2.13.0\ntriton==3.7.1\nfsspec==2026.9.0\nolder==1\n", capsys)
    assert status == 0
    pythons, extras = ("3.11", "3.12", "3.13"), ("all", "none", "data")
    assert [line.split(": ")[0] for line in lines] == [f"mine.txt, Python {p}, {x}" for p in pythons for x in extras]
    counts = [4, 3, 4, 3, 2, 3, 3, 2, 3]  # each Python asks for its own
    for line, n in zip(lines, counts, strict=True):
        assert line.endswith(f": resolves, {n} packages: torch 2.13.0 triton 3.7.1")


@uv
def test_the_wrong_triton_is_found_and_named(index, tmp_path, capsys, monkeypatch):
    """What stood there: a local wheel of torch that asks for no triton hid it."""
    publish(tmp_path / "local", "torch", "2.13.0+cpu")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "local" / "simple" / "torch"))
    text = "torch==2.13.0\ntriton==3.9.0\nfsspec==2026.9.0\n"
    status, lines = run(tmp_path, index, text, capsys, "--python", "3.12")
    assert status == 1 and len(lines) == 3
    for line in lines:
        assert "DOES NOT RESOLVE: " in line and " depends on triton==3.7.1 and triton==3.9.0" in line
        assert line.endswith("[mine.txt has torch==2.13.0, triton==3.9.0]")


@uv
def test_what_an_extra_brings_has_a_version_too(index, tmp_path, capsys):
    status, lines = run(tmp_path, index, "torch==2.13.0\ntriton==3.7.1\n", capsys, "--python", "3.12")
    assert status == 1
    assert lines[0].endswith("RESOLVES TO WHAT mine.txt HAS NO VERSION OF: fsspec==2026.9.0")
    assert "none: resolves" in lines[1]


@uv
def test_no_network_is_told_apart(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    status, lines = run(tmp_path, "http://127.0.0.1:9/simple", "torch==2.13.0\n", capsys)
    assert status == 3 and len(lines) == 1
    assert "THE INDEX DOES NOT ANSWER" in lines[0] and "127.0.0.1" in lines[0]
