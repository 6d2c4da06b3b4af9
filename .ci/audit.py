#!/usr/bin/env python3
"""Are there known weaknesses in what constraints.txt pins? Asks pip-audit, and counts what it really found out.

    python .ci/audit.py [--constraints FILE …] [--service pypi|osv]

pip-audit by itself is content (exit status 0) with packages that its service does not know, all of them too. Exit
status here: 0 every pinned version is known there and without a known weakness; 1 one has some, named with the version
that mends it; 2 not every version could be looked up, which says nothing about those; 3 the service does not answer.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEAK, UNKNOWN, NO_SERVICE = 1, 2, 3
PIN = re.compile(r"\s*(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==(?P<version>[^\s;#]+)")
NAMED = 8  # packages in a line of the summary


def pins(files: list[Path]) -> list[tuple[str, str]]:
    """(name, version) of every pin, whatever Python or platform it is for."""
    found = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if pin := PIN.match(line):
                name = re.sub(r"[-_.]+", "-", pin["name"]).lower()
                found[name, pin["version"].partition("+")[0]] = None  # torch 2.13.0+cpu is 2.13.0
    return list(found)


def _name(written: str) -> str:
    return re.sub(r"[-_.]+", "-", written).lower()


def rounds(pinned: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """In lists that name no package twice, as pip-audit wants them."""
    out: list[list[tuple[str, str]]] = []
    for name, version in pinned:
        free = next((part for part in out if all(name != other for other, _ in part)), None)
        if free is None:
            out.append(free := [])
        free.append((name, version))
    return out


def ask(part: list[tuple[str, str]], service: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("".join(f"{name}=={version}\n" for name, version in part))
        words = [
            "--requirement",
            str(listed),
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--vulnerability-service",
        ]
        command = [sys.executable, "-m", "pip_audit", *words, service, "--progress-spinner", "off"]
        return subprocess.run(command, capture_output=True, text=True)


def main(words: list[str] | None = None, ask: Callable = ask) -> int:
    parser = argparse.ArgumentParser(
        prog="python .ci/audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraints", type=Path, nargs="+", default=[ROOT / "constraints.txt"])
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="who is asked (default pypi)")
    own = parser.parse_args(words)
    pinned = pins(own.constraints)
    checked: set[tuple[str, str]] = set()
    weak, why = [], {}
    for part in rounds(pinned):
        done = ask(part, own.service)
        try:
            answer = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, TypeError):
            said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            print(f"audit: 0 of {len(pinned)} pinned versions checked: {own.service} does not answer ({said[:200]})")
            return NO_SERVICE
        for one in answer:
            if "skip_reason" in one:
                why[one["name"]] = one["skip_reason"]
                continue
            checked.add((_name(one["name"]), one["version"]))
            weak += [(one["name"], one["version"], found) for found in one["vulns"]]
    for name, version, found in weak:
        mended = f"mended in {', '.join(found['fix_versions'])}" if found["fix_versions"] else "nothing mends it yet"
        print(f"audit: {name} {version}: {found['id']}, {mended}")
    left = [pin for pin in pinned if pin not in checked]
    summary = (
        f"audit: {len(checked & set(pinned))} of {len(pinned)} pinned versions checked, {len(weak)} known weaknesses"
    )
    if left:
        names = ", ".join(f"{name} {version}" for name, version in left[:NAMED]) + ", …" * (len(left) > NAMED)
        reason = next(iter(why.values()), "they are missing in the answer")
        summary += f"; not checked: {names} ({reason[:120]})"
    print(summary)
    return WEAK if weak else UNKNOWN if left or not pinned else 0


if __name__ == "__main__":
    sys.exit(main())
