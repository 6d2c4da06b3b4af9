"""What one benchmark of a kernel compares: one op, one shape, one dtype, several ways to compute it, and the truth.

A file bench_KERNEL.py beside this one lists its cases in CASES and has one test, `def test_KERNEL(measure, case,
provider): measure(case, provider)`; bench/conftest.py supplies the three. Needs torch only, beside what the cases
import.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Function = Callable[..., Any]  # tensors and lists of tensors in and out

# Allowed deviation() of a result by its dtype, for ops that compute in fp32 and round once. fp32: sums in another
# order. Narrow types: an ulp (Triton's interpreter truncates bf16 where a GPU rounds to nearest), a little for sums.
STORED = {torch.float32: 1e-5, torch.float16: 1.05 * 2.0**-10, torch.bfloat16: 1.05 * 2.0**-7}
STORED_BECAUSE = "fp32 arithmetic, one rounding to the stored dtype"


@dataclass(frozen=True)
class Case:
    """A line of every table. `eager`, `ours`, `public` and `exact` take what `make` returns and give the same results.

    Each returns a tensor, or a tuple of tensors; one that returns None left its results in the arguments it `writes`.
    """

    kernel: str  # the file in kernels/, without .py
    op: str  # forward, backward, forward+backward, step, ...
    shape: str  # its name: "sd15 64x64 16 pairs"
    dtype: torch.dtype  # of the large tensors
    real: bool  # a shape of SD1.5 or SDXL; otherwise a tiny one, small enough for Triton's interpreter
    make: Callable[[Any], tuple]  # device -> arguments: random, dense, the same on every call; works on "meta" (Draw)
    eager: Function  # plain torch as the field writes it, the same dtypes in and out as ours
    ours: Function  # the custom op itself, never the public function, which on the CPU is the reference
    exact: Function  # the truth: called with every floating-point argument in float64
    bytes: int  # device memory that must move: each input read once, each output written once
    flops: int  # arithmetic that must be done, 2 for a multiply-add
    tolerance: float = 0.0  # largest deviation() allowed; 0: STORED of each result's dtype, equality for integers
    because: str = STORED_BECAUSE  # why that much
    eager_tolerance: float = 0.0  # of eager and torch.compile, where they round more often than ours; 0: the same
    writes: tuple[int, ...] = ()  # in place: positions of the arguments that the results are in (others may change too)
    public: Function | None = None  # the public function, for its path on the CPU; None: it has none
    uncompiled: str = ""  # why there is no torch.compile beside eager, where it refuses eager

    def __str__(self) -> str:
        return f"{self.kernel}-{self.op}-{self.shape}-{str(self.dtype).removeprefix('torch.')}".replace(" ", "_")

    def allowed(self, provider: str, result: torch.dtype) -> float:
        own = self.tolerance or STORED.get(result, 0.0)
        return self.eager_tolerance or own if provider in ("eager", "torch.compile") else own

    def empty(self, device) -> tuple:
        """The arguments uninitialised: shapes, strides and dtypes of `make`, without its cost."""

        def blank(x):
            if not isinstance(x, torch.Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        return tree_map(blank, self.make("meta"))


class Draw:
    """Seeded random tensors on any device; on "meta" only shapes. Never zeros: they hide errors and run faster."""

    def __init__(self, device, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0, mean: float = 0.0):
        if self.generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return x.mul_(std).add_(mean).to(dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        x = torch.rand(shape, generator=self.generator, device=self.device)
        return x.mul_(high - low).add_(low).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """low <= x < high"""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Gradient:
    """A differentiable function and its gradient as one call: (*inputs, *upstream) -> (*outputs, *gradients).

    For "forward+backward": the same wrapper around the eager function, our op and the reference.
    """

    forward: Function
    of: tuple[int, ...] = (0,)  # positions of the inputs that get a gradient
    upstream: int = 1  # the last arguments: gradients of the first so many outputs

    def __call__(self, *args):
        inputs, upstream = list(args[: -self.upstream]), args[-self.upstream :]
        for i in self.of:
            inputs[i] = inputs[i].detach().requires_grad_()
        out = self.forward(*inputs)
        out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
        gradients = torch.autograd.grad(out[: self.upstream], [inputs[i] for i in self.of], upstream)
        return (*(x.detach() for x in out), *gradients)


def provide(case: Case, provider: str) -> Function:
    """The function behind a provider's name. torch.compile must take it whole: no silent fall back to eager."""
    if provider == "ours":
        return case.ours
    if provider == "cpu path":
        return case.public
    if provider == "eager":
        return case.eager
    assert provider == "torch.compile", provider
    torch._dynamo.reset()  # else the ninth shape of one function would meet the recompile limit
    if isinstance(case.eager, Gradient):
        return replace(case.eager, forward=torch.compile(case.eager.forward, fullgraph=True, dynamic=False))
    return torch.compile(case.eager, fullgraph=True, dynamic=False)


def copy(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)


def outputs(case: Case, function: Function, args: tuple) -> list[torch.Tensor]:
    """What a call gives, as a list of tensors; `args` are written to by an in-place op."""
    out = function(*args)
    return tree_leaves([args[i] for i in case.writes] if out is None else out)


def truth(case: Case, args: tuple) -> list[torch.Tensor]:
    def wide(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True)

    return outputs(case, case.exact, tree_map(wide, args))


def deviation(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Largest and rms error, relative: an element's to its size or, where that is larger, to the rms of all."""
    want = want.double()
    off = (got.double() - want).abs()
    rms = want.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (off / want.abs().clamp_min(rms)).max().item(), (off.square().mean().sqrt() / rms).item()


def check(case: Case, provider: str, function: Function, args: tuple) -> tuple[float, float]:
    """The deviation of a provider's results from the truth; AssertionError where it is more than the case allows.

    `args` stay as they are. Our op runs with NaN in all uninitialised memory: an element it does not write fails.
    """
    wanted = truth(case, args)
    with poisoned(provider == "ours"):
        got = outputs(case, function, copy(args))
    alike = outputs(case, case.eager, copy(args))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in alike], (
        f"{case}: {provider} and eager give different shapes or dtypes: nothing is timed\n"
        f"{[(x.shape, x.dtype) for x in got]}\n{[(x.shape, x.dtype) for x in alike]}"
    )
    return judge(case, provider, got, wanted)


def judge(case: Case, provider: str, got: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[float, float]:
    """Largest and rms deviation over all results; AssertionError where one is more than the case allows."""
    each = [deviation(x, y) for x, y in zip(got, wanted, strict=True)]
    for i, (x, (worst, rms)) in enumerate(zip(got, each, strict=True)):
        allowed = case.allowed(provider, x.dtype)
        if not worst <= allowed:  # NaN is refused too
            raise AssertionError(
                f"{case}: result {i} of {provider} is off by {worst:.2e} (largest), {rms:.2e} (rms); "
                f"allowed {allowed:.2e}, {case.because}: nothing is timed"
            )
    return max(worst for worst, _ in each), max(rms for _, rms in each)


@contextmanager
def poisoned(really: bool = True):
    """Uninitialised memory is filled with NaN, which torch does in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if really:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def all_cases() -> list[Case]:
    """The cases of every bench_*.py."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [case for name in names for case in importlib.import_module(f"bench.kernels.{name}").CASES]
