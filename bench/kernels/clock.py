"""Times the calls of a case: on a GPU by replaying a CUDA graph over rotated buffers, between CUDA events.

And the ceilings that such times are held against: copying device memory, and multiplying bf16 matrices.
"""

import functools
import math
import time
from dataclasses import dataclass
from timeit import timeit

import torch
from torch.utils._pytree import tree_leaves

from bench.kernels.case import Case, Function, copy, judge, outputs, truth

ROTATION = 4  # the buffers together are this many times the L2, so that a call finds none of its own in it
MOST_COPIES = 512
SAMPLE_MS = 1.0  # a sample is so long that an event's resolution (about a microsecond) and a launch do not show
SAMPLES, SECONDS = 100, 2.0  # as many samples, unless they would take longer than so many seconds ...
FEWEST_SAMPLES = 20  # ... but never fewer


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: quantiles of n samples, each the mean over `calls` calls in a row."""

    p20: float
    p50: float
    p80: float
    n: int
    calls: int


class Replay:
    """Calls captured in a CUDA graph, each with the next of several copies of the arguments.

    What the graph computes is compared with the truth once more: a graph can hold stale pointers or copies.
    """

    def __init__(self, case: Case, provider: str, function: Function, args: tuple) -> None:
        torch.cuda.empty_cache()  # what the comparison took counts as free below
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        copies = math.ceil(ROTATION * l2 / max(1, min(size, case.bytes)))  # an op may touch a part of its arguments
        room = int(0.3 * torch.cuda.mem_get_info()[0] / max(1, size))  # results may take as much again
        self.case, self.function, self.pristine = case, function, tensors
        self.sets = [copy(args) for _ in range(max(1, min(copies, MOST_COPIES, room)))]
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.samples: list[float] = []
        self.capture(len(self.sets))
        self.verify(provider, truth(case, args))
        cycles = math.ceil(SAMPLE_MS / (self.warm_up() * self.calls))
        if cycles > 1:
            self.capture(cycles * len(self.sets))
        ms = self.warm_up() * self.calls
        self.rounds = max(FEWEST_SAMPLES, min(SAMPLES, int(1000 * SECONDS / ms)))

    def capture(self, calls: int) -> None:
        self.graph = self.kept = None  # frees an earlier graph's memory
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles and loads what a capture must not
            for args in self.sets:
                self.function(*args)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        # results are kept, or each call would write to the memory, still in the L2, that the last one left
        kept = [None] * len(self.sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                kept[call % len(kept)] = self.function(*self.sets[call % len(kept)])
        self.graph, self.kept, self.calls = graph, kept, calls

    def verify(self, provider: str, wanted: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for x in tree_leaves(self.kept):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and not self.case.writes:
                    x.fill_(math.nan)
        self.restore()
        self.graph.replay()
        torch.cuda.synchronize()
        for i in (0, -1):
            got = outputs(self.case, lambda *args, i=i: self.kept[i], self.sets[i])
            judge(self.case, provider, got, wanted)

    def restore(self) -> None:
        """Before each sample: an op in place would otherwise work on what it made of its own results."""
        for args in self.sets if self.case.writes else []:
            torch._foreach_copy_([x for x in tree_leaves(args) if isinstance(x, torch.Tensor)], self.pristine)

    def sample(self) -> float:
        begin, end = self.events
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.samples.append(begin.elapsed_time(end) / self.calls)
        return self.samples[-1]

    def warm_up(self, seconds: float = 0.1) -> float:
        until = time.perf_counter() + seconds
        taken = []
        while time.perf_counter() < until or len(taken) < 3:
            self.restore()
            taken.append(self.sample())
        self.samples.clear()
        return min(taken)


class Calls:
    """The same for a function on the CPU: a sample is one call between two looks at the clock."""

    calls, rounds = 1, 20

    def __init__(self, case: Case, provider: str, function: Function, args: tuple) -> None:
        self.case, self.function, self.args, self.samples = case, function, args, []
        for _ in range(3):
            self.restore()
            self.sample()
        self.samples.clear()

    def restore(self) -> None:
        self.fresh = copy(self.args) if self.case.writes else self.args

    def sample(self) -> float:
        begun = time.perf_counter()
        self.function(*self.fresh)
        self.samples.append(1000 * (time.perf_counter() - begun))
        return self.samples[-1]


def timing(timed: Replay | Calls) -> Timing:
    taken = timed.samples[-timed.rounds :]
    quantiles = torch.tensor(taken, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Timing(*quantiles.tolist(), len(taken), timed.calls)


@dataclass(frozen=True)
class Ceilings:
    copy_gb_s: float  # bytes read plus bytes written
    matmul_tflop_s: float  # bf16, random matrices

    def share(self, case: Case, ms: float) -> tuple[float, str]:
        """The time that the case's bytes or operations, whichever take longer, would need over the time it took."""
        floors = {"copy": case.bytes / self.copy_gb_s / 1e6, "matmul": case.flops / self.matmul_tflop_s / 1e9}
        name = max(floors, key=floors.get)
        return floors[name] / ms, name


@functools.cache
def ceilings() -> Ceilings:
    """Measured once per process, on the GPU that everything else is timed on."""
    x = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copied = median_ms(lambda: y.copy_(x))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    multiplied = median_ms(lambda: torch.mm(a, b, out=c))
    return Ceilings(2 * x.numel() * x.element_size() / copied / 1e6, 2 * n**3 / multiplied / 1e9)


def median_ms(function: Function, warm_up: int = 30, samples: int = 50, device: str = "cuda") -> float:
    if device == "cpu":
        taken = [timeit(function, number=1) for _ in range(warm_up + samples)]
        return 1000 * sorted(taken[warm_up:])[samples // 2]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(warm_up + samples):
        begin.record()
        function()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return sorted(taken[warm_up:])[samples // 2]
