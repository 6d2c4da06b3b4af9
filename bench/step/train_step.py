"""Our optimizer step against what others run, in turns in one run, and how far the gradients are apart.

    python -m bench.step [--model pocket|sd15|sdxl] [--precision fp32|bf16] [--contenders naive,lockstep,plain,…]

naive: the published script's shape (naive.py), one pair at a time, fp32 weights under autocast. lockstep: the same with
working-precision weights, batches and torch.compile on a GPU. plain, fused, compiled: inpo_fast with models.fast so
set. All draw the same pairs (their work depends on their timesteps) and noise at equal settings: grid diffusers-0.22,
the UNet conditioned on the target level, conditional inversion, n = 10, VAE and text encoders in the loop. sd15 and
sdxl have the exact architecture with random weights, drawn on the device. All but naive share one set of weights, which
lies in channels_last as soon as fused or compiled is among them.

One contender after the other is built, run once (warm-up, compilation; the gradient of this run is compared with the
first contender's) and timed once. The further turns alternate, so that other load hits all alike; spreads are the
smallest and largest of the turns. A result is written as soon as its turn has ended. A gradient that is off is
recorded beside the time, and the exit status is 1. Sizes that the memory plan (inpo_fast/cost/plan.py) does not see on
the card are halved beforehand, and once more where the device runs out of memory all the same.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench import report, results
from bench.step.contenders import BETA, CHANNELS_LAST, NAMES, OURS, SEED, STEPS, Contender, build, move_policy
from bench.step.predictions import RECIPE_PAIRS
from inpo_fast.config import RunConfig
from inpo_fast.cost.plan import RESERVE, make_plan
from inpo_fast.data.loader import DataConfig, Item, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig
from inpo_fast.method.inversion import evaluations_of
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.loading import open_pipeline, quiet_libraries
from inpo_fast.models.models import DTYPES, Models
from inpo_fast.pocket import ASSETS
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError, command_line
from inpo_fast.runtime.memory import GIB, TooLarge
from inpo_fast.runtime.phases import Stopwatch

# of the gradient's norm. fp32: sums in another order, through ten chained evaluations. bf16: autocast rounds the
# weights, ours rounds the output of each layer too; measured in docs/performance.md.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
KEYS = {"train.micro_batch": "micro_batch", "inversion.batch": "inversion_batch", "data.vae_batch": "vae_batch"}


def main() -> None:
    parser = command_line("python -m bench.step", __doc__)
    parser.add_argument("--model", default="pocket", help="pocket, sd15, sdxl, or a diffusers folder")
    parser.add_argument("--source", default=str(ASSETS / "pairs.parquet"), help="preference pairs")
    parser.add_argument("--precision", choices=tuple(BETA), default="fp32")
    parser.add_argument("--resolution", type=int, help="pixels per side; default: the model's own")
    parser.add_argument("--contenders", default="naive,plain", help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="ours: at most so many pairs per forward, backward")
    parser.add_argument("--inversion-batch", type=int, default=64, help="ours: images per inversion evaluation")
    parser.add_argument("--lockstep-batch", type=int, default=16, help="lockstep: pairs at once")
    parser.add_argument("--memory", type=float, help="GiB to plan for; default: the card's, on a CPU without end")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, help="folder for a JSON line per contender")
    asked = parser.parse_args()
    names = asked.contenders.split(",")
    if unknown := set(names) - set(NAMES):
        raise UserError(f"--contenders: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if len(set(names)) < len(names):
        raise UserError(f"--contenders={asked.contenders}: name each once")
    for size in ("pairs", "repeats", "threads", *OURS, "lockstep_batch"):
        if getattr(asked, size) < 1:
            raise UserError(f"--{size.replace('_', '-')}={getattr(asked, size)}: must be at least 1")
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # "fp32" means it: cuDNN would round to 10 bits by default
    torch.set_num_threads(asked.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory = asked.memory or (_card_memory() / GIB if device.type == "cuda" else None)
    if memory is not None:
        fit(asked, names, memory)
    begun = time.perf_counter()
    pipeline, *rest = _opened(asked, device)
    if CHANNELS_LAST & set(names):  # as in a run with models.fast: weights, masters and gradient sums lie alike
        pipeline.unet.to(memory_format=torch.channels_last)
    models = Models(pipeline, *rest)
    move_policy(models)
    _wait(device)
    weights = time.perf_counter() - begun
    print(f"weights: {weights:.1f} s", flush=True)
    pixels = asked.resolution or models.resolution
    source = open_source(asked.source)
    items = next(
        PairLoader(source, DataConfig(), resolution=pixels, seed=SEED, rank=0, world=1).steps(0, 1, asked.pairs)
    )
    made = results.provenance()
    print(
        f"{asked.model} {pixels} px {asked.precision}, {made['device']}, torch {made['torch']}, "
        f"{asked.threads} threads, n = {STEPS}, grid diffusers-0.22, VAE and text in the loop",
        flush=True,
    )
    run = Run(asked, models, device, pixels, weights)
    for name in names:
        run.add(name, items)
    for _ in range(1, asked.repeats):
        for c in run.contenders:
            run.turn(c)
    off = [c for c in run.contenders if run.is_off(c)]
    if off:
        far = ", ".join(f"{c.name} {c.gradient_error:.2g}" for c in off)
        print(_loud(f"gradient off: {far} (allowed {run.allowed:g})"), flush=True)
    failed = [c.name for c in run.contenders if c.failed]
    if failed:
        print(f"out of memory: {', '.join(failed)}", flush=True)
    if off or failed:
        raise SystemExit(1)


def fit(asked: argparse.Namespace, names: list[str], memory: float) -> None:
    """Halves micro-batch and inversion batch until the plan's count fits `memory` GiB. In place; says so.

    Beside a run's own (without an optimizer) lie the first gradient in the working precision, where there is another
    to compare, and the naive loop's fp32 policy with gradient sums in its own layout."""
    if asked.model not in ("sd15", "sdxl"):
        return
    fast = "compiled" if "compiled" in names else "off"
    models = ModelsConfig(base="", random=asked.model, precision=asked.precision, fast=fast)
    config = replace(RunConfig(), models=models, inversion=InversionConfig(batch=asked.inversion_batch))
    config = replace(config, data=replace(config.data, resolution=asked.resolution))
    plan = make_plan(config, 1)
    kept = sum(size for what, size in plan.kept.items() if not what.startswith("optimizer"))
    kept += plan.parameters * DTYPES[asked.precision].itemsize * (len(names) > 1)
    kept += 4 * plan.parameters * ("naive" in names) * (2 if CHANNELS_LAST & set(names) else 1)
    free = (memory - RESERVE) * GIB - kept
    image = plan.inversion / asked.inversion_batch
    for name, each in (("micro_batch", plan.activations), ("inversion_batch", image)):
        wanted = size = getattr(asked, name)
        while size > 1 and size * each > free:
            size //= 2
        if size < wanted:
            setattr(asked, name, size)
            print(
                f"--{name.replace('_', '-')} {size} instead of {wanted}: {kept / GIB:.1f} GiB held, "
                f"{each / GIB:.2f} each, {memory:.1f} GiB in all",
                flush=True,
            )


class Run:
    """The contenders of one call, in turns."""

    def __init__(
        self, asked: argparse.Namespace, models: Models, device: torch.device, pixels: int, weights_seconds: float
    ):
        self.asked, self.models, self.device, self.pixels = asked, models, device, pixels
        self.weights_seconds, self.allowed = weights_seconds, TOLERANCE[asked.precision]
        self.contenders: list[Contender] = []
        self.wanted: list[torch.Tensor] = []  # the first contender's gradient, rounded to the working precision

    def add(self, name: str, items: list[Item]) -> None:
        """Builds a contender, compares the gradient of its first run, times its first turn."""
        begun = time.perf_counter()
        c = build(name, self.models, items, self.asked)
        _wait(self.device)
        c.setup = {"build": time.perf_counter() - begun}
        self.contenders.append(c)
        begun = time.perf_counter()
        if not self._run(c):
            return
        c.setup["first_call"] = time.perf_counter() - begun
        print(f"{name}: built in {c.setup['build']:.1f} s, first call {c.setup['first_call']:.1f} s", flush=True)
        self.compare(c)
        self.turn(c)

    def compare(self, c: Contender) -> None:
        """Its gradient, which lies in the sums, with the first one's, on the device."""
        got, last = self.models.weights.gradients, c.name == self.asked.contenders.split(",")[-1]
        if not self.wanted:
            if not last:  # narrow: half the memory, far below what is allowed
                self.wanted = [g.to(DTYPES[self.asked.precision], copy=True) for g in got]
            return
        c.gradient_error = distance(got, self.wanted)
        text = f"gradient of {c.name}: {c.gradient_error:.1e} from {self.first.name} "
        text += f"(allowed {self.allowed:.0e})"
        print(_loud(text + ": OFF") if self.is_off(c) else text, flush=True)
        if last:
            self.wanted = []

    @property
    def first(self) -> Contender:
        """What the others are compared with."""
        return next((c for c in self.contenders if not c.failed), self.contenders[0])

    def is_off(self, c: Contender) -> bool:
        return report.is_off({"gradient_error": c.gradient_error, "gradient_allowed": self.allowed})

    def turn(self, c: Contender) -> None:
        """One timed step; its line is printed and written at once."""
        if not c.failed and self._run(c, timed=True):
            self._tell(c)
            print(text_of(self.line(c)), flush=True)

    def _run(self, c: Contender, timed: bool = False) -> bool:
        """A step. Where memory runs out a size is halved, which is recorded; False where nothing came out."""
        while True:
            self.models.weights.zero()
            try:
                _timed(c, self.device) if timed else c.step(c.items)
                _wait(self.device)
                return True
            except TooLarge as problem:
                key = KEYS.get(problem.key)
            except torch.OutOfMemoryError:
                key = None
            # out here the exception, which holds on to the activations, is gone
            self._out_of_memory(c, key)
            if c.failed:
                return False

    def _out_of_memory(self, c: Contender, key: str | None) -> None:
        if key is None:  # not said by what: the larger part first
            key = next((name for name in c.sizes if c.sizes[name] > 1), None)
        c.seconds.clear()  # of other sizes
        at = f"{key} {c.sizes[key]}" if key else "its one size"
        c.too_large.append(at)
        if key is None or c.sizes[key] <= 1:
            c.failed = True
        else:
            c.sizes[key] //= 2
        print(_loud(f"{c.name}: out of memory at {at}{': given up' if c.failed else ', halved'}"), flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if c.failed:
            self._tell(c)

    def _tell(self, c: Contender) -> None:
        if self.asked.results:  # the newest line counts: a run that is cut off has what it measured
            results.record(self.asked.results, self.line(c))

    def line(self, c: Contender) -> dict:
        """One contender in plain numbers. Rates are pairs of this step's kind per second, one GPU or CPU."""
        asked, first = self.asked, self.first
        line = {
            "kernel": "train_step",
            "op": Path(asked.model).name,
            "shape": f"{self.pixels}px",
            "dtype": asked.precision,
            "provider": c.name,
            "threads": asked.threads,
            **{name: c.sizes.get(name, getattr(asked, name)) for name in (*OURS, "lockstep_batch")},
            "vae_batch": c.sizes.get("vae_batch"),
            "pairs": len(c.items),
            "n": STEPS,
            "grid": "diffusers-0.22",
            "vae_in_loop": True,
            "evaluations": self.evaluations(c.items),
            "against": first.name,
            "gradient_error": c.gradient_error,
            "gradient_allowed": self.allowed,
            "setup_seconds": {"weights": self.weights_seconds} | c.setup,
            "too_large": c.too_large,
            "card_memory": _card_memory() if self.device.type == "cuda" else None,
        }
        if c.failed:
            return line | {"out_of_memory": True}
        rates = [len(c.items) / s for s in c.seconds]
        # turn by turn; one that ran out of memory began anew
        pairs = zip(reversed(c.seconds), reversed(first.seconds), strict=False)
        ratios = [theirs / own for own, theirs in pairs]
        line |= {
            "repeats": len(rates),
            "pairs_s": statistics.median(rates),
            "pairs_s_range": [min(rates), max(rates)],
            "gpu_hours_recipe": RECIPE_PAIRS / statistics.median(rates) / 3600,
            "ms_per_pair": {name: 1000 * s for name, s in c.phases.items()},
            "peak_memory": c.memory,
            "host_waits": c.waits,
        }
        if ratios:
            line |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        return line

    def evaluations(self, items: list[Item]) -> float:
        """Of the inversion, mean per image: they depend on the timesteps that were drawn."""
        t = torch.tensor([[keyed_rng.integer(0, 999, "t", SEED, item.position) for item in items]])
        how = InversionConfig(steps=STEPS, grid="diffusers-0.22", evaluate_at="target")
        return evaluations_of(how, self.models.noise_path, t).double().mean().item()


def distance(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Relative, in norm, of all tensors together; summed in float64 where they are, read once."""
    away = sum((g - w.float()).double().square().sum() for g, w in zip(got, wanted, strict=True))
    return (away / sum(w.double().square().sum() for w in wanted)).sqrt().item()


def _loud(text: str) -> str:
    return f"\033[1;31m{text}\033[0m" if sys.stdout.isatty() else text


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _card_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def _opened(asked: argparse.Namespace, device: torch.device):
    random = asked.model if asked.model in ("sd15", "sdxl") else None
    base = "" if random else str(ASSETS / "model") if asked.model == "pocket" else asked.model
    config = ModelsConfig(base=base, random=random, precision=asked.precision)
    return open_pipeline(config, device), device, config


def _timed(c: Contender, device: torch.device) -> None:
    cuda, watch = device.type == "cuda", Stopwatch(device)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with _waits(cuda) as waits, watch.running():
        begun = time.perf_counter()
        c.step(c.items)
        if cuda:
            torch.cuda.synchronize()
        c.seconds.append(time.perf_counter() - begun)
    c.phases = {name: s / len(c.items) for name, s in watch.seconds().items()}
    if cuda:
        c.memory, c.waits = torch.cuda.max_memory_allocated(), len(waits)


@contextlib.contextmanager
def _waits(cuda: bool) -> Iterator[list]:
    """How often the host waited for the device, as CUDA's own debug mode reports it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found: list = []
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
            found += [w for w in seen if "called a synchronizing" in str(w.message)]


def text_of(x: dict) -> str:
    """A contender's line for people."""
    low, high = x["pairs_s_range"]
    text = f"{x['provider']:9} {x['pairs_s']:9.3f} pairs/s ({low:.3f} to {high:.3f}), {x['pairs']} pairs, turn "
    text += str(x["repeats"])
    if x["provider"] != x["against"] and "ratio" in x:
        text += f"  {x['ratio']:.2f} x {x['against']} ({x['ratio_range'][0]:.2f} to {x['ratio_range'][1]:.2f})"
    text += f"  recipe {x['gpu_hours_recipe']:.2f} h"
    if x["peak_memory"] is not None:
        text += f"  {x['peak_memory'] / GIB:.1f} GiB, {x['host_waits']} waits"
    if x["ms_per_pair"]:
        text += "\n" + " " * 10 + "  ".join(f"{name} {ms:.1f}" for name, ms in x["ms_per_pair"].items())
        text += "  ms per pair"
    return _loud(f"{text}\n          GRADIENT OFF: not a result") if report.is_off(x) else text
