"""How far each way to invert moves x_t, and the gradient with it, from the plain fp32 inversion.

    python -m bench.x_t [--base FOLDER] [--source FILE] [--pairs 64]

The gradient is always computed by the plain fp32 UNets: only x_t differs. Distances are relative, in norm.
"""

import argparse
from dataclasses import replace

import torch

from bench.train_step import move_policy
from inpo_fast.data.sources import open_source
from inpo_fast.data.windows import DataConfig, Windows
from inpo_fast.inversion import InversionConfig
from inpo_fast.loading import open_pipeline, quiet_libraries
from inpo_fast.metrics import Tally
from inpo_fast.models import Models, ModelsConfig
from inpo_fast.objectives import ObjectiveConfig, target
from inpo_fast.pocket import ASSETS
from inpo_fast.refusal import run_or_refuse
from inpo_fast.step import micro_step, noise_window
from inpo_fast.window import Recipe, Window, make_window

WAYS = {
    "fp32 fused": (ModelsConfig(fast="fused"), False),
    "fp32 fused, fp8": (ModelsConfig(fast="fused"), True),
    "bf16": (ModelsConfig(precision="bf16"), False),
    "bf16 fused": (ModelsConfig(precision="bf16", fast="fused"), False),
    "bf16 fused, fp8": (ModelsConfig(precision="bf16", fast="fused"), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.x_t", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(ASSETS / "model"))
    parser.add_argument("--source", default=str(ASSETS / "pairs.parquet"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--beta", type=float, default=2000.0)
    asked = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe("inpo", ObjectiveConfig(beta=asked.beta), InversionConfig(), 16, False, 0)
    plain = open_models(ModelsConfig(base=asked.base), device)
    source = open_source(asked.source)
    reader = Windows(source, DataConfig(), resolution=plain.resolution, seed=0, rank=0, world=1)
    items = next(reader.steps(0, 1, asked.pairs))
    window = make_window(items, plain, recipe, plain.encode_empty())
    wanted = noise_window(window, plain, recipe)[0]
    gradient = gradient_at(window, wanted, plain, recipe)
    print(f"{'':18}  x_t       tau       gradient")
    for name, (config, fp8) in WAYS.items():
        models = open_models(replace(config, base=asked.base), device)
        own = replace(make_window(items, models, recipe, models.encode_empty()), x_0=window.x_0)
        how = replace(recipe, inversion=replace(recipe.inversion, fp8=fp8))
        x_t = noise_window(own, models, how)[0]
        other = gradient_at(window, x_t, plain, recipe)
        taus = [tau_of(window, x) for x in (x_t, wanted)]
        row = (distance(x_t, wanted), distance(*taus), distance(other, gradient))
        print(f"{name:18}  " + "  ".join(f"{x:.1e}" for x in row), flush=True)


def open_models(config: ModelsConfig, device: torch.device) -> Models:
    models = Models(open_pipeline(config), device, config)
    move_policy(models)  # a policy that has left its reference, as in the middle of a run
    return models


def tau_of(window: Window, x_t: torch.Tensor) -> torch.Tensor:
    return target(x_t.flatten(0, 1), window.x_0.flatten(0, 1), window.a.flatten(), window.s.flatten())


def gradient_at(window: Window, x_t: torch.Tensor, models: Models, recipe: Recipe) -> torch.Tensor:
    models.weights.zero()
    for lo in range(0, len(window.items), recipe.micro_batch):
        part = slice(lo, min(lo + recipe.micro_batch, len(window.items)))
        prediction, found = micro_step(window, x_t, part, models, recipe, Tally(models.device))
        prediction.backward(found.dpred)
    return torch.cat([g.reshape(-1) for g in models.weights.gradients])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


if __name__ == "__main__":
    run_or_refuse("bench.x_t", main)
