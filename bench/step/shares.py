"""How equal the processes' shares of a step are, dealt in turn and dealt by cost: evaluations of the busiest process
over the mean. Counts only, no model: `python -m bench.step.shares`.
"""

import argparse

import torch

from inpo_fast.data.balance import fair_shares
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion_schedule import inversion_schedule
from inpo_fast.runtime import keyed_rng

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # of SD1.5 and SDXL


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step.shares", description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=1024, help="per step")
    parser.add_argument("--levels", type=int, default=10, help="n of the exact grid")
    own = parser.parse_args()
    path = DDPMPath(torch.cumprod(1 - BETAS, 0).float())
    print("processes | in turn: mean, worst | by cost: mean, worst")
    for world in (8, 16, 64):
        turn, cost = [], []
        for step in range(own.steps):
            t = [keyed_rng.integer(0, 999, "t", 0, step * own.pairs + i) for i in range(own.pairs)]
            evaluations = inversion_schedule(path, torch.tensor(t), steps=own.levels).evaluations.tolist()
            mean = sum(evaluations) / world
            turn.append(max(sum(evaluations[rank::world]) for rank in range(world)) / mean)
            cost.append(max(sum(evaluations[i] for i in s) for s in fair_shares(evaluations, world)) / mean)
        show = [f"{sum(x) / len(x):.4f}, {max(x):.4f}" for x in (turn, cost)]
        print(f"{world:9} | {show[0]} | {show[1]}")


if __name__ == "__main__":
    main()
