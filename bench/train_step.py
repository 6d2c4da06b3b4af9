"""Our optimizer step against the naive loop: gradients compared first, then both timed in one run.

    python -m bench.train_step [--base FOLDER] [--source FOLDER] [--pairs 32] [--micro-batch 16] [--repeats 5]

Both draw the same pairs, timesteps and noise at equal settings (grid diffusers-0.22, evaluate_at target,
conditional inversion, n = 10, VAE and text encoder in the loop). Timings alternate, so that other load hits
both alike; the printed spread is the smallest and largest of the repeats.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

from bench.naive import naive_step
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Windows
from inpo_fast.inversion import InversionConfig
from inpo_fast.models import Models, load_pipeline, quiet_libraries
from inpo_fast.objectives import ObjectiveConfig
from inpo_fast.pocket import ASSETS
from inpo_fast.refusal import run_or_refuse
from inpo_fast.step import Recipe, make_window, train_step

BETA, STEPS, SEED = 2000.0, 10, 0
TOLERANCE = 1e-3  # of the gradient's norm: fp32 sums in another order, through up to ten chained UNet evaluations


def gradient(models: Models) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in models.parameters()]).clone()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(ASSETS / "model"), help="diffusers folder (default: the pocket's)")
    parser.add_argument("--source", default=str(ASSETS / "pairs.parquet"), help="preference pairs")
    parser.add_argument("--pairs", type=int, default=32, help="pairs per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=16, help="ours: pairs per forward and backward")
    parser.add_argument("--inversion-batch", type=int, default=64, help="ours: images per inversion evaluation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    quiet_libraries()
    torch.backends.cudnn.allow_tf32 = False  # "fp32" below means it: cuDNN would round to 10 bits by default
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = Models(load_pipeline(arguments.base), device)
    windows = Windows(
        open_source(arguments.source), DataConfig(), resolution=models.resolution, seed=SEED, rank=0, world=1
    )
    items = next(windows.steps(0, 1, arguments.pairs))
    recipe = Recipe(
        "inpo",
        ObjectiveConfig(beta=BETA),
        InversionConfig(
            steps=STEPS, grid="diffusers-0.22", evaluate_at="target", guidance=1.0, batch=arguments.inversion_batch
        ),
        arguments.micro_batch,
        vae_sample=True,
        seed=SEED,
    )
    empty = models.encode_empty()
    # the policy must differ from the reference, or every logit is 0
    with torch.no_grad():
        for i, parameter in enumerate(models.parameters()):
            parameter.add_(
                0.01
                * parameter.std().nan_to_num()
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(device)
            )

    def ours() -> None:
        train_step(make_window(items, models, recipe, empty), models, recipe, len(items), clip=float("inf"))

    def naive() -> None:
        models.policy.zero_grad(set_to_none=False)
        naive_step(items, models, beta=BETA, inversion_steps=STEPS, seed=SEED)

    ours()
    mine = gradient(models)
    naive()
    theirs = gradient(models)
    difference = ((mine - theirs).norm() / theirs.norm()).item()
    print(f"gradients: relative difference {difference:.1e} (allowed {TOLERANCE:.0e})")
    if not difference < TOLERANCE:
        raise SystemExit("gradients differ: nothing is timed")
    seconds: dict[Callable, list[float]] = {naive: [], ours: []}
    for _ in range(arguments.repeats):
        for step, taken in seconds.items():
            begun = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{name}, {arguments.threads} threads, torch {torch.__version__}, fp32, {len(items)} pairs a step, n = {STEPS}"
    )
    for step, label in ((naive, "naive loop"), (ours, "inpo_fast ")):
        rates = sorted(len(items) / s for s in seconds[step])
        print(
            f"{label}  {statistics.median(rates):8.2f} pairs/s  ({rates[0]:.2f} to {rates[-1]:.2f}, {len(rates)} runs)"
        )
    ratios = sorted(n / o for n, o in zip(seconds[naive], seconds[ours], strict=True))
    print(f"ratio       {statistics.median(ratios):8.2f} x        ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    run_or_refuse("bench.train_step", main)
