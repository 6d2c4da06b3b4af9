"""What is built from the tree has all of the tree, and runs where there is nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"


def tree() -> list[Path]:
    """The project's files, relative: those that git has or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are the project's")
    names = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    return [name for name in names if os.path.lexists(ROOT / name)]


def installed(name: Path) -> str:
    """Where a file of the packages lies once installed."""
    return name.as_posix().replace("kernels/", "inpo_kernels/", 1) if name.parts[0] == "kernels" else name.as_posix()


def build(what: str, source: Path, folder: Path) -> Path:
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, what, folder], cwd=source, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    (made,) = folder.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy: a build leaves its files beside what it reads, and would take old ones for new."""
    folder = tmp_path_factory.mktemp("source")
    for name in tree():
        (folder / name.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel") / "made")


def differences(wheel: Path) -> list[str]:
    ours = {installed(name): (ROOT / name).read_bytes() for name in tree() if name.parts[0] in ("inpo_fast", "kernels")}
    assert len(ours) > 100 and "inpo_fast/configs/sd15.yaml" in ours and "inpo_kernels/errors.py" in ours
    made = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    return sorted(name for name in ours.keys() | made.keys() if ours.get(name) != made.get(name))


def test_the_wheel_has_all_of_the_packages_and_nothing_else(wheel):
    assert differences(wheel) == []
    assert [name for name in contents(wheel) if name.endswith("licenses/LICENSE")]


def test_a_wheel_made_from_the_source_archive_is_the_same(source, wheel, tmp_path):
    archive = build("build_sdist", source, tmp_path / "archive")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert differences(build("build_wheel", unpacked, tmp_path / "again")) == []
    for name in ("constraints.txt", "constraints-oldest.txt", "LICENSE", "README.md"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.slow
def test_an_installed_wheel_trains_the_pocket_from_any_folder(wheel, tmp_path):
    """Also by a recipe's name; what it leaves in config.yaml is a run that another command can read."""
    place, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run(pip, check=True)
    env = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    where = "import inpo_fast, inpo_kernels.errors as k; print(inpo_fast.__file__, k.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=work, env=env, capture_output=True, text=True)
    assert found.stdout.split() == [str(place / "inpo_fast/__init__.py"), str(place / "inpo_kernels/errors.py")]
    small = ["--train.steps=1", "--train.pairs_per_step=4", "--train.micro_batch=4", "--inversion.steps=2"]
    small += ["--evaluate.prompts=null", "--evaluate.seen_prompts=null"]
    for recipe in ("configs/pocket.yaml", "pocket"):
        train = [sys.executable, "-m", "inpo_fast.train", "--config", recipe, *small, f"--output=runs/{recipe[:7]}"]
        done = subprocess.run(train, cwd=work, env=env, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        assert (work / "runs" / recipe[:7] / "model" / "unet").is_dir()
    words = ["--config=runs/pocket/config.yaml", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "inpo_fast.train", *words], cwd=work, env=env, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
