"""docs/structure.md against the tree: each file and function that it names is there, and each package has its line."""

import ast
import re
from pathlib import Path

import pytest
from test_imports import LAYERS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9A-Z]+\.py)(?:: ([\w.]+))?", TEXT)


def place(name: str) -> Path:
    """Paths are inside inpo_fast/, but for those of the checkout's other folders."""
    outside = name.split("/")[0] in ("kernels", "bench", "tests")
    return ROOT / name if outside else ROOT / "inpo_fast" / name


def names(path: Path) -> set[str]:
    """Of functions, classes, methods, fields and constants."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize(("file", "name"), [span for span in SPANS if "/" in span[0] or span[1]])
def test_what_it_names_is_there(file, name):
    if "NAME" in file:
        return
    assert place(file).is_file()
    assert not name or set(name.split(".")) <= names(place(file))


def test_it_names_what_there_is():
    assert len(SPANS) > 80
    rows = [line for line in TEXT.splitlines() if re.match(r"\| \d+ \| (`|the files)", line)]
    packages = [re.search(r"`(\w+)/`", row) for row in rows[1:]]
    assert [found[1] for found in packages] == list(reversed(LAYERS[:-1])) and "commands" in rows[0]
