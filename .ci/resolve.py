#!/usr/bin/env python3
"""Do the constraints resolve for anybody? Every extra, alone and all together, on every Python, against the package
index alone: wheels that lie on this machine, pip's and uv's configuration and their environment variables are ignored.

    python .ci/resolve.py [--constraints FILE …] [--python 3.12 …] [--extra NAME …] [--pip]

One line a combination. Exit status 0: all resolve and nothing that they bring is left without a version. 1: one does
not, and its line says which requirement is in the way. 3: the index does not answer, which says nothing about them.
Takes a minute with nothing in uv's cache. --pip asks pip as well, for this Python alone, all extras together: from an
index that serves no metadata it takes whole wheels to read theirs, gigabytes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("constraints.txt", "constraints-oldest.txt")
PYTHONS = ("3.11", "3.12", "3.13")
UNRESOLVED, NO_INDEX = 1, 3
# another index than the public one, which uv asks by itself
CONFIGURATION = """
[[index]]
url = "{}"
default = true
"""
KEPT = (
    "PIP_CERT",
    "PIP_CACHE_DIR",
    "UV_CACHE_DIR",
    "UV_NATIVE_TLS",
    "UV_SYSTEM_CERTS",
    "UV_HTTP_TIMEOUT",
    "UV_HTTP_RETRIES",
)
NETWORK = re.compile(
    r"Failed to fetch|error sending request|dns error|Could not connect|NewConnectionError|ConnectTimeout|"
    r"ReadTimeout|ProxyError|SSLError|Connection (?:broken|refused|reset)|name resolution|Network is unreachable|"
    r"from versions: none"
)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python .ci/resolve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraints", type=Path, nargs="+", default=[ROOT / name for name in FILES])
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--extra", nargs="+", help="of pyproject.toml, `none` or `all`")
    parser.add_argument("--project", type=Path, default=ROOT, help="folder of the pyproject.toml")
    parser.add_argument("--index", help="another than the public one")
    parser.add_argument("--pip", action="store_true")
    asked = parser.parse_args(words)
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is None:
        print("resolve: there is no uv, which resolves for other Pythons than this one; pip install uv")
        return 2
    project = tomllib.loads((asked.project / "pyproject.toml").read_text())["project"]
    extras = list(project.get("optional-dependencies", {}))
    sets = {"all": extras, "none": [], **{name: [name] for name in extras}}
    combinations = list(product(asked.constraints, asked.python, asked.extra or sets))

    def ask_uv(combination: tuple[Path, str, str]) -> tuple[int, str]:
        file, python, extra = combination
        command = [uv, "pip", "compile", "--quiet", "--config-file", configuration.name, "-c", file]
        command += ["--python", sys.executable]  # asked about this machine; it would start each that is installed
        command += ["--no-header", "--no-annotate", "--only-binary", ":all:", "--no-python-downloads"]
        command += ["--python-version", python, "--python-platform", "linux"]
        command += [*(f"--extra={name}" for name in sets[extra]), asked.project / "pyproject.toml"]
        code, text = verdict(command, file)
        return code, f"{file.name}, Python {python}, {extra}: {text}"

    with tempfile.NamedTemporaryFile("w", suffix=".toml") as configuration, ThreadPoolExecutor(2) as threads:
        configuration.write(CONFIGURATION.format(asked.index) if asked.index else "")
        configuration.flush()
        status = report(threads.map(ask_uv, combinations))
    if asked.pip and status == 0:
        status = report(ask_pip(file, asked.project, extras) for file in asked.constraints)
    return status


def report(answers) -> int:
    """Prints each; the worst exit status, and no further than the first that the index did not answer."""
    status = 0
    for code, line in answers:
        print(line, flush=True)
        if code == NO_INDEX:
            return code
        status = max(status, code)
    return status


def ask_pip(file: Path, project: Path, extras: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-c", file]
    code, text = verdict([*command, "torch", f"{project}[{','.join(extras)}]"], file, lambda said: {})
    return code, f"{file.name}, pip, Python {sys.version_info.major}.{sys.version_info.minor}, all: {text}"


def verdict(command: list, file: Path, read=None) -> tuple[int, str]:
    """(exit status, what to say) of one resolution."""
    done = subprocess.run(command, env=clean(os.environ), capture_output=True, text=True)
    if done.returncode:
        kind, why = explain(done.stdout + done.stderr, file)
        if kind == "network":  # it has tried several times by itself
            return NO_INDEX, f"not known, THE INDEX DOES NOT ANSWER: {why}"
        return UNRESOLVED, f"DOES NOT RESOLVE: {why}"
    found = (read or pins)(done.stdout)
    if loose := sorted(found.keys() - pins(file.read_text()).keys()):
        names = ", ".join(f"{name}=={found[name]}" for name in loose)
        return UNRESOLVED, f"RESOLVES TO WHAT {file.name} HAS NO VERSION OF: {names}"
    shown = " ".join(f"{name} {found[name]}" for name in ("torch", "triton", "numpy") if name in found)
    return 0, f"resolves, {len(found)} packages: {shown}" if found else "resolves"


def clean(environment) -> dict[str, str]:
    """Without whatever tells pip or uv where to look."""
    kept = {key: value for key, value in environment.items() if not key.startswith(("PIP_", "UV_")) or key in KEPT}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def pins(text: str) -> dict[str, str]:
    """Package: version, of the lines NAME==VERSION."""
    found = re.findall(r"^([\w.\-]+)==([^\s;#]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def explain(said: str, file: Path) -> tuple[str, str]:
    """(network, conflict or other; one line) of what uv or pip says when it fails."""
    plain = re.sub(r"\x1b\[[0-9;]*m|[│╰─▶×├]", " ", said)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    if by_pip := re.search(r"The conflict is caused by:\n(.*?)\n\s*\n", plain, re.DOTALL):
        facts = [re.sub(r" \(from http[^;]*|; [^;]*$", "", line.strip()) for line in by_pip[1].splitlines()]
        return "conflict", _with_pins("; ".join(dict.fromkeys(facts)), file)
    text = re.sub(r"\s+", " ", re.sub(r"\{[^}]*\}", "", " ".join(lines)))  # {...}: a requirement's markers
    if "Because" in text:
        reason = text[text.index("Because ") + len("Because ") :].split(" hint: ")[0]
        reason = re.sub(r",? we can conclude that .*?(?=\.? And |\.?$)", "", reason)  # what follows from the facts
        return "conflict", _with_pins(reason.rstrip("."), file)
    if found := NETWORK.search(text):
        around = next(line for line in lines if found[0] in re.sub(r"\s+", " ", line))
        return "network", " ".join(around.split())[:200]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["it said nothing"]
    return "other", " ".join(errors[-1].split())


def _with_pins(reason: str, file: Path) -> str:
    """Which lines of the constraints a conflict is about: those whose package and version it names."""
    have = [f"{name}=={version}" for name, version in pins(file.read_text()).items()]
    words = re.sub(r"\s*==\s*", "==", reason)
    named = [pin for pin in have if re.search(rf"(?<![\w.-]){re.escape(pin)}(?![\w-]|\.\w)", words)]
    return f"{reason} [{file.name} has {', '.join(named)}]" if named else reason


if __name__ == "__main__":
    sys.exit(main())
