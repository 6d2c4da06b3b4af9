"""Times the phases of a step on the machine at hand, beside their lower bounds (`python -m inpo_fast.profile`).

The bounds are counted from shapes: matrix work (step_cost.py) and, one after the other, the bytes of what no matrix
product can do on the way (memory_traffic.py), at the rates that the caller says the machine reaches.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from inpo_fast.config import RunConfig, variant_of
from inpo_fast.cost.plan import Plan
from inpo_fast.data.images import View
from inpo_fast.data.loader import Item, PairLoader, open_data
from inpo_fast.method.methods import method_of
from inpo_fast.models.loading import open_pipeline
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.phases import NAMES, Stopwatch, phase
from inpo_fast.training.optim import make_optimizer
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

PAPER = {(859_520_964, 10): 57.6, (859_520_964, 30): 136.0}  # (parameters of SD1.5, n): GPU-hours on an H800
WORK = {  # phase -> lines of Work
    "encode": ("VAE encoding", "text encoding"),
    "invert": ("inversion",),
    "reference": ("reference",),
    "forward": ("policy forward",),
    "backward": ("policy backward",),
}
PARTS = {  # end of a key -> phases: everything in the loop; latents and text from a cache; the policy's passes alone
    "": NAMES,
    "_precomputed": tuple(name for name in NAMES if name != "encode"),
    "_policy_step": ("forward", "backward"),
}
FLOORS = {"floor": "matrix work", "roofline": "roofline", "fused_floor": "fused path as it is"}


@dataclass(frozen=True)
class Measured:
    """Of all timed steps. seconds: by phase; wall: of everything; joules: None where NVML does not tell."""

    pairs: int
    seconds: dict[str, float]
    wall: float
    joules: float | None
    memory: int | None  # peak bytes on the GPU
    device: str


def measure(config: RunConfig, device: torch.device, steps: int, pairs: int, trace: Path | None) -> Measured:
    """One step to warm up, then `steps` of `pairs` pairs each."""
    config = replace(config, train=replace(config.train, pairs_per_step=pairs))
    models = Models(open_pipeline(config.models, device), device, config.models)
    optimizer = make_optimizer(models.parameters(), config.optim, config.seed)
    step_config = StepConfig.of(config)
    empty, watch = models.encode_empty(), Stopwatch(device)
    batches = _pairs(config, models, steps + 1)

    def step(items: list[Item]) -> None:
        with phase("encode"):
            batch = make_step_batch(items, models, step_config, empty)
        metrics, _ = train_step(batch, models, step_config, pairs, config.optim.clip)
        with phase("optimizer"):
            optimizer.step()
            models.weights.refresh()
        metrics.values()

    step(next(batches))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with watch.running(), _tracing(trace):
        energy, begun = _joules(device), time.perf_counter()
        for _ in range(steps):
            with phase("data"):
                items = next(batches)
            step(items)
        seconds = watch.seconds()  # waits for the device
        wall, after = time.perf_counter() - begun, _joules(device)
    cuda = device.type == "cuda"
    return Measured(
        pairs=steps * pairs,
        seconds={name: seconds.get(name, 0.0) for name in NAMES},
        wall=wall,
        joules=None if energy is None or after is None else after - energy,
        memory=torch.cuda.max_memory_allocated(device) if cuda else None,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
    )


def _pairs(config: RunConfig, models: Models, count: int):
    resolution = models.training_side(config.data.resolution)
    if config.data.source:
        source = open_data(config.data)
        reader = PairLoader(source, config.data, resolution=resolution, seed=config.seed, rank=0, world=1)
        yield from reader.steps(0, count, config.train.pairs_per_step)
        return
    for number in range(count):
        yield [
            _random_pair(number * config.train.pairs_per_step + i, resolution)
            for i in range(config.train.pairs_per_step)
        ]


def _random_pair(position: int, side: int) -> Item:
    rng = np.random.default_rng(keyed_rng.hash_key("profile", position))
    views = [View(rng.integers(0, 256, (side, side, 3), np.uint8), (side, side), (0, 0)) for _ in range(2)]
    return Item(position, f"random {position}", f"a picture with number {position}", *views)


@contextlib.contextmanager
def _tracing(path: Path | None):
    if path is None:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def _joules(device: torch.device) -> float | None:
    """Energy that the GPU has used since its driver was loaded."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000
    except pynvml.NVMLError:
        return None


def summary(
    config: RunConfig,
    plan: Plan,
    ceiling: float,
    price: float | None,
    measured: Measured | None,
    copy_ceiling: float = 4.3,
) -> dict:
    """Everything in plain numbers, for --json and for the table. ceiling: TFLOP/s; copy_ceiling: TB/s, read + write."""
    recipe_pairs = config.train.steps * config.train.pairs_per_step
    work = plan.work
    sides = method_of(config.method).sides
    out = {
        "variant": variant_of(config),
        "n": config.inversion.steps,
        "grid": config.inversion.grid,
        "precision": config.models.precision,
        "inversion_evaluations": work.evaluations,
        "forward_tflop": work.flop["policy forward"] / sides / 1e12,
        "backward_tflop": work.flop["policy backward"] / sides / 1e12,
        "forward_tflop_by_class": {kind: flop / 1e12 for kind, flop in plan.forward.items()},
        "pair_tflop": sum(work.flop.values()) / 1e12,
        "ceiling_tflops": ceiling,
        "copy_ceiling_tbs": copy_ceiling,
        "recipe_pairs": recipe_pairs,
        "paper_gpu_hours": PAPER.get((plan.parameters, config.inversion.steps)),
        "phases": {},
        "gpu_hours_recipe": None,
    }
    for name in NAMES:
        flop, moved, fused = (
            sum(of[line] for line in WORK.get(name, ())) for of in (work.flop, work.roofline_bytes, work.fused_bytes)
        )
        floor = flop / (ceiling * 1e12)
        row = {"tflop_per_pair": flop / 1e12, "floor_s_per_pair": floor}
        row |= {"bytes_per_pair": moved, "roofline_s_per_pair": floor + moved / (copy_ceiling * 1e12)}
        row |= {"fused_bytes_per_pair": fused, "fused_floor_s_per_pair": floor + fused / (copy_ceiling * 1e12)}
        if measured is not None:
            seconds = measured.seconds[name] / measured.pairs
            row |= {"s_per_pair": seconds, "share_of_time": measured.seconds[name] / measured.wall}
            if flop and seconds:
                row |= {"tflops": flop / seconds / 1e12, "share_of_ceiling": floor / seconds}
                row["share_of_roofline"] = row["roofline_s_per_pair"] / seconds
        out["phases"][name] = row
    for floor in FLOORS:
        for part, names in PARTS.items():
            seconds = sum(out["phases"][name][f"{floor}_s_per_pair"] for name in names)
            out[f"{floor}_gpu_hours{part}"] = seconds * recipe_pairs / 3600
    if measured is not None:
        hours = measured.wall / measured.pairs * recipe_pairs / 3600
        out |= {
            "device": measured.device,
            "pairs_measured": measured.pairs,
            "pairs_per_second": measured.pairs / measured.wall,
            "gpu_hours_recipe": hours,
            "peak_memory_gib": None if measured.memory is None else measured.memory / 2**30,
            "kwh_recipe": None if measured.joules is None else measured.joules / measured.pairs * recipe_pairs / 3.6e6,
        }
    if price is not None:
        out["cost_at_floor"] = out["floor_gpu_hours"] * price
        out["cost"] = None if measured is None else out["gpu_hours_recipe"] * price
    return out


def show(result: dict, console: Console) -> None:
    console.print(
        f"[bold]{result['variant']}[/bold], n = {result['n']}, grid {result['grid']}, {result['precision']}, "
        f"{result['inversion_evaluations']:.2f} evaluations per image"
    )
    unit, scale = ("TFLOP", 1) if result["forward_tflop"] > 0.01 else ("GFLOP", 1000)
    classes = ", ".join(f"{kind} {scale * flop:.3f}" for kind, flop in result["forward_tflop_by_class"].items())
    forward, backward = scale * result["forward_tflop"], scale * result["backward_tflop"]
    console.print(f"one image: forward {forward:.3f} {unit} ({classes}), backward {backward:.3f}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    measured = result["gpu_hours_recipe"] is not None
    headings = ["phase", f"{unit} / pair", f"ms at {result['ceiling_tflops']:g} TFLOP/s", "GB / pair"]
    headings.append(f"roofline ms, {result['copy_ceiling_tbs']:g} TB/s")
    headings += ["measured ms", "share of time", f"{unit}/s", "of ceiling", "of roofline"] if measured else []
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for name, row in result["phases"].items():
        cells = [name, f"{scale * row['tflop_per_pair']:.2f}", f"{1000 * row['floor_s_per_pair']:.2f}"]
        cells += [f"{row['bytes_per_pair'] / 1e9:.2f}", f"{1000 * row['roofline_s_per_pair']:.2f}"]
        if measured:
            cells += [f"{1000 * row['s_per_pair']:.2f}", f"{row['share_of_time']:.0%}"]
            shares = [f"{row[key]:.1%}" for key in ("share_of_ceiling", "share_of_roofline") if key in row]
            cells += [f"{scale * row['tflops']:.1f}", *shares] if shares else ["", "", ""]
        table.add_row(*cells)
    console.print(table)
    paper = result["paper_gpu_hours"]
    console.print(
        f"\nleast GPU-hours for {result['recipe_pairs']:,} pairs"
        + (f"; the paper: {paper} on an H800" if paper else "")
    )
    hours = Table(box=None, pad_edge=False)
    for i, heading in enumerate(("", "VAE and text in the loop", "precomputed", "policy step alone")):
        hours.add_column(heading, justify="right" if i else "left")
    for floor, what in FLOORS.items():
        hours.add_row(what, *(f"{result[f'{floor}_gpu_hours{part}']:.2f}" for part in PARTS))
    console.print(hours)
    if measured:
        extra = [f"{result['pairs_per_second']:.2f} pairs/s on {result['device']}"]
        if result["peak_memory_gib"] is not None:
            extra.append(f"peak {result['peak_memory_gib']:.1f} GiB")
        if result["kwh_recipe"] is not None:
            extra.append(f"{result['kwh_recipe']:.1f} kWh for the recipe")
        console.print(f"measured {result['gpu_hours_recipe']:.2f} hours for the recipe; " + ", ".join(extra))
    for key, what in (("cost_at_floor", "at the floor"), ("cost", "as measured")):
        if result.get(key) is not None:
            console.print(f"cost of the recipe {what}: {result[key]:.2f}")
