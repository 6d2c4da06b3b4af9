"""The compiling command: no problem in any launch of ours, and every problem in kernels that are bad on purpose."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100)]  # a minute of one core each, at first


def compile_kernels(folder: Path, *options: str, **environment: str) -> tuple[int, list[dict], str]:
    table = folder / "kernels.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.kernels.compile", "--json", str(table), *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
    )
    assert table.exists(), run.stdout + run.stderr
    return run.returncode, json.loads(table.read_text())["launches"], run.stdout + run.stderr


def launched() -> set[tuple[str, str]]:
    """(module, function) wherever kernels/ says function[grid](...)."""
    found = set()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        tree = ast.parse(path.read_text())
        origin = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                found.add(origin.get(name, (f"inpo_kernels.{path.stem}", name)))
    return found


@pytest.mark.parametrize("arch", [90, *SLOW])
def test_every_launch_compiles_and_does_not_spill(arch, tmp_path):
    status, launches, said = compile_kernels(tmp_path, "--arch", str(arch))
    assert status == 0, said
    assert launched() >= {("inpo_kernels.errors", "_fwd"), ("inpo_kernels.ddim_step", "_step")}
    without_case = launched() - {(x["module"], x["function"]) for x in launches}
    assert not without_case, f"no real case in bench/kernels leads to {without_case}"
    for x in launches:
        assert x["arch"] == arch and x["registers"] > 0 and x["stores"] and not x["spill_stores"] + x["spill_loads"], x


BAD = """
import os
from types import SimpleNamespace

import torch
import triton
import triton.language as tl


@triton.jit
def good(p, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p + o, tl.load(p + o) + 1)


@triton.jit
def spilling(p, BLOCK: tl.constexpr):  # all of x is alive during the sum
    o = tl.arange(0, BLOCK)
    x = tl.load(p + o)
    tl.store(p + o, x - tl.sum(x))


@triton.jit
def misspelt(p):
    tl.store(p, absent)


@triton.jit
def calls_misspelt(p):
    misspelt(p)


@triton.jit
def large(p, N: tl.constexpr):  # read by rows, written by columns: all of it passes through shared memory
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(p + row * N + column)
    tl.debug_barrier()
    tl.store(p + column * N + row, x)


def case(name, ours, real=True):
    empty = lambda device: (torch.empty(1 << 16, device=device),)
    return SimpleNamespace(kernel=name, op="op", shape="any", dtype=torch.float32, real=real, empty=empty, ours=ours)


CASES = [
    case("good", lambda p: good[(1, 2)](p, BLOCK=4096)),
    case("good", lambda p: good[(1,)](p[1:], BLOCK=4096)),
    case("tiny", lambda p: misspelt[(1,)](p), real=False),
    case("spilling", lambda p: spilling[(1,)](p, BLOCK=1 << 13, num_warps=1)),
    case("misspelt", lambda p: (misspelt[(1,)](p), calls_misspelt[(1,)](p), good[(1,)](p, BLOCK=64))),
    case("large", lambda p: large[(1,)](p, N=256, num_warps=32)),
    case("far", lambda p: good[lambda meta: (1, 1 << 22 >> meta["BLOCK"] // 64)](p, BLOCK=64)),
    case("idle", lambda p: None),
    case("refused", lambda p: p.view(3)),
    case("dying", lambda p: os.abort()),
]
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "cases.py").write_text(BAD)
    words = ("--arch", "90", "--cases", str(folder / "cases.py"))
    anew = {"TRITON_INTERPRET": "1", "TRITON_ALWAYS_COMPILE": "1"}  # it starts again without the interpreter
    status, launches, said = compile_kernels(folder, *words, **anew)
    assert status == 1
    return launches, said


def of(bad, kernel: str) -> list[dict]:
    return [x for x in bad[0] if x["kernel"] == kernel]


def test_a_good_launch_is_no_problem_and_alignment_counts(bad):
    widths = [x["loads"] for x in of(bad, "good")]
    assert sorted(widths, key=str) == [{"16": 8}, {"4": 32}]  # 4096 elements, 128 threads; the second case is unaligned
    assert not any(x["problem"] for x in of(bad, "good"))


def test_a_spill_is_noticed(bad):
    (x,) = of(bad, "spilling")
    assert x["function"] == "spilling" and x["spill_stores"] > 0 and x["spill_loads"] > 0
    assert x["problem"] == f"spills: {x['spill_stores']} bytes stored, {x['spill_loads']} loaded"


def test_a_kernel_that_does_not_compile_is_named_and_the_next_goes_on(bad):
    problems = {x["function"]: x["problem"] for x in of(bad, "misspelt")}
    assert problems.keys() == {"misspelt", "calls_misspelt", "good"}
    assert "absent is not defined" in problems["misspelt"] and "absent is not defined" in problems["calls_misspelt"]
    assert not problems["good"]
    assert "Traceback" not in bad[1] and "misspelt misspelt sm_90 (op any float32): CompilationError" in bad[1]


@pytest.mark.parametrize(
    ("kernel", "problem"),
    {
        "large": "bytes of shared memory",
        "far": "only its first axis may exceed 65535",
        "idle": "launches no kernel",
        "refused": "RuntimeError: shape '[3]' is invalid",
        "dying": "the compiler died with -6",
    }.items(),
)
def test_what_would_fail_on_the_gpu_is_a_problem(bad, kernel, problem):
    (x,) = of(bad, kernel)
    assert problem in x["problem"]


def test_tiny_cases_are_not_compiled(bad):
    assert not of(bad, "tiny")


def test_under_the_interpreter_it_starts_again_without(bad):
    assert all(x["registers"] > 0 for x in of(bad, "good")), bad[1]
