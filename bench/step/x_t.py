"""How far each way to invert moves x_t, and the gradient with it, from the plain fp32 inversion.

    python -m bench.step.x_t [--base FOLDER] [--source FILE] [--pairs 64]

The gradient is always computed by the plain fp32 UNets: only x_t differs. Distances are relative, in norm.
"""

import argparse
from dataclasses import replace

import torch

from bench.step.contenders import move_policy
from inpo_fast.data.loader import DataConfig, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.noise_path import target
from inpo_fast.models.config import ModelsConfig
from inpo_fast.models.loading import open_pipeline, quiet_libraries
from inpo_fast.models.models import Models
from inpo_fast.pocket import ASSETS
from inpo_fast.runtime.errors import run_command
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step import micro_step
from inpo_fast.training.step_batch import StepBatch, StepConfig, make_step_batch

WAYS = {
    "fp32 fused": (ModelsConfig(fast="fused"), False),
    "fp32 fused, fp8": (ModelsConfig(fast="fused"), True),
    "bf16": (ModelsConfig(precision="bf16"), False),
    "bf16 fused": (ModelsConfig(precision="bf16", fast="fused"), False),
    "bf16 fused, fp8": (ModelsConfig(precision="bf16", fast="fused"), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step.x_t", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(ASSETS / "model"))
    parser.add_argument("--source", default=str(ASSETS / "pairs.parquet"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--beta", type=float, default=2000.0)
    asked = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step_config = StepConfig(
        method="inpo",
        objective=ObjectiveConfig(beta=asked.beta),
        inversion=InversionConfig(),
        micro_batch=16,
        vae_sample=False,
        seed=0,
    )
    plain = open_models(ModelsConfig(base=asked.base), device)
    source = open_source(asked.source)
    reader = PairLoader(source, DataConfig(), resolution=plain.resolution, seed=0, rank=0, world=1)
    items = next(reader.steps(0, 1, asked.pairs))
    step_batch = make_step_batch(items, plain, step_config, plain.encode_empty())
    wanted = noisy_latents(step_batch, plain, step_config)[0]
    gradient = gradient_at(step_batch, wanted, plain, step_config)
    print(f"{'':18}  x_t       tau       gradient")
    for name, (config, fp8) in WAYS.items():
        models = open_models(replace(config, base=asked.base), device)
        own = replace(make_step_batch(items, models, step_config, models.encode_empty()), x_0=step_batch.x_0)
        how = replace(step_config, inversion=replace(step_config.inversion, fp8=fp8))
        x_t = noisy_latents(own, models, how)[0]
        other = gradient_at(step_batch, x_t, plain, step_config)
        taus = [tau_of(step_batch, x) for x in (x_t, wanted)]
        row = (distance(x_t, wanted), distance(*taus), distance(other, gradient))
        print(f"{name:18}  " + "  ".join(f"{x:.1e}" for x in row), flush=True)


def open_models(config: ModelsConfig, device: torch.device) -> Models:
    models = Models(open_pipeline(config), device, config)
    move_policy(models)  # a policy that has left its reference, as in the middle of a run
    return models


def tau_of(step_batch: StepBatch, x_t: torch.Tensor) -> torch.Tensor:
    return target(x_t.flatten(0, 2), step_batch.x_0.flatten(0, 1), step_batch.a.flatten(), step_batch.s.flatten())


def gradient_at(step_batch: StepBatch, x_t: torch.Tensor, models: Models, step_config: StepConfig) -> torch.Tensor:
    models.weights.zero()
    for lo in range(0, len(step_batch.items), step_config.micro_batch):
        part = slice(lo, min(lo + step_config.micro_batch, len(step_batch.items)))
        found = micro_step(step_batch, x_t, 0, part, models, step_config)
        found.prediction.backward(found.objective.dpred)
    return torch.cat([g.reshape(-1) for g in models.weights.gradients])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


if __name__ == "__main__":
    run_command("bench.step.x_t", main)
