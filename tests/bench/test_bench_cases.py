"""The kernel benchmarks held against their own rules: wrong values are refused, what is off is never a result."""

import ast
import contextlib
import dataclasses
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import Forked, run_code
from torch.utils._pytree import tree_leaves

from bench import interpreter, report, results
from bench.kernels.case import Case, all_cases, check, copy, deviation, provide
from bench.kernels.clock import Ceilings, Replay, timing
from bench.step import predictions

CASES = all_cases()
TINY = {str(case): case for case in CASES if not case.real}
ERRORS, IN_PLACE = TINY["errors-forward-tiny-float32"], TINY["ddim_step-plain-tiny-float32"]


def test_every_kernel_has_tiny_and_real_cases():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert {case.kernel for case in CASES} == {case.kernel for case in TINY.values()}
    assert {case.kernel for case in CASES} == {case.kernel for case in CASES if case.real}
    assert all(case.bytes > 0 and case.flops > 0 for case in CASES)


@pytest.mark.parametrize("case", TINY.values(), ids=str)
def test_empty_arguments_are_laid_out_as_the_random_ones(case):
    layout = lambda args: [(x.shape, x.stride(), x.dtype) for x in tensors(args)]  # noqa: E731
    assert layout(case.empty("cpu")) == layout(case.make("cpu"))
    first, again = tensors(case.make("cpu")), tensors(case.make("cpu"))
    assert all(torch.equal(x, y) and x.any() for x, y in zip(first, again, strict=True))


def tensors(args) -> list[torch.Tensor]:
    return [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]


def scaled(case: Case, by: float) -> Case:
    def wrong(*args):
        e, r = case.eager(*args)
        return e, r * by

    return dataclasses.replace(case, ours=wrong)


def test_wrong_values_are_refused():
    check(scaled(ERRORS, 1.0), "ours", provide(scaled(ERRORS, 1.0), "ours"), ERRORS.make("cpu"))
    for by in (1.001, math.nan):
        case = scaled(ERRORS, by)
        with pytest.raises(AssertionError, match=r"result 1 of ours is off by .* nothing is timed"):
            check(case, "ours", provide(case, "ours"), case.make("cpu"))
    narrow = dataclasses.replace(ERRORS, ours=lambda *args: [x.half() for x in ERRORS.eager(*args)])
    with pytest.raises(AssertionError, match="dtypes"):
        check(narrow, "ours", narrow.ours, narrow.make("cpu"))
    unwritten = dataclasses.replace(ERRORS, ours=lambda *args: [torch.empty(3), torch.empty(3)])
    with pytest.raises(AssertionError, match="off by nan"):
        check(unwritten, "ours", unwritten.ours, unwritten.make("cpu"))


def test_an_op_in_place_is_checked_on_copies():
    args = IN_PLACE.make("cpu")
    before = copy(args)
    check(IN_PLACE, "eager", IN_PLACE.eager, args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))
    with pytest.raises(AssertionError, match="off by"):
        check(IN_PLACE, "ours", lambda *args: None, args)


def test_deviation_is_relative_to_the_larger_of_value_and_rms():
    largest, rms = deviation(torch.tensor([3.3, 0.1, 0.0]), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    assert largest == pytest.approx(0.1, rel=1e-6) and rms == pytest.approx((0.1 / 9) ** 0.5, rel=1e-6)


BREAK = """
import dataclasses, json, os, sys, pytest
os.chdir(sys.argv[2])
for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # not under xdist
    del os.environ[name]
class Broken:
    def pytest_itemcollected(self, item):
        case = item.callspec.params["case"]
        wrong = lambda *args: [1.01 * x for x in case.eager(*args)]
        item.callspec.params["case"] = dataclasses.replace(case, ours=wrong, public=wrong)
ends = []
for words in json.loads(sys.argv[1]):
    print("RUN")
    ends.append(int(pytest.main(words, plugins=[Broken()])))
print("RUN", ends)
"""


def test_a_broken_kernel_fails_the_benchmark_and_leaves_no_result(tmp_path):
    """As values and as times, one after the other in one process."""
    modes = {"--check": "ours", "--benchmark-only": "cpu path"}
    words = ["bench/kernels/bench_errors.py", "-k", "errors-forward-tiny-float32", "--results", str(tmp_path)]
    asked = json.dumps([[*words, mode] for mode in modes])
    # a GPU times real shapes only
    place = tmp_path.with_name(f"{tmp_path.name}-process")
    process = Forked(place, run_code, BREAK, asked, str(results.ROOT), CUDA_VISIBLE_DEVICES="")
    process.wait()
    said = process.said.read_text()
    _, *runs, ends = said.split("RUN")
    assert ends.strip() == "[1, 1]", said + process.complaints.read_text()
    for said, failed in zip(runs, modes.values(), strict=True):
        assert "nothing is timed" in said
        assert f"FAILED bench/kernels/bench_errors.py::test_errors[errors-forward-tiny-float32-{failed}]" in said
    assert not list(tmp_path.iterdir())


class FakeGraph:
    """A CUDA graph on the CPU: calls made during the capture are made again by a replay, into the same results."""

    def __init__(self, stale: bool) -> None:
        self.recorded, self.capturing, self.stale = [], False, stale

    def call(self, function):
        def recorded(*args):
            out = function(*args)
            if self.capturing:
                self.recorded.append((function, args, out))
            return out

        return recorded

    @contextlib.contextmanager
    def capture(self, graph):
        self.recorded, self.capturing = [], True
        yield
        self.capturing = False

    def replay(self):
        for function, args, out in [] if self.stale else self.recorded:
            for x, y in zip(tree_leaves(out), tree_leaves(function(*args)), strict=True):
                x.copy_(y)


@pytest.fixture
def fake_cuda(monkeypatch):
    def install(stale: bool = False) -> FakeGraph:
        fake = FakeGraph(stale)

        class Event:
            record = lambda self: setattr(self, "at", time.perf_counter())  # noqa: E731
            elapsed_time = lambda self, end: 1000 * (end.at - self.at)  # noqa: E731
            synchronize = lambda self: None  # noqa: E731

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50_000),
            "mem_get_info": lambda: (10**9, 10**9),
            "Event": lambda enable_timing: Event(),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda other: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "CUDAGraph": lambda: fake,
            "graph": fake.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        return fake

    return install


@pytest.mark.parametrize("case", [ERRORS, IN_PLACE], ids=str)
def test_replay_rotates_buffers_and_compares_what_the_graph_computes(case, fake_cuda):
    """The control flow only; what a GPU does is seen on a GPU."""
    fake = fake_cuda()
    timed = Replay(case, "eager", fake.call(case.eager), case.make("cpu"))
    used = [args[0].data_ptr() for _, args, _ in fake.recorded]
    assert len(set(used)) == len(timed.sets) > 1 and timed.calls == len(used)
    assert len(set(used[: len(timed.sets)])) == len(timed.sets)
    for _ in range(timed.rounds):
        timed.restore()
        timed.sample()
    t = timing(timed)
    assert 0 < t.p20 <= t.p50 <= t.p80 and t.n == timed.rounds >= 20
    fake = fake_cuda(stale=True)
    with pytest.raises(AssertionError, match="off by"):
        Replay(case, "eager", fake.call(case.eager), case.make("cpu"))


def test_share_of_the_ceiling_that_binds():
    ceilings = Ceilings(copy_gb_s=1000, matmul_tflop_s=100)
    case = dataclasses.replace(ERRORS, bytes=10**9, flops=10**9)  # 1 ms, 0.01 ms
    assert ceilings.share(case, 2.0) == (0.5, "copy")
    assert ceilings.share(dataclasses.replace(case, flops=10**12), 20.0) == (0.5, "matmul")


ALLOWED = {"torch", "triton", "numpy", "pytest", "inpo_kernels", "bench"} | set(sys.stdlib_module_names)


def test_kernel_benchmarks_need_nothing_but_torch_and_triton():
    bench = results.ROOT / "bench"
    kernels = [path for path in (bench / "kernels").glob("*.py") if path.stem != "attention"]
    assert any(path.stem == "bench_errors" for path in kernels)
    names = ("conftest", "results", "report", "gpu", "interpreter", "step/predictions")
    for path in [*kernels, *(bench / f"{name}.py" for name in names)]:
        tree = ast.parse(path.read_text())
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in found} <= ALLOWED, path.name


def line(provider: str, ms: float, **more) -> dict:
    made = {"commit": "abc", "dirty": False, "device": "GPU", "gpu": True, "torch": "2", "triton": "3", "utc": "1"}
    case = {"kernel": "errors", "op": "forward", "shape": "s", "dtype": "float32", "provider": provider}
    rates = {"p50_ms": ms, "n": 100, "gb_s": 1 / ms, "tflop_s": 0.0, "share": 0.25, "ceiling": "copy"}
    return made | case | rates | {"copy_gb_s": 4000.0, "matmul_tflop_s": 700.0} | more


def test_report(tmp_path, capsys):
    assert report.table([]) == report.table([line("cpu path", 1, gpu=False)]) == report.NOT_MEASURED
    text = report.table([line("ours", 9.0), line("eager", 4.0), line("torch.compile", 1.0), line("ours", 0.5)])
    assert "| errors | forward | s | float32 | 4 | 1 | 0.5 | 2.00 | 2 GB/s | 25% |" in text  # the newest of ours
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    report.write_between(page, "bench", "new")
    assert page.read_text() == "before\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nafter\n"
    report.write_between(page, "other", "new")
    assert "nothing written" in capsys.readouterr().out and "other" not in page.read_text()


def test_a_half_written_line_is_left_out(tmp_path):
    results.record(tmp_path, {"kernel": "errors"})
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '{"kernel": "err')
    assert [x["kernel"] for x in results.load(tmp_path)] == ["errors"]


def step_line(provider: str, **more) -> dict:
    made = {"commit": "abc", "dirty": False, "device": "NVIDIA H200", "gpu": True, "utc": "1", "sources": "s"}
    what = {"kernel": "train_step", "op": "sd15", "shape": "512px", "dtype": "bf16", "provider": provider, "pairs": 64}
    how = {"micro_batch": 16, "threads": 1, "against": "plain", "gradient_error": 0.05, "gradient_allowed": 0.1}
    rate = {"pairs_s": 16.0, "ratio": 1.5, "ratio_range": [1.4, 1.6], "gpu_hours_recipe": 7.1, "evaluations": 5.48}
    rest = {"peak_memory": 2**33, "host_waits": 1, "ms_per_pair": dict.fromkeys(predictions.COUNTED, 10.0)}
    return made | what | how | rate | rest | more


def test_a_gradient_that_is_off_never_looks_like_a_result():
    clean = report.steps_table([step_line("fused")]).splitlines()[-1]
    assert "| fused | 16 | **1.50x** plain (1.40 to 1.60) | 7.10 | 8.0 GiB | 1 |" in clean and "off" not in clean
    for error in (0.11, math.nan):
        off = report.steps_table([step_line("fused", gradient_error=error)]).splitlines()[-1]
        assert f"**gradient off by {error:.2g}, allowed 0.1**" in off
        assert "| **not valid** (16) | **not valid** (1.50x plain (1.40 to 1.60)) | **not valid** (7.10) |" in off
    first = report.steps_table([step_line("plain", gradient_error=None)]).splitlines()[-1]
    assert "| plain | 16 | 1 | 7.10 |" in first


def test_steps_of_other_sizes_are_lines_of_their_own():
    """A small run beside the naive loop must not take the place of the large one."""
    small = step_line("plain", pairs=6, micro_batch=6, against="naive", pairs_s=9.0)
    text = report.steps_table([step_line("plain"), small, step_line("plain", pairs_s=17.0)])
    assert text.count("\n") == 3 and "| 17 |" in text and "| 9 |" in text and "**1.50x** naive" in text
    failed = step_line("fused", out_of_memory=True)
    del failed["pairs_s"], failed["ratio"], failed["ms_per_pair"], failed["peak_memory"]
    assert "| fused | **out of memory** | - |" in report.steps_table([failed])
    assert "No measured step" in predictions.comparison([failed])


def test_predictions_stand_beside_what_was_measured():
    predicted = predictions.ms_per_pair("H200")
    measured = predicted | {"encode": predicted["encode"] + 3, "invert": predicted["invert"] - 5}
    text = predictions.comparison([step_line("fused", ms_per_pair=measured)])
    assert f"| encode | {predicted['encode']:.1f} | {measured['encode']:.1f} | 1.28 |" in text
    assert f"| wall | {sum(predicted.values()):.1f} | 62.5 | 1.11 |" in text
    assert "predicted by a model" in text and "Largest gap: invert, -5.0 ms a pair (0.80 times" in text
    assert "not a result" not in text
    off = predictions.comparison([step_line("fused", ms_per_pair=measured, gradient_error=0.2)])
    assert off.startswith("**Gradient off: not a result.**")
    more = predictions.comparison([step_line("fused", ms_per_pair=measured, evaluations=2 * 5.48)])
    assert f"| invert | {2 * predicted['invert']:.1f} |" in more
    for other in ({"provider": "plain"}, {"device": "NVIDIA A100"}, {"dtype": "fp32"}, {"shape": "256px"}):
        assert "No measured step" in predictions.comparison([step_line("fused") | other])


def test_the_document_has_the_same_predictions():
    page = (results.ROOT / "docs" / "performance.md").read_text()
    assert predictions.table() in page
    totals = {"H200": (17.8, 21.9, 5.19), "H100": (16.5, 20.6, 5.51)}  # what the rates were chosen to give
    for card, (in_loop, precomputed, hours) in totals.items():
        assert predictions.pairs_s(card) == pytest.approx(in_loop, rel=0.01)
        assert predictions.pairs_s(card, precomputed=True) == pytest.approx(precomputed, rel=0.01)
        assert 400 * 1024 / predictions.pairs_s(card, True) / 3600 == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.6.0", "2.10.1", False), ("3.7.1", "2.5.2", True)],
)
def test_where_tritons_interpreter_does_not_run_is_said_in_one_line(triton, numpy, runs):
    line = interpreter.broken(triton, numpy)
    assert runs == (line == "") and "\n" not in line
    assert runs or f"Triton {triton}'s interpreter needs numpy < 2.4 and this is {numpy}" in line


def test_only_what_the_interpreter_cannot_run_is_skipped(monkeypatch):
    def end(problem: Exception) -> BaseException:
        hook = interpreter.pytest_pyfunc_call()
        next(hook)
        try:
            hook.throw(problem)
        except BaseException as raised:  # also the one that would skip this test
            return raised

    known, other = RuntimeError(f"TypeError('{interpreter.SYMPTOM}')"), AssertionError("wrong values")
    with monkeypatch.context() as here:  # the hook is around this test, too: it must see nothing of this
        here.setattr(interpreter, "BROKEN", "it cannot")
        skipped, wrong = end(known), end(other)
        here.setattr(interpreter, "BROKEN", "")
        elsewhere = end(known)
    assert isinstance(skipped, pytest.skip.Exception) and str(skipped) == "it cannot"
    assert (wrong is other, elsewhere is known) == (True, True)
