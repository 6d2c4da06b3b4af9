"""Makes .venv with all that `make train` and `make test` need; what `make setup` runs.

    python3 install.py [--torch default|cpu|NAME|URL] [--installer uv|pip]

Takes uv where it is installed, pip otherwise. What goes wrong ends in one line: what, and how to mend it. .venv/ready
is written last and taken away first: while it is missing, .venv is not finished, and the next call goes on from there.
Any Python from 3.6 can read this file, so that one that is too old is told so.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
READY, MADE = VENV / "ready", VENV / "made"  # MADE: where, and with which torch; it says this from the beginning
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST, TESTED = (3, 11), "3.11 to 3.13"
TORCH_INDEX = "https://download.pytorch.org/whl/"
# GB to download, GB in .venv: measured with pip 23.2 and constraints.txt on Python 3.11, x86_64
SIZES = {"default": (3.0, 5.3), "cpu": (0.6, 2.5)}
SOURCES = ("index-url", "extra-index-url", "find-links", "no-index")

DISK = "No space left on device|os error 28|Disk quota exceeded"
NETWORK = (
    "Failed to fetch|error sending request|dns error|NewConnectionError|ConnectTimeout|Read timed out|ProxyError|"
    "SSLError|Connection broken|Connection refused|name resolution|Network is unreachable|from versions: none"
)
RIGHTS = "Permission denied|Read-only file system"
CONFLICT = "ResolutionImpossible|No solution found|No matching distribution found|conflicting dependencies"


class UserError(Exception):
    """What is wrong and how to mend it, in one line."""


def main():
    parser = argparse.ArgumentParser(prog="python3 install.py", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="", help="default: the package index's build (CUDA); cpu or another name at "
                        + TORCH_INDEX + ", or the URL of an index; empty: what .venv has")  # fmt: skip
    parser.add_argument("--installer", default="", choices=["", "uv", "pip"])
    asked = parser.parse_args()
    try:
        set_up(asked.torch, asked.installer)
    except UserError as problem:
        sys.exit("setup: " + str(problem))
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; the next `make setup` goes on from here")
    except OSError as problem:
        sys.exit("setup: " + str(diagnose(str(problem)) or problem))


def set_up(torch, installer):
    sources = own_sources()
    uv = choose_uv(installer, sources)
    check_python(sys.version_info, uv)
    if READY.exists():
        READY.unlink()
    old = made()
    torch = torch or old.get("torch", "default")
    download, size = SIZES.get(torch, SIZES["default"])
    fresh = not usable(old, torch, uv)
    whose = "uv" if uv else f"pip of {sys.executable} (Python {sys.version.split()[0]})"
    print(f"Setting up {VENV} with {whose}: PyTorch ({torch} build), Triton, diffusers, the tests' tools.")
    print(f"About {download} GB to download and {size} GB in .venv.", end=" ")
    if torch == "default":
        less = SIZES["cpu"]
        print(
            f"That is PyTorch for NVIDIA GPUs; without one: make setup TORCH=cpu ({less[0]} and {less[1]} GB).", end=""
        )
    print()
    if sources and not uv:
        print(f"pip's configuration names places of its own ({', '.join(sources)}): what they have may be smaller.")
        if shutil.which("uv"):
            print("uv is installed but does not read them, so pip is taken; make setup INSTALLER=uv takes uv.")
    sys.stdout.flush()
    if fresh:
        room = shutil.disk_usage(str(ROOT)).free / 1e9
        least = SIZES["cpu"][1] if sources and not uv else size
        if room < least:
            raise UserError(disk_is_full(f"{least} GB are needed for .venv and there are {room:.1f}", torch))
        make_venv(uv, torch)
    fill(uv, torch)
    if not MADE.exists():  # a .venv of before this program
        note(torch)
    print("Ready:", check())
    READY.write_text(MADE.read_text())


# which tool, which Python


def own_sources():
    """Options of pip's configuration and environment that name another place of packages than the public index."""
    found = {name for name in SOURCES if os.environ.get("PIP_" + name.replace("-", "_").upper())}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    keys = re.findall(r"^[^=\s]*\.([\w-]+)=", done.stdout.decode(errors="replace"), re.MULTILINE)
    return [name for name in SOURCES if name in found or name in keys]


def choose_uv(installer, sources):
    """The path of uv, or None for pip."""
    uv = shutil.which("uv")
    if installer == "uv" and not uv:
        raise UserError("INSTALLER=uv, and there is no uv; install it, or leave INSTALLER out for pip")
    return uv if installer == "uv" or (installer == "" and not sources) else None


def check_python(version, uv):
    if uv:
        return  # it takes another Python, or brings one
    major, minor = version[:2]
    if (major, minor) < OLDEST:
        found = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
        other = f"{found[0]} is here: make PYTHON={found[0]} …" if found else "name one: make PYTHON=python3.12 …"
        raise UserError(
            f"{sys.executable} is Python {major}.{minor}, and inpo-fast needs 3.11 or newer; {other}, or install uv, "
            "which brings one"
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{sys.executable} has no module {' and no '.join(missing)}, which makes .venv; on Debian and Ubuntu: "
            f"apt install python{major}.{minor}-venv; or install uv"
        )


# .venv


def made():
    """What MADE says of the .venv that is there: its place and its torch."""
    if not MADE.exists():
        return {}
    return dict(line.split(" ", 1) for line in MADE.read_text().splitlines() if " " in line)


def usable(old, torch, uv):
    """Is there a .venv that can be filled up? One that was moved, or has another torch, is made anew."""
    python = VENV / "bin" / "python"
    if not python.exists() or old.get("place", str(ROOT)) != str(ROOT) or old.get("torch", torch) != torch:
        return False
    ask = "import sys; assert sys.version_info[:2] >= (3, 11)" + ("" if uv else "; import pip")
    return subprocess.run([str(python), "-c", ask], stderr=subprocess.PIPE).returncode == 0


def make_venv(uv, torch):
    if os.path.lexists(str(VENV)):
        if not (VENV / "pyvenv.cfg").exists() and any(VENV.iterdir()):
            raise UserError(f"{VENV} is there and is no virtual environment; move it away")
        shutil.rmtree(str(VENV))
    if uv:
        fits = sys.version_info[:2] >= OLDEST
        run([uv, "venv", "--seed", "--python", sys.executable if fits else ">=3.11,<3.14", str(VENV)])
    else:
        run([sys.executable, "-m", "venv", str(VENV)])
    note(torch)


def note(torch):
    MADE.write_text(f"place {ROOT}\ntorch {torch}\n")


def fill(uv, torch):
    """Installs torch, where it has an index of its own, and then everything else, which leaves it as it is."""
    python = str(VENV / "bin" / "python")
    pip = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install", "--no-input"]
    if torch != "default":
        version = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE).group(1)
        url, label = (torch, "") if "/" in torch else (TORCH_INDEX + torch, "+" + torch)
        run([*pip, "--no-deps", "--index-url", url, "torch==" + version + label])
    run([*pip, "-c", str(CONSTRAINTS), "torch", "-e", str(ROOT) + "[dev]"])


def check():
    """Imports torch; a build that this machine cannot load says so here and not in the first run."""
    ask = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    done = subprocess.run([str(VENV / "bin" / "python"), "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"torch was installed and cannot be imported ({last}); try the CPU build: make setup TORCH=cpu")
    return done.stdout.decode().strip()


# running pip and uv


def run(command):
    """Shows what it says as it says it, but for the lines of a known failure, which become one."""
    show = sys.stderr.isatty() and os.path.basename(command[0]) == "uv"
    end, tail = (os.openpty() if show else os.pipe()), b""  # uv draws its progress on a terminal only
    process = subprocess.Popen(command, cwd=str(ROOT), stderr=end[1])
    os.close(end[1])
    held, line = [], b""
    while True:
        try:
            said = os.read(end[0], 65536)
        except OSError:  # a terminal whose other end is closed
            said = b""
        if not said:
            break
        tail = (tail + said)[-65536:]
        if show:
            os.write(2, said)
            continue
        *lines, line = (line + said).split(b"\n")
        for whole in lines:
            if held or diagnose(whole.decode(errors="replace")) or whole.lstrip().lower().startswith(b"error"):
                held.append(whole)
            else:
                os.write(2, whole + b"\n")
    os.close(end[0])
    code = process.wait()
    if not code:
        return
    why = diagnose(tail.decode(errors="replace"))
    if why is None:
        os.write(2, b"\n".join([*held, line]) + b"\n")
        why = "`{}` failed with status {}; what it said is above".format(" ".join(command), code)
    raise UserError(why)


def diagnose(said):
    """The one line for what pip, uv or venv said; None if it is nothing known."""
    said = re.sub(r"\s+", " ", said)
    if re.search(DISK, said):
        return disk_is_full("the disk is full", made().get("torch"))
    clash = re.search(CONFLICT, said)
    if re.search(NETWORK, said) and not (clash and " depends on " in said):  # one that names what clashes has answers
        return (
            "the package index does not answer; check the network, the proxy (HTTPS_PROXY) and pip's configuration "
            "(pip config list), then call it again: it goes on from here"
        )
    if re.search(RIGHTS, said):
        return f"{VENV} or a cache cannot be written ({re.search(RIGHTS, said).group(0)}); mend its rights"
    if clash:
        what = re.search(r"No matching distribution found for \S+|Cannot install .*?conflicting|Because .*?(?=,)", said)
        return (
            f"constraints.txt does not fit what the index has for this Python and machine"
            f"{' (' + what.group(0) + ')' if what else ''}; it is held to Python {TESTED} on Linux: make "
            "PYTHON=python3.12 …"
        )
    return None


def disk_is_full(what, torch):
    places = [str(ROOT), os.environ.get("TMPDIR", "/tmp")]
    free = ", ".join(f"{shutil.disk_usage(place).free / 1e9:.1f} GB free in {place}" for place in places)
    less = ", or take PyTorch without CUDA: make setup TORCH=cpu" if torch == "default" else ""
    return f"{what} ({free}); make room, or set TMPDIR to a folder that has some{less}"


if __name__ == "__main__":
    main()
