"""The imports of inpo_fast, kernels and bench against the layers of the design: one way, no circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGES = ("inpo_fast", "kernels", "bench")
TREES = {module_name(p): ast.parse(p.read_text()) for folder in PACKAGES for p in sorted((ROOT / folder).rglob("*.py"))}


def imports(node: ast.AST, functions: bool) -> set[str]:
    """Dotted names imported below a node, TYPE_CHECKING blocks left out; those inside functions only if asked for."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"relative import of {child.module}"
            found |= {child.module} | {f"{child.module}.{alias.name}" for alias in child.names}
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imports(child, functions)
    return found


NEEDS = {name: imports(tree, functions=True) for name, tree in TREES.items()}


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """Every module of ours that is imported when `start` is, itself included only if there is a circle."""
    seen, front = set(), [start]
    while front:
        new = {name for name in edges[front.pop()] if name in TREES} - seen
        seen |= new
        front += new
    return seen


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_the_house():
    assert {"inpo_fast.step", "inpo_fast.data.windows", "kernels.errors", "bench.naive"} <= TREES.keys()
    assert "inpo_fast.data.order" in NEEDS["inpo_fast.data.windows"]  # from inpo_fast.data.order import ...
    assert "inpo_fast.draws" in NEEDS["inpo_fast.data.windows"]  # from inpo_fast import draws
    assert "inpo_fast.schedule" in reachable("inpo_fast.train", NEEDS)


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("kernels")])
def test_kernels_need_torch_and_triton_only(name):
    assert not top(NEEDS[name]) & {"inpo_fast", "bench", "tests", "diffusers", "transformers", "numpy"}


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("inpo_fast")])
def test_package_never_imports_bench_or_tests(name):
    assert not top(NEEDS[name]) & {"bench", "tests", "kernels"}  # the kernels' name is inpo_kernels


@pytest.mark.parametrize("name", [name for name in TREES if name.startswith("inpo_fast")])
def test_no_circle_at_module_level(name):
    edges = {module: imports(tree, functions=False) for module, tree in TREES.items()}
    assert name not in reachable(name, edges)


LOW = ["draws", "refusal", "files", "schedule", "inversion", "objectives", "models", "optim", "checkpoint", "config"]
LOW += [name.removeprefix("inpo_fast.") for name in TREES if name.startswith("inpo_fast.data.")]
RULES = [(low, {"step", "train"}) for low in LOW] + [(name, {"train"}) for name in ("step", "evaluate", "sample")]


@pytest.mark.parametrize(("name", "forbidden"), RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_layers(name, forbidden):
    reached = reachable(f"inpo_fast.{name}", NEEDS)
    assert not reached & {f"inpo_fast.{other}" for other in forbidden}


def test_no_file_is_a_grab_bag():
    names = {name.split(".")[-1] for name in TREES} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "manager"}
