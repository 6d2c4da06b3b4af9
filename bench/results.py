"""Where benchmark results are kept, and what produced them: JSON lines in bench/results, one per case and provider.

`python -m bench.results` prints the second.
"""

import datetime
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
SOURCES = ("kernels", "bench", "inpo_fast", "tests")  # what a result depends on


@functools.cache
def commit() -> tuple[str, bool]:
    """Short commit and whether the sources differ from it. Without git: the variable COMMIT, else "unknown"."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short=10", "HEAD"])
        changed = git(["git", "status", "--porcelain", "--", *SOURCES, ":!bench/results"])
        if head.returncode == changed.returncode == 0:
            return head.stdout.strip(), bool(changed.stdout.strip())
    except FileNotFoundError:
        pass
    return os.environ.get("COMMIT", "unknown"), False


@functools.cache
def sources() -> str:
    """A hash of all Python files that a result may depend on."""
    files = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha1(b"".join(bytes(p.relative_to(ROOT)) + p.read_bytes() for p in files)).hexdigest()[:10]


@functools.cache
def provenance() -> dict:
    gpu = torch.cuda.is_available()
    name, dirty = commit()
    return {
        "commit": name,
        "dirty": dirty,
        "sources": sources(),
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def record(folder: Path, line: dict) -> None:
    """Appends to FOLDER/<device>.jsonl: what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {**provenance(), "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **line}
    device = re.sub(r"[^a-z0-9._-]+", "-", line["device"].lower())
    with open(folder / f"{device}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def load(folder: Path = FOLDER) -> list[dict]:
    """All lines below a folder, oldest first. A line that a killed run left half written is left out."""
    lines = []
    for path in sorted(folder.rglob("*.jsonl")):
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return sorted(lines, key=lambda line: line["utc"])


def key(line: dict) -> tuple:
    return tuple(line[name] for name in ("device", "kernel", "op", "shape", "dtype", "provider"))


def newest(lines: list[dict]) -> dict[tuple, dict]:
    return {key(line): line for line in lines}


if __name__ == "__main__":
    for name, value in provenance().items():
        print(name, value)
