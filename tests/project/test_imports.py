"""The layers of docs/structure.md: every import of inpo_fast goes down, kernels and bench keep to their own rules."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# from the bottom up: a package imports from those before it and from itself; the commands are the files of inpo_fast/
LAYERS = (
    "runtime",
    "method",
    "models",
    "data",
    "caches",
    "judges",
    "comparison",
    "config",
    "report",
    "handover",
    "training",
    "cost",
    "pocket",
    "commands",
)
OLD_NAMES = {"inpo_fast.data.validate"}  # commands that moved: the old name starts the new one


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = ("inpo_fast", "kernels", "bench")
TREES = {module_name(p): ast.parse(p.read_text()) for folder in PACKAGES for p in sorted((ROOT / folder).rglob("*.py"))}
KERNELS = [name for name in TREES if name.startswith("kernels")]
TESTS = {path.stem for path in (ROOT / "tests").rglob("*.py")}
MODULES = [name for name in TREES if name.startswith("inpo_fast.") and name not in OLD_NAMES]
BENCH = [name for name in TREES if name.startswith("bench.")]


def package(name: str) -> str:
    part = name.split(".")[1]
    return part if (ROOT / "inpo_fast" / part).is_dir() else "commands"


def imports(tree: ast.AST, in_functions: bool = True) -> set[str]:
    """Dotted names that a module imports; in_functions=False: when it is imported itself."""
    found, front = set(), [tree]
    while front:
        node = front.pop()
        if isinstance(node, ast.Import):
            found |= {_in_the_tree(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import of {node.module}"
            module = _in_the_tree(node.module)
            below = {f"{module}.{alias.name}" for alias in node.names}
            found |= below | ({module} if below - TREES.keys() else set())  # a file, or a name out of one
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            front += ast.iter_child_nodes(node)
    return found


def _in_the_tree(module: str) -> str:
    """kernels/ is imported as inpo_kernels."""
    return module.replace("inpo_kernels", "kernels", 1) if module.startswith("inpo_kernels") else module


NEEDS = {name: imports(tree) for name, tree in TREES.items()}


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_the_package():
    assert {"inpo_fast.training.step", "inpo_fast.data.loader", "inpo_fast.train"} <= set(MODULES)
    assert "inpo_fast.data.order" in NEEDS["inpo_fast.data.loader"]  # from inpo_fast.data.order import ...
    assert "inpo_fast.runtime.keyed_rng" in NEEDS["inpo_fast.data.loader"]  # from inpo_fast.runtime import keyed_rng
    assert "inpo_fast.training.loop" in NEEDS["inpo_fast.train"]  # inside main()
    assert "inpo_fast.training.loop" not in imports(TREES["inpo_fast.train"], in_functions=False)
    assert {package(name) for name in MODULES} == set(LAYERS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    own = LAYERS.index(package(name))
    up = [
        need
        for need in NEEDS[name]
        if need in TREES and need.startswith("inpo_fast.") and LAYERS.index(package(need)) > own
    ]
    assert not up, f"{name} ({LAYERS[own]}) imports from above: {up}"


@pytest.mark.parametrize("name", [*MODULES, *BENCH, *KERNELS])
def test_no_circle(name):
    """Imports inside functions count: they are as much a circle, only later."""
    seen, front = set(), [name]
    while front:
        new = {need for need in NEEDS[front.pop()] if need in TREES} - seen
        seen |= new
        front += new
    assert name not in seen


@pytest.mark.parametrize("name", MODULES)
def test_nothing_hides_a_circle(name):
    text = ast.unparse(TREES[name])
    assert not {
        word for word in ("TYPE_CHECKING", "import_module", "__import__", "run_module", "run_path") if word in text
    }


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_need_torch_and_triton_only(name):
    assert top(NEEDS[name]) <= {"torch", "triton", "kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("inpo_fast")])
def test_package_never_imports_bench_or_tests(name):
    assert not top(NEEDS[name]) & {"bench", "tests", *TESTS}
    assert "from kernels" not in ast.unparse(TREES[name])  # their name is inpo_kernels


@pytest.mark.parametrize("name", [name for name in BENCH if name.count(".") > 1])
def test_folders_of_bench_keep_apart(name):
    """Each imports what lies on top of bench/, but for what reads all of them, and no other folder."""
    folder = name.rpartition(".")[0]
    allowed = {"bench.results", "bench.report", "bench.interpreter"}
    assert {need for need in NEEDS[name] & TREES.keys() if need.startswith("bench.")} <= allowed | {
        other for other in BENCH if other.startswith(f"{folder}.")
    }


def test_no_file_is_a_grab_bag():
    names = {name.split(".")[-1] for name in TREES} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "manager"}
