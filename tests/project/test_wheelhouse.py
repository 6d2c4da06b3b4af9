"""wheelhouse.py and bench/gpu_machine.py: what another machine lacks, and no folder that looks complete and is not.

The whole way is gone with a project of a few tiny packages and an index on this disk.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from index_on_this_machine import served

import wheelhouse

ROOT = Path(__file__).resolve().parents[2]
if not shutil.which("uv") and not (Path(sys.executable).parent / "uv").exists():
    pytest.skip("no uv", allow_module_level=True)
HERE = "{}.{}".format(*sys.version_info)


def refusal(make) -> str:
    with pytest.raises(wheelhouse.UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what that machine has


def freeze(folder: Path, text: str) -> str:
    (folder / "freeze.txt").write_text(text, encoding="utf-8-sig")  # as some shells write it
    return str(folder / "freeze.txt")


def test_packages_of_another_machine_are_read_in_all_forms(tmp_path):
    text = """# Editable install with no version control (Mine==1.0)
-e /home/me/mine
Torch==2.11.0+cu130
huggingface_hub==1.33.0
numpy @ file:///build/dist/numpy-2.3.5%2Bx-cp312-cp312-linux_x86_64.whl#sha256=0
inpo-fast==0.1.0

gpg==1.16.0-unknown
python-debian===0.1.43ubuntu1
ruamel.yaml==0.18
"""
    assert wheelhouse.read_freeze(freeze(tmp_path, text)) == {
        "torch": "2.11.0+cu130",
        "huggingface-hub": "1.33.0",
        "ruamel-yaml": "0.18",
        "mine": "1.0",
        "numpy": "2.3.5+x",
    }


def test_a_list_that_says_too_little_is_refused(tmp_path):
    condas = freeze(tmp_path, "numpy @ file:///croot/numpy_1/work\nscipy @ file:///croot/scipy_1/work\nidna==3\n")
    said = refusal(lambda: wheelhouse.read_freeze(condas))
    assert "places instead of versions (numpy and 1 more); make it there with: python3 -m pip list" in said
    assert "no line NAME==VERSION" in refusal(lambda: wheelhouse.read_freeze(freeze(tmp_path, "Package Version\n")))
    assert "cannot be read (No such file" in refusal(lambda: wheelhouse.read_freeze(str(tmp_path / "nothing")))


def test_the_gpu_machine_of_the_rehearsal_is_one():
    has = wheelhouse.read_freeze(str(ROOT / "bench" / "gpu-machine.txt"))
    assert (has["torch"], has["triton"], has["huggingface-hub"]) == ("2.11.0", "3.6.0", "1.33.0")
    assert not has.keys() & {"diffusers", "jsonargparse"}


@pytest.mark.parametrize("python", ["", "3.10", "3", "3.12.1", "python3.12"])
def test_its_python_must_be_named(python):
    assert "say which Python that machine has" in refusal(lambda: wheelhouse.Target(python, "x86_64", {}))


def test_our_own_wheel_has_another_version_for_other_sources(tmp_path, monkeypatch):
    """pip leaves a package alone that is there in the same version."""
    monkeypatch.setenv("UV_NO_BUILD_ISOLATION", "1")  # with this environment's setuptools
    project = tmp_path / "project"
    (project / "tiny").mkdir(parents=True)
    (project / "tiny" / "__init__.py").touch()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tiny"\nversion = "0"\n[tool.setuptools]\npackages = ["tiny"]\n'
    )
    monkeypatch.setattr(wheelhouse, "ROOT", project)
    uv = wheelhouse.Target("3.12", "x86_64", {}).uv
    made = []
    for name, text in (("a", ""), ("b", ""), ("c", "changed = True\n")):
        (tmp_path / name).mkdir()
        (project / "tiny" / "__init__.py").write_text(text)
        made.append(wheelhouse.build(uv, tmp_path / name))
    versions, hashes = [wheel.version for wheel in made], [wheel.sha256 for wheel in made]
    assert all(re.fullmatch(r"0\+s[0-9a-f]{10}", version) for version in versions), versions
    assert versions[0] == versions[1] != versions[2] and hashes[0] == hashes[1] != hashes[2]
    assert not (project / "build").exists()


# the whole way

BACKEND = """
import configparser, os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    own = configparser.ConfigParser()
    own.read("setup.cfg")
    version = "0" + own["egg_info"]["tag_build"]
    info = f"tiny-{version}.dist-info/"
    name = f"tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as file:
        for path, text in (
            ("tiny.py", ""),
            (info + "METADATA", f"Metadata-Version: 2.1\\nName: tiny\\nVersion: {version}\\n"),
            (info + "WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n"),
            (info + "RECORD", ""),
        ):
            file.writestr(zipfile.ZipInfo(path), text)
    return name
"""
PROJECT = """[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tiny"
version = "0"
requires-python = ">=3.11"
dependencies = ["torch>=2", "triton>=3", "tool>=1.5,<3"]
[project.optional-dependencies]
bench = ["tester"]
"""
INDEX = {  # package: version: what it needs
    "torch": {"1.9": [], "2.0": ["triton==3.0", "nvidia-blas==13"], "2.1": ["triton==3.1", "nvidia-blas==13"]},
    "triton": {"3.0": [], "3.1": []},
    "nvidia-blas": {"13": []},
    "tool": {"1.0": [], "1.6": ["helper>=2"], "1.7": ["helper>=2"]},
    "helper": {"1.0": [], "2.0": [], "2.1": [], "2.2": []},
    "tester": {"9.0": []},
}
CONSTRAINTS = "torch==2.1\ntriton==3.1\nnvidia-blas==13\ntool==1.6\nhelper==2.1\ntester==9.0\n"
MACHINE = "torch==2.0+cu130\ntriton==3.0\nhelper==2.0\nother==5\n"


def publish(index: Path, name: str, version: str, needs: list[str]) -> None:
    folder, stem = index / name, f"{name.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {x}\n" for x in needs
    )
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name.replace('-', '_')}.py", f"__version__ = '{version}'\n")
        file.writestr(f"{stem}.dist-info/METADATA", head)
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{stem}.dist-info/RECORD", "")
    links = "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "a project"
    for name in ("wheelhouse.py", "install.py", ".ci/resolve.py", "bench/gpu_machine.py", "Makefile"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name, text in (("backend.py", BACKEND), ("pyproject.toml", PROJECT), ("constraints.txt", CONSTRAINTS)):
        (folder / name).write_text(text)
    for name, versions in INDEX.items():
        for version, needs in versions.items():
            publish(tmp_path / "index", name, version, needs)
    return folder


def run(project: Path, *words: str, **more: str) -> SimpleNamespace:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_", "MAKE", "MFLAGS"))}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (project.parent / "index").as_uri()}
    own["UV_CACHE_DIR"] = str(project.parent / "cache")
    done = subprocess.run(words, cwd=project, env=kept | own | more, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    return SimpleNamespace(status=done.returncode, said=said, last=(done.stderr.strip().splitlines() or [""])[0])


def make(project: Path, *words: str, **more: str) -> SimpleNamespace:
    return run(project, "make", f"PYTHON={sys.executable}", *words, **more)


def wheels(project: Path, folder: str = "build/wheelhouse") -> list[str]:
    """What the folder has, by its list; each of it is a wheel there, and nothing else is."""
    place = project / folder
    found = re.findall(r"^(\S+)==(\S+) --hash", (place / "requirements.txt").read_text(), re.MULTILINE)
    files = {path.name.split("-py3")[0].replace("_", "-") for path in place.glob("*.whl")}
    assert files == {f"{name}-{version}" for name, version in found}
    assert len([*place.iterdir()]) == len(found) + 1 and not place.with_name(place.name + ".part").exists()
    return sorted(f"{name} {version}" for name, version in found if name != "tiny")


def test_what_is_there_stays_and_what_is_missing_has_the_versions_of_constraints(project):
    """From an index over HTTP, as most are; what lies on this disk is copied."""
    freeze(project, MACHINE)
    with served(project.parent / "index") as address:
        done = make(project, "wheelhouse", f"FOR={HERE}", "HAS=freeze.txt", PIP_INDEX_URL=address, NO_PROXY="127.0.0.1")
    assert done.status == 0, done.said
    assert wheels(project) == ["tester 9.0", "tool 1.6"]  # helper 2.0 is there; no library of torch's
    assert "torch 2.0+cu130 stays" in done.said and "That machine has 4 packages" in done.said
    assert "3 wheels, 0.0 MB; 0.0 MB to download" in done.said
    command = done.said.split("and there, in it:\n")[1].splitlines()[0].split()
    assert command[:4] == ["python3", "-m", "pip", "install"] and "--no-index" in command
    command = [sys.executable, *command[1:], "--target", "site", "--quiet"]
    assert run(project, *command, PIP_INDEX_URL="http://127.0.0.1:9").status == 0
    assert {"tool.py", "tester.py", "tiny.py"} <= {path.name for path in (project / "site").iterdir()}


def test_what_does_not_fit_there_is_replaced_and_what_no_index_has_is_left(project):
    freeze(project, "torch==2.0\ntriton==3.0\ntool==1.0\nhelper==2.9\ntester==9.0\n")
    done = make(project, "wheelhouse", f"FOR={HERE}", "HAS=freeze.txt")
    assert done.status == 0 and wheels(project) == ["tool 1.6"], done.said
    assert "tool 1.0 there does not fit what the others need: 1.6 takes its place" in done.said
    assert "helper 2.9 stays: no index has this version" in done.said
    freeze(project, "torch==2.0\ntriton==3.0\ntool==1.7\nhelper==1.0\n")  # too old for what is there, not for us
    done = make(project, "wheelhouse", f"FOR={HERE}", "HAS=freeze.txt", "EXTRAS=")
    assert done.status == 0 and wheels(project) == ["helper 2.1"], done.said


def test_a_torch_without_triton_gets_its_own(project):
    freeze(project, MACHINE.replace("triton==3.0\n", ""))
    done = make(project, "wheelhouse", f"FOR={HERE}", "HAS=freeze.txt")
    assert done.status == 0 and wheels(project) == ["tester 9.0", "tool 1.6", "triton 3.0"], done.said


def test_a_machine_with_nothing_gets_the_constraints(project):
    done = make(project, "wheelhouse", f"FOR={HERE}", "EXTRAS=")
    assert done.status == 0, done.said
    assert wheels(project) == ["helper 2.1", "nvidia-blas 13", "tool 1.6", "torch 2.1", "triton 3.1"]


def test_a_torch_that_is_too_old_is_one_line(project):
    freeze(project, MACHINE.replace("2.0+cu130", "1.9"))
    done = make(project, "wheelhouse", f"FOR={HERE}", "HAS=freeze.txt")
    assert done.status and not (project / "build" / "wheelhouse").exists()
    assert done.last.startswith(f"wheelhouse: there is no set of versions for Python {HERE} on x86_64"), done.said
    assert "torch>=2 and torch==1.9" in done.last and "+there" not in done.last


def test_other_mistakes_are_one_line(project):
    said = {
        ("FOR=",): "wheelhouse: FOR=: say which Python",
        (f"FOR={HERE}", "EXTRAS=none"): "wheelhouse: Requested extra not found: none",
        (f"FOR={HERE}", "PLATFORM=vax"): "wheelhouse: invalid value 'vax-manylinux_2_28'",
        (f"FOR={HERE}", "HAS=nothing.txt"): "wheelhouse: HAS=nothing.txt cannot be read",
    }
    for words, line in said.items():
        done = make(project, "wheelhouse", *words)
        assert done.status and done.last.startswith(line), done.said
    retries = {"UV_HTTP_RETRIES": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    done = make(project, "wheelhouse", f"FOR={HERE}", **retries)
    assert done.status and done.last.startswith("wheelhouse: the package index does not answer"), done.said
    assert not (project / "build").exists()


def test_a_broken_download_looks_broken_and_the_same_command_goes_on(project):
    freeze(project, MACHINE)
    words = ("wheelhouse", f"FOR={HERE}", "HAS=freeze.txt")
    assert make(project, *words).status == 0  # an older one, complete
    lock = "import wheelhouse as w, sys; w.Wheel.come = lambda *_: sys.exit(9); w.main()"
    freeze(project, MACHINE.replace("helper==2.0\n", ""))
    asked = ("--for", HERE, "--has", "freeze.txt", "--extras", "bench")
    assert run(project, sys.executable, "-c", lock, *asked).status == 9
    part = project / "build" / "wheelhouse.part"
    assert not (project / "build" / "wheelhouse").exists() and not (part / "requirements.txt").exists()
    (part / "tester-9.0-py3-none-any.whl").write_bytes(b"half of it")  # as a copy that was broken off
    before = (part / "tool-1.6-py3-none-any.whl").stat().st_ino
    assert make(project, *words).status == 0
    assert wheels(project) == ["helper 2.1", "tester 9.0", "tool 1.6"]
    tool, tester = (project / "build" / "wheelhouse" / f"{x}-py3-none-any.whl" for x in ("tool-1.6", "tester-9.0"))
    assert tool.stat().st_ino == before and zipfile.is_zipfile(tester)
    freeze(project, MACHINE + "tool==1.6\n")
    assert make(project, *words).status == 0 and wheels(project) == ["tester 9.0"]  # and what is too much is gone


def test_without_a_network_a_complete_one_stays(project):
    freeze(project, MACHINE)
    words = ("wheelhouse", f"FOR={HERE}", "HAS=freeze.txt")
    assert make(project, *words).status == 0
    index = project.parent / "index"
    index.rename(index.with_name("away"))
    assert make(project, *words, UV_CACHE_DIR=str(project.parent / "fresh")).status
    assert wheels(project) == ["tester 9.0", "tool 1.6"]


@pytest.mark.parametrize(("abi", "place"), [("cp312", "an index"), ("abi3", "an index"), ("cp312", "this disk")])
def test_wheels_for_another_machine_come_too(tmp_path, abi, place, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    publish(tmp_path, "fast", "1", [])
    name = f"fast-1-cp312-{abi}-manylinux_2_17_aarch64.manylinux2014_aarch64.whl"
    file = (tmp_path / "fast" / "fast-1-py3-none-any.whl").rename(tmp_path / name)
    with served(tmp_path) as address:
        entry = {"path": str(file)} if place == "this disk" else {"url": f"{address}/{name}"}
        entry["hashes"] = {"sha256": wheelhouse.digest(file)}
        wheel = wheelhouse.Wheel("fast", "1", entry, "3.13" if abi == "abi3" else "3.12")
        (tmp_path / "new").mkdir()
        wheel.come(tmp_path / "new")
        assert [path.name for path in (tmp_path / "new").iterdir()] == [name]
        if abi == "abi3":
            return  # what is damaged has the same hash on any Python
        wheel.sha256 = "0" * 64
        (tmp_path / "new" / name).unlink()
        assert "what came is damaged" in refusal(lambda: wheel.come(tmp_path / "new"))
        assert not (tmp_path / "new" / name).exists()


# the rehearsal

REHEARSED = (
    "import sys, torch, triton, tool, tester, helper; print([m.__version__ for m in (torch, triton, tool, helper)])"
)


def test_the_rehearsal_has_that_machines_packages_and_the_wheelhouse(project):
    """torch comes from another index, as TORCH=cpu asks for: what its CUDA build needs stays away."""
    freeze(project, MACHINE)
    (project / "bench" / "gpu.py").write_text(REHEARSED)
    publish(project.parent / "small", "torch", "2.0", ["triton==3.0"])
    words = ("gpu-rehearse", f"FOR={HERE}", "HAS=freeze.txt", f"TORCH={(project.parent / 'small').as_uri()}")
    done = make(project, *words)
    assert done.status == 0, done.said
    assert "['2.0', '3.0', '1.6', '2.0']" in done.said and "2 packages of freeze.txt" in done.said
    assert wheels(project, "build/gpu-machine/wheelhouse") == ["tester 9.0", "tool 1.6"]
    site = next((project / "build" / "gpu-machine").glob("lib/python*/site-packages"))
    assert not (site / "nvidia_blas.py").exists() and not (site / "tiny.py").exists()
    assert "Setting up" not in make(project, *words).said
    freeze(project, MACHINE.replace("helper==2.0", "helper==2.2"))
    done = make(project, *words)
    assert "Setting up" in done.said and "['2.0', '3.0', '1.6', '2.2']" in done.said
    done = make(project, *words[:3])  # torch as the index has it, with its CUDA libraries
    assert "4 packages of freeze.txt" in done.said and (site / "nvidia_blas.py").exists()


def test_the_rehearsal_without_that_python_is_one_line(project):
    freeze(project, MACHINE)
    done = make(project, "gpu-rehearse", "FOR=3.99", "HAS=freeze.txt")
    assert done.status and done.last.startswith("gpu-rehearse: there is no Python 3.99, which that machine has"), (
        done.said
    )
    freeze(project, MACHINE.replace("helper==2.0", "helper==2.9"))
    done = make(project, "gpu-rehearse", f"FOR={HERE}", "HAS=freeze.txt")
    assert done.last.startswith("gpu-rehearse: no index has helper 2.9 of HAS=freeze.txt for Python"), done.said
    assert not (project / "build").exists()
