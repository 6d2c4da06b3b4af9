"""Our optimizer step against what others run: gradients compared first, then all timed in turns in one run.

    python -m bench.train_step [--model pocket|sd15|sdxl] [--precision fp32|bf16] [--contenders naive,lockstep,plain,…]

naive: the published script's shape (bench/naive.py), one pair at a time, fp32 weights under autocast. lockstep: the
same with working-precision weights, batches and torch.compile on a GPU. plain, fused, compiled: inpo_fast with
models.fast so set. All draw the same pairs (their work depends on their timesteps) and noise at equal settings: grid
diffusers-0.22, told the target, conditional inversion, n = 10, VAE and text encoders in the loop. Turns alternate, so
that other load hits all alike; spreads are the smallest and largest of the repeats. sd15 and sdxl have the exact
architecture with random weights. All but naive share one set of weights, which lies in channels_last as soon as fused
or compiled is among them.
"""

import argparse
import contextlib
import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from bench import results
from bench.naive import lockstep_step, naive_step
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Item, Windows
from inpo_fast.fast_unet import make_fast
from inpo_fast.inversion import InversionConfig
from inpo_fast.loading import open_pipeline, quiet_libraries
from inpo_fast.models import DTYPES, Models, ModelsConfig
from inpo_fast.objectives import ObjectiveConfig
from inpo_fast.phases import Stopwatch, phase
from inpo_fast.pocket import ASSETS
from inpo_fast.refusal import Refusal, command_line, run_or_refuse
from inpo_fast.step import train_step
from inpo_fast.window import Recipe, make_window

STEPS, SEED, RECIPE_PAIRS = 10, 0, 400 * 1024
NAMES = ("naive", "lockstep", "plain", "fused", "compiled")
# beta: large logits would turn bf16's rounding of an error into another weight of the pair, in all contenders alike
BETA = {"fp32": 2000.0, "bf16": 20.0}
# of the gradient's norm. fp32: sums in another order, through ten chained evaluations. bf16: autocast rounds the
# weights, ours rounds the output of each layer too; measured in docs/performance.md.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


@dataclass
class Contender:
    """One way to compute the gradient of some pairs; it leaves it in the masters' `.grad`."""

    name: str
    step: Callable[[list[Item]], None]
    items: list[Item]
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    waits: int | None = None


def main() -> None:
    parser = command_line("python -m bench.train_step", __doc__)
    parser.add_argument("--model", default="pocket", help="pocket, sd15, sdxl, or a diffusers folder")
    parser.add_argument("--source", default=str(ASSETS / "pairs.parquet"), help="preference pairs")
    parser.add_argument("--precision", choices=tuple(BETA), default="fp32")
    parser.add_argument("--resolution", type=int, help="pixels per side; default: the model's own")
    parser.add_argument("--contenders", default="naive,plain", help=f"comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of a step")
    parser.add_argument("--micro-batch", type=int, default=16, help="ours: pairs per forward and backward")
    parser.add_argument("--inversion-batch", type=int, default=64, help="ours: images per inversion evaluation")
    parser.add_argument("--lockstep-batch", type=int, default=16, help="lockstep: pairs at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, help="folder for a JSON line per contender")
    asked = parser.parse_args()
    names = asked.contenders.split(",")
    if unknown := set(names) - set(NAMES):
        raise Refusal(f"--contenders: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # "fp32" means it: cuDNN would round to 10 bits by default
    torch.set_num_threads(asked.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = Models(*_opened(asked, device))
    move_policy(models)
    pixels = asked.resolution or models.resolution
    source = open_source(asked.source)
    items = next(Windows(source, DataConfig(), resolution=pixels, seed=SEED, rank=0, world=1).steps(0, 1, asked.pairs))
    contenders = [_contender(name, models, items, asked) for name in names]

    _compare(contenders, models, asked.precision)
    for turn in range(asked.repeats):
        for c in contenders:
            _timed(c, models, device, turn)
        show(contenders, asked, device, pixels)
        for c in contenders if asked.results else []:  # the newest line counts: a run cut short has what it measured
            results.record(asked.results, line(c, contenders[0], asked, pixels))


def _opened(asked: argparse.Namespace, device: torch.device):
    random = asked.model if asked.model in ("sd15", "sdxl") else None
    base = "" if random else str(ASSETS / "model") if asked.model == "pocket" else asked.model
    config = ModelsConfig(base=base, random=random, precision=asked.precision)
    return open_pipeline(config), device, config


def move_policy(models: Models) -> None:
    """The policy must differ from the reference, or every logit is 0."""
    with torch.no_grad():
        for i, p in enumerate(models.parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            p.add_(0.01 * p.std().nan_to_num() * noise.to(p.device))
    models.weights.refresh()


def _contender(name: str, models: Models, items: list[Item], asked: argparse.Namespace) -> Contender:
    how = {"beta": BETA[asked.precision], "inversion_steps": STEPS, "seed": SEED}
    if name == "naive":
        other, autocast = _naive_models(models), None if asked.precision == "fp32" else DTYPES[asked.precision]
        return Contender(name, lambda items: naive_step(items, other, autocast=autocast, **how), items)
    if name == "lockstep":
        twins = {who: twin(getattr(models, who)) for who in ("policy", "reference")}
        if models.device.type == "cuda":
            for unet in twins.values():
                unet.forward = torch.compile(unet.forward, dynamic=False)
        other = _with_unets(models, **twins)
        return Contender(name, lambda items: lockstep_step(items, other, batch=asked.lockstep_batch, **how), items)
    twins = {who: twin(getattr(models, who)) for who in ("policy", "reference")}
    other = _with_unets(models, **twins)
    for unet in twins.values():
        make_fast(unet, "off" if name == "plain" else name)
    inversion = InversionConfig(
        steps=STEPS, grid="diffusers-0.22", evaluate_at="target", guidance=1.0, batch=asked.inversion_batch
    )
    recipe = Recipe("inpo", ObjectiveConfig(beta=how["beta"]), inversion, asked.micro_batch, True, SEED)
    empty = other.encode_empty()

    def ours(items: list[Item]) -> None:
        with phase("encode"):
            window = make_window(items, other, recipe, empty)
        train_step(window, other, recipe, len(items), clip=float("inf"))

    return Contender(name, ours, items)


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another module around the same parameters: made fast, or compiled, without a second copy of the weights."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(keep_vars=True), assign=True)
    assert all(a is b for a, b in zip(other.parameters(), unet.parameters(), strict=True))
    return other.eval()


def _with_unets(models: Models, policy: UNet2DConditionModel, reference: UNet2DConditionModel) -> Models:
    other = copy.copy(models)
    other.policy, other.reference = policy, reference
    return other


def _naive_models(models: Models) -> Models:
    """An fp32 policy with the values of the masters, whose gradients go to the masters' own sums. The reference has
    the working precision, as in the published script."""
    with torch.device("meta"):
        policy = UNet2DConditionModel.from_config(models.policy.config)
    masters = zip(models.weights.names, models.weights.masters, strict=True)
    values = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in masters}
    policy.load_state_dict(values, assign=True)
    for p, total in zip(policy.requires_grad_(True).parameters(), models.weights.gradients, strict=True):
        p.grad = total
    return _with_unets(models, policy.eval(), twin(models.reference))


def _compare(contenders: list[Contender], models: Models, precision: str) -> None:
    """All gradients against the first contender's; exits where one differs."""
    bound = TOLERANCE[precision]
    wanted: list[torch.Tensor] = []
    for c in contenders:
        models.weights.zero()
        c.step(c.items)
        got = models.weights.gradients
        if not wanted:
            wanted = [
                g.to("cpu", DTYPES[precision], copy=True) for g in got
            ]  # narrow: half the memory, far below bound
            continue
        away = sum((g.cpu() - w.float()).double().square().sum().item() for g, w in zip(got, wanted, strict=True))
        off = (away / sum(w.double().square().sum().item() for w in wanted)) ** 0.5
        print(f"gradient of {c.name}: {off:.1e} from {contenders[0].name} (allowed {bound:.0e})", flush=True)
        if not off < bound:
            raise SystemExit("gradients differ: nothing is timed")


def _timed(c: Contender, models: Models, device: torch.device, turn: int) -> None:
    cuda, watch = device.type == "cuda", Stopwatch(device)
    models.weights.zero()
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
            found += [w for w in seen if "synchroniz" in str(w.message)]


def line(c: Contender, first: Contender, asked: argparse.Namespace, pixels: int) -> dict:
    """One contender in plain numbers. Rates are pairs of this step's kind per second, one GPU or CPU."""
    rates = [len(c.items) / s for s in c.seconds]
    ratios = [r / (len(first.items) / s) for r, s in zip(rates, first.seconds, strict=True)]
    settings = ("model", "precision", "micro_batch", "inversion_batch", "lockstep_batch", "threads")
    return {
        "kernel": "train_step",
        "op": Path(asked.model).name,
        "shape": f"{pixels}px",
        "dtype": asked.precision,
        "provider": c.name,
        **{name: getattr(asked, name) for name in settings},
        "pairs": len(c.items),
        "n": STEPS,
        "grid": "diffusers-0.22",
        "vae_in_loop": True,
        "repeats": len(rates),
        "pairs_s": statistics.median(rates),
        "pairs_s_range": [min(rates), max(rates)],
        "against": first.name,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "gpu_hours_recipe": RECIPE_PAIRS / statistics.median(rates) / 3600,
        "ms_per_pair": {name: 1000 * s for name, s in c.phases.items()},
        "peak_memory": c.memory,
        "host_waits": c.waits,
    }


def show(contenders: list[Contender], asked: argparse.Namespace, device: torch.device, pixels: int) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else results.provenance()["device"]
    print(
        f"\n{asked.model} {pixels} px {asked.precision}, {name}, torch {torch.__version__}, {asked.threads} threads, "
        f"n = {STEPS}, grid diffusers-0.22, VAE and text in the loop; {len(contenders[0].seconds)} turns"
    )
    for c in contenders:
        x = line(c, contenders[0], asked, pixels)
        low, high = x["pairs_s_range"]
        text = f"{c.name:9} {x['pairs_s']:9.3f} pairs/s ({low:.3f} to {high:.3f}), {x['pairs']} pairs"
        if c is not contenders[0]:
            text += (
                f"  {x['ratio']:.2f} x {contenders[0].name} ({x['ratio_range'][0]:.2f} to {x['ratio_range'][1]:.2f})"
            )
        text += f"  recipe {x['gpu_hours_recipe']:.2f} h"
        if c.memory is not None:
            text += f"  {c.memory / 2**30:.1f} GiB, {c.waits} waits"
        print(text)
        if c.phases:
            print(" " * 10 + "  ".join(f"{name} {ms:.1f}" for name, ms in x["ms_per_pair"].items()) + "  ms per pair")
    print(flush=True)


if __name__ == "__main__":
    run_or_refuse("bench.train_step", main)
