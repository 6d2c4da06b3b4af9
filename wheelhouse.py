"""Makes build/wheelhouse: what a machine without a network lacks, as wheels. What `make wheelhouse` runs.

    python3 wheelhouse.py --for 3.12 [--platform x86_64] [--extras bench,gpu] [--has freeze.txt]

--has is what `python3 -m pip list --format=freeze` says there. What that machine has stays where pyproject.toml and the
other packages allow its version; its torch and triton stay always, and what they need is taken to be there with them.
The rest has the versions of constraints.txt where these fit. Our own package comes along as a wheel: an editable
installation would want setuptools there.

uv resolves, pip downloads. A folder build/wheelhouse is complete: it is called wheelhouse.part until then, and the same
command goes on from there.
"""

import argparse
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import install
from install import UserError

ROOT = Path(__file__).resolve().parent
if sys.version_info < install.OLDEST:
    sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; this needs 3.11 or newer: make PYTHON=python3.12 …")
sys.path.append(str(ROOT / ".ci"))
from resolve import explain, pins  # noqa: E402

FOLDER = ROOT / "build" / "wheelhouse"
LIST = "requirements.txt"
HELD = ("torch", "triton")  # what they need on a machine is there with them, not always as packages that pip knows
THERE = "+there"  # local version of what stands for a package of that machine: no index has it
SILENT = (
    "the package index does not answer; check the network and the proxy (HTTPS_PROXY), then call it again: it goes on "
    "from here"
)
DAMAGED = "DO NOT MATCH THE HASHES"  # pip's words
PLACED = re.compile(r"^([\w.\-]+) @ \S*?/[\w.]+?-([^-/]+)-[^/]+\.whl")
VERSION = re.compile(  # what uv reads: PEP 440; a distribution's own packages have others
    r"v?(\d+!)?\d+(\.\d+)*([-_.]?(a|alpha|b|beta|c|rc|pre|preview)[-_.]?\d*)?(-\d+|[-_.]?(post|rev|r)[-_.]?\d*)?"
    r"([-_.]?dev[-_.]?\d*)?(\+[a-z0-9]+([-_.][a-z0-9]+)*)?",
    re.IGNORECASE,
)
EDITABLE = re.compile(r"^# Editable .*\(([\w.\-]+)==(\S+)\)")


def main():
    parser = argparse.ArgumentParser(prog="python3 wheelhouse.py", description=__doc__.splitlines()[0])
    parser.add_argument("--for", dest="python", default="", help="Python of that machine, as 3.12")
    parser.add_argument("--platform", default="x86_64", help="x86_64, aarch64, or uv's name of a platform")
    parser.add_argument("--extras", default="", help="of pyproject.toml, separated by commas")
    parser.add_argument("--has", default="", help="`python3 -m pip list --format=freeze` of that machine")
    asked = parser.parse_args()
    guarded("wheelhouse", lambda: make(asked))


def guarded(program, work):
    """Runs it; what goes wrong is one line."""
    try:
        work()
    except UserError as problem:
        sys.exit(f"{program}: {problem}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; the same command goes on from here")
    except OSError as problem:
        sys.exit(f"{program}: {install.diagnose(str(problem)) or problem}")


def make(asked):
    has = read_freeze(asked.has) if asked.has else {}
    target = Target(asked.python, asked.platform, has)
    extras = names(asked.extras)
    found, held = target.resolved(extras)
    lacking = target.lacking(found, held)
    print(f"For Python {target.python} on {target.platform}, extras: {', '.join(extras) or 'none'}.", end=" ")
    print(f"That machine has {len(has)} packages." if has else "That machine has no packages (HAS= names what it has).")
    tell(has, lacking, held)
    what = f"Python {target.python}, {target.platform}, beside {Path(asked.has).name or 'nothing'}"
    with tempfile.TemporaryDirectory() as scratch:
        fetch([*target.wheels(lacking), build(target.uv, Path(scratch))], FOLDER, what)
    place = FOLDER.relative_to(ROOT)
    print(f"Complete. Copy this checkout with {place} to that machine, and there, in it:")
    print(f"    {' '.join(installation('python3', place))}")
    print("Then python3 -m inpo_fast.train --config pocket runs there, from any folder; make gpu, in the checkout.")


def names(words):
    return [name for name in re.split(r"[\s,]+", words) if name]


def tell(has, lacking, held):
    for name in held:
        print(f"  {name} {has[name]} stays" + ("" if name in HELD else ": no index has this version"))
    for name in sorted(lacking.keys() & has.keys()):
        print(f"  {name} {has[name]} there does not fit what the others need: {lacking[name]} takes its place")


def installation(python, folder, *where):
    """The command that installs a wheelhouse: just these wheels, and only as they were when it was made."""
    words = ["-m", "pip", *where, "install", "--no-index", "--no-deps", "--find-links", folder, "-r", folder / LIST]
    return [str(word) for word in (python, *words)]


# what is there, what is not


def read_freeze(path):
    """Package: version, of what pip freeze or pip list --format=freeze said."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"HAS={path} cannot be read ({getattr(problem, 'strerror', None) or 'no text'})") from None
    said = [line.strip() for line in text.splitlines()]
    placed = [found.groups() for line in said if (found := PLACED.match(line) or EDITABLE.match(line))]
    found = pins("\n".join([*said, *(f"{name}=={unquote(version)}" for name, version in placed)]))
    places = [name[1] for line in said if (name := re.match(r"([\w.\-]+) @ ", line)) and normal(name[1]) not in found]
    how = f"make it there with: python3 -m pip list --format=freeze > {Path(path).name}"
    if places:
        raise UserError(f"HAS={path} has places instead of versions ({places[0]} and {len(places) - 1} more); {how}")
    if not found:
        raise UserError(f"HAS={path} has no line NAME==VERSION; {how}")
    found.pop(project_name(), None)
    return {name: version for name, version in found.items() if VERSION.fullmatch(version)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def project_name():
    return re.search(r'^name = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def public(version):
    return version.split("+")[0]


class Target:
    """A machine: its Python, its platform, its packages; and uv, which resolves for it."""

    def __init__(self, python, platform, has):
        version = re.fullmatch(r"3\.(\d+)", python)
        if not version or (3, int(version[1])) < install.OLDEST:
            raise UserError(f"FOR={python}: say which Python that machine has (3.11 or newer), as in FOR=3.12")
        self.python, self.has = python, has
        self.platform = platform if "-" in platform else platform + "-manylinux_2_28"
        self.uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
        if self.uv is None:
            raise UserError("there is no uv, which resolves for other Pythons and machines; pip install uv")

    def resolved(self, extras):
        """(package: version of all that is needed, names of what stays without asking the index what it needs)."""
        project, tested = [ROOT / "pyproject.toml"], pins(install.CONSTRAINTS.read_text())
        if not self.has:
            return self.resolve(project, extras, fixed=tested), []
        wanted, held, refused = tested | self.has, [name for name in HELD if name in self.has], set()
        fixed = self.triton_of_torch()
        while True:
            found = self.resolve(project, extras, wanted, fixed, held)
            new = self.lacking(found, held).keys() & self.has.keys() - refused
            if not new:
                return found, held
            for name in new:
                if self.offered(name, public(self.has[name])):
                    refused.add(name)
                    wanted[name] = tested.get(name, self.has[name])
                else:
                    held.append(name)

    def lacking(self, found, held):
        """What of it that machine has not, or not in this version."""
        have = {name: public(version) for name, version in self.has.items()}
        return {name: version for name, version in found.items() if name not in held and have.get(name) != version}

    def resolve(self, inputs, extras=(), wanted=(), fixed=(), held=()):
        """Package: version. `wanted` are taken where they fit, `fixed` are; `held` are the machine's own, and what
        they need is not asked for."""
        fixed = dict(fixed)
        with tempfile.TemporaryDirectory() as scratch:
            output, constraints = Path(scratch, "wanted.txt"), Path(scratch, "fixed.txt")
            for name in held:
                fixed[name] = stand_in(name, public(self.has[name]), scratch)
            wanted = {name: public(version) for name, version in dict(wanted).items()} | fixed
            output.write_text(lines(wanted))  # uv prefers what its output file has
            constraints.write_text(lines(fixed))
            words = ["-f", scratch, "-c", constraints, "-o", output, *(f"--extra={name}" for name in extras)]
            done = self.compile(*words, *inputs)
            if done.returncode:
                raise UserError(self.why(done.stderr, constraints))
            return {name: public(version) for name, version in pins(output.read_text()).items()}

    def triton_of_torch(self):
        """Each torch asks for one triton; where that machine has a torch without it, the index's torch says which."""
        if "torch" not in self.has or "triton" in self.has:
            return {}
        done = self.compile("-", text=f"torch=={public(self.has['torch'])}\n")
        return {name: version for name, version in pins(done.stdout).items() if name == "triton"}

    def offered(self, name, version):
        """Has an index this version?"""
        done = self.compile("--no-deps", "-", text=f"{name}=={version}\n")
        if done.returncode and explain(done.stderr, install.CONSTRAINTS)[0] == "network":
            raise UserError(self.why(done.stderr, install.CONSTRAINTS))
        return done.returncode == 0

    def wheels(self, versions):
        """A Wheel of each package, with the index's word on its size and hash."""
        import tomllib

        done = self.compile("--no-deps", "--format", "pylock.toml", "-", text=lines(versions))
        if done.returncode:
            raise UserError(self.why(done.stderr, install.CONSTRAINTS))
        packages = tomllib.loads(done.stdout).get("packages", [])
        return [Wheel(entry["name"], entry["version"], entry["wheels"][0], self.python) for entry in packages]

    def compile(self, *words, text=""):
        command = [self.uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
        command += [
            "--python",
            sys.executable,
            "--no-python-downloads",
            "--python-version",
            self.python,
            "--python-platform",
            self.platform,
        ]
        command = [str(word) for word in (*command, *words)]
        return subprocess.run(command, input=text, env=environment(), cwd=str(ROOT), capture_output=True, text=True)

    def why(self, said, fixed):
        """The one line for what uv said."""
        kind, line = explain(said.replace(THERE, ""), fixed)
        if kind == "network":
            return (
                "the package index does not answer; check the network and the proxy (HTTPS_PROXY), then call it again"
            )
        if kind == "other":
            return line.removeprefix("error: ")
        where = f"Python {self.python} on {self.platform}"
        return f"there is no set of versions for {where}: {line.replace(THERE, '').replace('fixed.txt has', 'it has')}"


def lines(versions):
    return "".join(f"{name}=={version}\n" for name, version in versions.items())


def environment():
    """pip's index, where it names one, for uv too; the rest of pip's configuration is about this machine."""
    index = os.environ.get("PIP_INDEX_URL")
    if index is None:
        index = configured_index()
    own = {"UV_DEFAULT_INDEX": index} if index else {}
    return {**own, **os.environ}


@functools.cache
def configured_index():
    ask = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip()


def stand_in(name, version, folder):
    """A wheel without content and without needs, for what the machine has; returns its version."""
    stem, version = name.replace("-", "_"), version + THERE
    info = f"{stem}-{version}.dist-info/"
    with zipfile.ZipFile(Path(folder, f"{stem}-{version}-py3-none-any.whl"), "w") as file:
        file.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(info + "RECORD", "")
    return version


# wheels


class Wheel:
    """A file to come: `url` says where from, `size` in bytes."""

    def __init__(self, name, version, entry, python):
        self.name, self.version, self.python = name, version, python
        self.url = entry.get("url") or Path(entry["path"]).resolve().as_uri()
        self.file = unquote(urlsplit(self.url).path).rsplit("/", 1)[1]
        here = Path(url2pathname(urlsplit(self.url).path)) if self.url.startswith("file:") else None
        self.here, self.size = here, here.stat().st_size if here else entry.get("size", 0)
        self.sha256 = entry.get("hashes", {}).get("sha256") or (digest(here) if here else None)

    def right(self, path):
        return path.is_file() and (self.sha256 is None or digest(path) == self.sha256)

    def come(self, folder):
        """Downloads it to a folder of its own there, and moves it when it is whole."""
        new = folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        failed, said = False, DAMAGED
        if self.here:  # our own, and what lies in an index on this disk
            new.mkdir()
            shutil.copy(self.here, new / self.file)
        else:
            failed, said = self.download(new)
        if failed or not self.right(new / self.file):
            raise UserError(f"{self.file} did not come: {reason(said)}")
        (new / self.file).replace(folder / self.file)
        new.rmdir()

    def download(self, new):
        platforms = self.file[: -len(".whl")].rsplit("-", 1)[1]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(new)]
        command += ["--python-version", self.python, "--no-input", "--disable-pip-version-check"]
        command += [] if platforms == "any" else [f"--platform={name}" for name in platforms.split(".")]
        command += [self.url + (f"#sha256={self.sha256}" if self.sha256 else "")]
        quiet = [] if self.size > 30e6 else ["--quiet"]  # pip's own progress for what takes a while
        done = subprocess.run([*command, *quiet], stderr=subprocess.PIPE, text=True)
        return done.returncode, done.stderr


def reason(said):
    if re.search(install.DISK, said):
        return install.disk_is_full("the disk is full", None)
    if re.search(install.NETWORK, said):
        return SILENT
    if DAMAGED in said:
        return "what came is damaged; call it again: it goes on from here"
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or said.strip().splitlines()
    return " ".join(errors[-1].split()) if errors else "what came is not what the index announced; call it again"


def megabytes(wheels):
    return sum(wheel.size for wheel in wheels) / 1e6


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheels, folder, what):
    """Fills the folder with just these wheels. It has its name only when all are there and as announced."""
    part = folder.with_name(folder.name + ".part")
    if folder.exists():  # of another request, or of this one
        (folder / LIST).unlink(missing_ok=True)
        if part.exists():
            shutil.rmtree(part)
        folder.rename(part)
    part.mkdir(parents=True, exist_ok=True)
    todo = [wheel for wheel in wheels if not wheel.right(part / wheel.file)]
    total, left = (megabytes(some) for some in (wheels, [wheel for wheel in todo if not wheel.here]))
    print(f"{len(wheels)} wheels, {total:.1f} MB; {left:.1f} MB to download.")
    free = shutil.disk_usage(part).free / 1e6
    if free < left:
        raise UserError(f"{left:.0f} MB are needed in {folder.parent} and {free:.0f} are free; make room")
    for i, wheel in enumerate(wheels, 1):
        print(f"[{i}/{len(wheels)}] {wheel.file} {wheel.size / 1e6:.1f} MB", flush=True)
        if wheel in todo:
            wheel.come(part)
    for path in {*part.iterdir()} - {part / wheel.file for wheel in wheels}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = [f"# {what}"]
    for wheel in wheels:
        text.append(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256 or digest(part / wheel.file)}")
    (part / LIST).write_text("\n".join([*text, ""]))
    part.rename(folder)


def build(uv, scratch):
    """A Wheel of this checkout. Its version carries a digest of the sources: pip takes another one for another."""
    source, made = scratch / "source", scratch / "made"
    left_out = shutil.ignore_patterns(".*", "build", "runs", "tests", "docs", "findings", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)  # a build leaves its files beside what it reads
    state = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        state.update(f"{path.relative_to(source)} {digest(path)}\n".encode())
    with open(source / "setup.cfg", "a") as file:
        file.write(f"\n[egg_info]\ntag_build = +s{state.hexdigest()[:10]}\n")
    command = [uv, "build", "--wheel", "--quiet", "--python", sys.executable, "--out-dir", str(made), str(source)]
    dated = {**environment(), "SOURCE_DATE_EPOCH": "1577836800"}  # the same file from the same sources
    done = subprocess.run(command, env=dated, capture_output=True, text=True)
    if done.returncode:
        kind, line = explain(done.stderr, install.CONSTRAINTS)
        what = "the package index does not answer (setuptools is asked for)" if kind == "network" else line
        raise UserError(f"our own wheel cannot be built: {what}")
    (wheel,) = made.glob("*.whl")
    name, version, *_ = wheel.name.split("-")
    return Wheel(normal(name), version, {"path": str(wheel)}, "")


if __name__ == "__main__":
    main()
