"""What nobody foresaw: its traceback goes to a file, with command and versions, secrets masked; one line says where.

A traceback on the screen helps nobody who only uses the trainer, and one that is lost helps nobody who mends it.
INPO_FAST_TRACEBACK=1 shows it as Python does.
"""

import os
import platform
import shlex
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from inpo_fast.runtime.masking import masked

VARIABLE = "INPO_FAST_TRACEBACK"
PACKAGES = ("inpo-fast", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow", "pyarrow")
ISSUES = "report it to the project with that file"


def shown() -> bool:
    """Whether whoever develops asked to see tracebacks as Python shows them."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def line(program: str, problem: BaseException, reason: str | None = None) -> str:
    """Writes the traceback to a file of its own below the temporary folder, and says so in one line. reason: what the
    system refused, where that is known; otherwise it is a mistake of the trainer's."""
    path = _write(program, problem)
    kept = f"the traceback is in {path}" if path else f"{VARIABLE}=1 shows the traceback"
    if reason is not None:
        return f"{reason} ({kept})"
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if f"inpo_fast{os.sep}" in frame.filename] or frames[-1:]
    where = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    said = " ".join(f"{type(problem).__name__}: {problem}".split())[:300].rstrip(": ")
    return f"a mistake of inpo_fast{where} that nobody foresaw ({said}); {kept}: {ISSUES}"


def _write(program: str, problem: BaseException) -> Path | None:
    """The file, or None where none can be written."""
    head = [
        f"command: {shlex.join([program, *sys.argv[1:]])}",
        f"python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
    ]
    text = masked("\n".join([*head, "", *traceback.format_exception(problem)]))
    try:
        handle, name = tempfile.mkstemp(prefix="inpo-fast-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return Path(name)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
