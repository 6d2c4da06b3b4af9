"""Makes build/gpu-machine: a Python environment like a GPU machine's. What `make gpu-rehearse` runs first.

    python3 -m bench.gpu_machine [--for 3.12] [--has bench/gpu-machine.txt] [--extras bench] [--torch cpu]

What --has lists and inpo-fast needs is installed in the versions listed; the rest as that machine would get it: from a
wheelhouse (wheelhouse.py), with no index. Our own package is left out, as `make gpu` runs from the checkout. Made once,
and anew when the list, pyproject.toml, constraints.txt or the options change.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import install
import wheelhouse
from install import UserError
from wheelhouse import ROOT, Target, lines, megabytes, public, read_freeze

VENV = ROOT / "build" / "gpu-machine"
READY = VENV / "ready"  # written last
CUDA = re.compile(r"(nvidia|cuda)-(?!ml-py$)")  # what torch's CUDA build brings
UNPACKED = 3  # at most so many bytes on the disk for one downloaded, uv's cache included


def main():
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu_machine", description=__doc__.splitlines()[0])
    parser.add_argument("--for", dest="python", default="3.12", help="Python of that machine")
    parser.add_argument("--has", default="bench/gpu-machine.txt", help="`python3 -m pip list --format=freeze` there")
    parser.add_argument("--extras", default="bench", help="of pyproject.toml, separated by commas")
    parser.add_argument("--torch", default="", help="cpu: PyTorch's build without CUDA, or the URL of an index")
    asked = parser.parse_args()
    wheelhouse.guarded("gpu-rehearse", lambda: make(asked))


def make(asked):
    state = state_of(asked)
    if READY.exists() and READY.read_text() == state:
        return
    target = Target(asked.python, platform.machine(), read_freeze(asked.has))
    python = find_python(target.uv, asked.python)
    found, held = target.resolved(wheelhouse.names(asked.extras))
    lacking = target.lacking(found, held)
    if unknown := [f"{name} {target.has[name]}" for name in held if name not in wheelhouse.HELD]:
        raise UserError(
            f"no index has {', '.join(unknown)} of HAS={asked.has} for Python {asked.python}; name other versions in a "
            "copy of it"
        )
    there = with_needs(target, {name: public(target.has[name]) for name in found if name not in lacking})
    torch = there["torch"]
    if asked.torch:
        there = {name: version for name, version in there.items() if not (name == "torch" or CUDA.match(name))}
    size = megabytes(target.wheels(there))
    print(f"Setting up {VENV.relative_to(ROOT)}: Python {asked.python}, {len(there)} packages of {asked.has}", end=" ")
    print(f"({size:.0f} MB to download, less what uv's cache has) and the wheelhouse for it.", flush=True)
    if size > 1000:
        print("Most of it is PyTorch for NVIDIA GPUs; make gpu-rehearse TORCH=cpu goes without.", flush=True)
    wheelhouse.tell(target.has, lacking, [])
    free = shutil.disk_usage(ROOT).free / 1e6
    if free < UNPACKED * size:
        raise UserError(f"up to {UNPACKED * size:.0f} MB are needed for it and {free:.0f} are free; make room")
    shutil.rmtree(VENV, ignore_errors=True)
    # this Python's pip installs there: to give it one of its own takes seconds
    done = subprocess.run([python, "-m", "venv", "--without-pip", VENV], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{python} -m venv fails; on Debian and Ubuntu: apt install python{asked.python}-venv")
    install_there = ("pip", "install", "--quiet", "--no-deps", "--python", VENV / "bin" / "python")
    if asked.torch:
        url, label = (asked.torch, "") if "/" in asked.torch else (install.TORCH_INDEX + asked.torch, "+" + asked.torch)
        uv(target, *install_there, "--default-index", url, f"torch=={torch}{label}")
    (VENV / "machine.txt").write_text(lines(there))
    uv(target, *install_there, "-r", VENV / "machine.txt")
    wheelhouse.fetch(target.wheels(lacking), VENV / "wheelhouse", f"rehearsal beside {Path(asked.has).name}")
    into = ("--python", VENV / "bin" / "python")
    without_index(wheelhouse.installation(sys.executable, VENV / "wheelhouse", *into))
    READY.write_text(state)


def state_of(asked):
    """All that it is made from."""
    files = (asked.has, ROOT / "pyproject.toml", install.CONSTRAINTS)
    content = [hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else "" for path in files]
    return "\n".join([f"place {ROOT}", f"python {asked.python}", asked.extras, asked.torch, *content, ""])


def find_python(program, version):
    """One that is installed: uv would fetch one of its own."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable  # it need not be on the PATH
    command = [program, "python", "find", "--no-python-downloads", "--system", version]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"there is no Python {version}, which that machine has; install it (apt install python{version} "
            f"python{version}-venv, or pyenv install {version}), or name another: make gpu-rehearse FOR=3.13"
        )
    return done.stdout.strip()


def with_needs(target, versions):
    """Also what these need themselves, the CUDA libraries among it, as far as possible in that machine's versions."""
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch, "machine.txt")
        request.write_text(lines(versions))
        return Target(target.python, target.platform, {}).resolve([request], wanted=target.has)


def without_index(command):
    """As on that machine: this one's configuration of pip is not read."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    done = subprocess.run(
        [*command, "--quiet"], env={**own, "PIP_CONFIG_FILE": os.devnull}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the wheelhouse cannot be installed: {wheelhouse.reason(done.stderr)}")


def uv(target, *words):
    command = [target.uv, *map(str, words)]
    done = subprocess.run(command, env=wheelhouse.environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(target.why(done.stderr, install.CONSTRAINTS))


if __name__ == "__main__":
    main()
