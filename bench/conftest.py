"""Runs the cases of bench_*.py: values first, then times.

    pytest bench --benchmark-only     times every case on a GPU; without one only the CPU path, and says so
    pytest bench --check              no timing: every op against float64, on the CPU in Triton's interpreter

pytest-benchmark is used where it is installed; the numbers in bench/results are ours either way
(bench/kernels/clock.py).
"""

import os
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import interpreter, results  # interpreter first: before anything imports triton
from bench.kernels.case import Case, check, provide
from bench.kernels.clock import Calls, Replay, ceilings, timing

CUDA = interpreter.CUDA
if not CUDA:
    torch.set_num_threads(1)
pytest_pyfunc_call = interpreter.pytest_pyfunc_call
LINES: list[dict] = []  # of this run, for the summary
CPU_ONLY = "no CUDA device: no kernel's speed is measured, only the `cpu path` of the public functions at tiny shapes"


def pytest_addoption(parser, pluginmanager):
    parser.addoption("--check", action="store_true", help="benchmarks: compare values, time nothing")
    parser.addoption("--results", type=Path, default=results.FOLDER, help="benchmarks: folder for the JSON lines")
    parser.addoption("--missing", action="store_true", help="benchmarks: only what --results lacks for these sources")
    if not pluginmanager.hasplugin("benchmark"):
        parser.addoption("--benchmark-only", action="store_true", help="accepted: pytest-benchmark is not installed")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(StandIn())
    if hasattr(config, "workerinput") and not config.option.check:
        raise pytest.UsageError("timing wants the machine for itself: run the benchmarks without -n")


def pytest_collection_finish():
    interpreter.patch_once()


def pytest_report_header(config):
    if not CUDA and not config.option.check:
        return CPU_ONLY
    return interpreter.BROKEN or None


class StandIn:
    """As much of pytest-benchmark as is needed here."""

    @pytest.fixture
    def benchmark(self):
        return self

    def pedantic(self, function, setup, rounds):
        self.extra_info = {}
        for _ in range(rounds):
            setup()
            function()


def providers(case: Case, only_check: bool) -> list[str]:
    if only_check:
        return ["eager", "ours"] if CUDA or not case.real else []
    if CUDA:
        compiled = [] if case.uncompiled else ["torch.compile"]
        return ["eager", *compiled, "ours"] if case.real else []
    return ["cpu path"] if case.public and not case.real else []


def pytest_generate_tests(metafunc):
    if "measure" not in metafunc.fixturenames:
        return
    only_check = metafunc.config.option.check
    pairs = [(case, name) for case in metafunc.module.CASES for name in providers(case, only_check)]
    metafunc.parametrize("case, provider", pairs, ids=[f"{case}-{name}" for case, name in pairs])


def pytest_itemcollected(item):
    """Timing asks for pytest-benchmark's fixture, which is what --benchmark-only looks for; a check does without."""
    if "measure" in item.fixturenames and not item.config.option.check and "benchmark" not in item.fixturenames:
        item.fixturenames.append("benchmark")


@pytest.fixture
def measure(request):
    option = request.config.option
    command = shlex.join(["pytest", *request.config.invocation_params.args])

    def measure(case: Case, provider: str) -> None:
        identity = {"kernel": case.kernel, "op": case.op, "shape": case.shape, "dtype": str(case.dtype)[6:]}
        identity["provider"] = provider
        if option.missing and not option.check and _measured(option.results, identity):
            pytest.skip("measured before")
        args, function = case.make("cuda" if CUDA else "cpu"), provide(case, provider)
        largest, rms = check(case, provider, function, args)
        if option.check:
            return
        timed = (Replay if CUDA else Calls)(case, provider, function, args)
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = case.kernel
        benchmark.pedantic(timed.sample, setup=timed.restore, rounds=timed.rounds)
        if len(timed.samples) < timed.rounds:
            return  # --benchmark-disable: one call, no timing
        line = identity | _line(case, timing(timed)) | {"largest_error": largest, "rms_error": rms, "command": command}
        benchmark.extra_info.update(line)
        results.record(option.results, line)
        LINES.append(line)
        timed.__dict__.clear()  # pytest-benchmark keeps the function: free the graph and its buffers

    yield measure
    if CUDA:
        torch.cuda.empty_cache()


def _measured(folder: Path, identity: dict) -> bool:
    wanted = identity | results.provenance()
    return any(all(line.get(k) == v for k, v in wanted.items()) for line in results.load(folder))


def _line(case: Case, t) -> dict:
    line = {"p20_ms": t.p20, "p50_ms": t.p50, "p80_ms": t.p80, "n": t.n, "calls": t.calls}
    line |= {"bytes": case.bytes, "flops": case.flops}
    line |= {"gb_s": case.bytes / t.p50 / 1e6, "tflop_s": case.flops / t.p50 / 1e9}
    if CUDA:
        line["share"], line["ceiling"] = ceilings().share(case, t.p50)
        line |= asdict(ceilings())
    return line


def pytest_terminal_summary(terminalreporter, config):
    if not LINES:
        return
    say = terminalreporter.write_line
    terminalreporter.section("times of one call (p20 p50 p80)")
    for line in LINES:
        name = " ".join(line[k] for k in ("kernel", "op", "shape", "dtype", "provider"))
        ms = " ".join(f"{line[k]:9.4f}" for k in ("p20_ms", "p50_ms", "p80_ms"))
        rate = ""
        if CUDA:
            rate = (
                f"  {line['gb_s']:7.1f} GB/s {line['tflop_s']:7.2f} TFLOP/s {line['share']:4.0%} of {line['ceiling']}"
            )
        say(f"{name:72} {ms} ms  n {line['n']:3}{rate}")
    if CUDA:
        say(f"ceilings: copy {ceilings().copy_gb_s:.0f} GB/s, bf16 matmul {ceilings().matmul_tflop_s:.0f} TFLOP/s")
    else:
        say(CPU_ONLY)
    say(f"added to {os.path.relpath(config.option.results)}")
