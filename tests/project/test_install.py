"""install.py and `make setup`: one line for what goes wrong, and a .venv that is not finished is never taken for ready.

The whole way is gone with a project of two tiny packages and an index on this disk.
"""

import ast
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("install", ROOT / "install.py")
install = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install)


def refusal(make) -> str:
    with pytest.raises(install.UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what is wrong with this machine


def test_an_old_python_can_read_it():
    ast.parse((ROOT / "install.py").read_text(), feature_version=(3, 6))


def test_an_old_python_is_told_which_one_to_take(monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert "is Python 3.9, and inpo-fast needs 3.11 or newer; name one: make PYTHON=python3.12" in refusal(
        lambda: install.check_python((3, 9, 18, "final", 0), uv=None)
    )
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/x" if name == "python3.11" else None)
    assert "python3.11 is here: make PYTHON=python3.11" in refusal(
        lambda: install.check_python((3, 6, 15, "final", 0), uv=None)
    )
    install.check_python((3, 6, 15, "final", 0), uv="/usr/bin/uv")  # uv takes another Python
    install.check_python(sys.version_info, uv=None)


def test_debians_python_without_venv_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name)
    said = refusal(lambda: install.check_python((3, 12, 1, "final", 0), uv=None))
    assert "has no module ensurepip" in said and "apt install python3.12-venv" in said


@pytest.mark.parametrize(
    ("installer", "sources", "taken"),
    [("", [], "uv"), ("", ["find-links"], None), ("uv", ["x"], "uv"), ("pip", [], None)],
)
def test_uv_is_taken_where_it_finds_the_same_as_pip(installer, sources, taken, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name: name)
    assert install.choose_uv(installer, sources) == taken
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    if installer != "uv":
        assert install.choose_uv(installer, sources) is None
    else:
        assert "there is no uv" in refusal(lambda: install.choose_uv(installer, sources))


def test_places_of_packages_are_read_from_pips_configuration(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert install.own_sources() == []
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/")
    assert install.own_sources() == ["index-url"]
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text("[global]\ntimeout = 60\nextra-index-url = https://index.example/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert install.own_sources() == ["extra-index-url", "find-links"]


CLASH = "Cannot install torch==2.13.0 because these package versions have conflicting dependencies"
FAILURES = {
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device": "the disk is full",
    "error: Failed to install: x.whl\n  Caused by: No space left on device (os error 28)": "the disk is full",
    "error: Failed to fetch: `https://index.example/simple/torch/`\n  Caused by: dns error": "index does not answer",
    "ERROR: Could not find a version that satisfies the requirement setuptools>=77 (from versions: none)\n"
    "ERROR: No matching distribution found for setuptools>=77": "index does not answer",
    "ERROR: Could not find a version that satisfies the requirement torch==9 (from versions: 2.12.0, 2.13.0)\n"
    "ERROR: No matching distribution found for torch==9": "(No matching distribution found for torch==9); it is held",
    f"ERROR: {CLASH}": "this Python and machine (Cannot install torch==2.13.0 because",
    f"WARNING: Retrying, Connection broken\nERROR: {CLASH}\n  torch 2.13.0 depends on triton==3.7.1": "does not fit",
    "error: failed to create directory `/r/.venv/x`: Read-only file system (os error 30)": "cannot be written",
    "ERROR: something new": None,
}


@pytest.mark.parametrize("said", FAILURES)
def test_a_known_failure_is_one_line(said):
    line = install.diagnose(said)
    assert line is None if FAILURES[said] is None else FAILURES[said] in line and "\n" not in line


# the whole way

BACKEND = """
import os, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    if os.environ.get("SLOW"):
        open(os.environ["SLOW"], "w").close()
        time.sleep(60)
    name, info = "tiny-0-py3-none-any.whl", "tiny-0.dist-info/"
    head = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 0\\nProvides-Extra: dev\\nRequires-Dist: triton\\n"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as file:
        file.writestr(info + "METADATA", head)
        file.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        file.writestr(info + "RECORD", "")
    return name
"""


def publish(index: Path, name: str, version: str) -> None:
    """Into an index as pip and uv ask for it, with one file of each package."""
    wheel, info = index / name / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info/"
    wheel.parent.mkdir(parents=True)
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.as_uri()}">{wheel.name}</a>')
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", f"__version__ = '{version}'\n")
        file.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(info + "RECORD", "")


@pytest.fixture
def project(tmp_path):
    if not shutil.which("make"):
        pytest.skip("no make")
    folder = tmp_path / "a project"
    folder.mkdir()
    for name in ("install.py", "Makefile"):
        shutil.copy(ROOT / name, folder)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "setup.py").touch()
    (folder / "constraints.txt").write_text("torch==2.0\ntriton==3.0\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tiny"\nversion = "0"\n[project.optional-dependencies]\ndev = []\n'
    )
    publish(tmp_path / "index", "torch", "2.0")
    publish(tmp_path / "index", "triton", "3.0")
    return folder


def environment(project: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE", "MFLAGS"))}
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (project.parent / "index").as_uri()}
    return kept | own | more


def make(project: Path, *words: str, **more: str) -> tuple[int, str, str]:
    """(exit status, what was said, the last line of it before make's own)"""
    command = ["make", f"PYTHON={sys.executable}", *words]
    env = environment(project, **more)
    done = subprocess.run(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("make")]
    return done.returncode, done.stdout, last[-1] if last else ""


READY = "Ready: torch 2.0 triton 3.0"


def test_without_a_network_nothing_is_ready_and_the_next_call_goes_on(project):
    status, said, last = make(project, "setup", PIP_RETRIES="1", PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert status and last.startswith("setup: the package index does not answer"), said
    assert "About 3.0 GB to download and 5.3 GB in .venv" in said and "make setup TORCH=cpu" in said
    assert not (project / ".venv" / "ready").exists()
    assert "Traceback" not in said and said.count("setup: ") == 1 and "ERROR" not in said
    status, said, last = make(project, "setup")
    assert (status, last) == (0, READY), said
    status, said, _ = make(project, "setup")
    assert status == 0 and "Nothing to be done" in said
    # made by hand, or by a Makefile that left no note in it: it is filled up, and no other one takes its place
    for name in ("ready", "made"):
        (project / ".venv" / name).unlink()
    shutil.rmtree(next((project / ".venv").glob("lib/python*/site-packages/triton-3.0.dist-info")))  # pip has none now
    (project / ".venv" / "mine").touch()
    assert make(project, "setup")[2] == READY and (project / ".venv" / "mine").exists()
    assert "Nothing to be done" in make(project, "setup")[1]


def test_no_python_is_one_line(project):
    status, said, last = make(project, "setup", "PYTHON=no-such-python")
    assert status and last.startswith("setup: there is no no-such-python; install Python 3.11 or newer"), said


def test_what_is_no_environment_is_left_alone(project):
    (project / ".venv").mkdir()
    (project / ".venv" / "thesis.txt").write_text("mine")
    status, said, last = make(project, "setup")
    assert status and "is no virtual environment; move it away" in last, said
    assert (project / ".venv" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_killed_moved_or_changed_is_set_up_again(project, tmp_path):
    begun = tmp_path / "begun"
    env = environment(project, SLOW=str(begun))
    process = subprocess.Popen(
        ["make", f"PYTHON={sys.executable}", "setup"], cwd=project, env=env, start_new_session=True
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (project / ".venv" / "bin" / "python").exists() and not (project / ".venv" / "ready").exists()
    assert make(project, "setup")[2] == READY  # 1. killed

    publish(tmp_path / "other", "torch", "2.0+small")
    url = f"TORCH={(tmp_path / 'other').as_uri()}"
    assert make(project, "setup", url)[2] == "Ready: torch 2.0+small triton 3.0"  # 2. another torch
    assert "Nothing to be done" in make(project, "setup", url)[1]
    assert "Nothing to be done" in make(project, "setup")[1]
    (project / "constraints.txt").touch()
    assert make(project, "setup")[2] == "Ready: torch 2.0+small triton 3.0"  # it is remembered

    moved = project.with_name("elsewhere")
    project.rename(moved)
    assert make(moved, "setup")[2] == "Ready: torch 2.0+small triton 3.0"  # 3. moved: its scripts named the old place
    assert str(moved) in (moved / ".venv" / "bin" / "pip").read_text()

    (moved / ".venv" / "bin" / "python").unlink()  # 4. the system's Python was replaced
    assert make(moved, "setup", "TORCH=default")[2] == READY
