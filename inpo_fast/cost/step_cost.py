"""What one pair asks of the machine, by phase of the step: matrix work, and the bytes moved beside it.

Three floors follow. Matrix work alone; the serial roofline, which adds the passes that no neighbour can take over
(traffic.roofline_bytes; one forward pass is the same in every phase); and the passes that the fused path makes as it
is written (traffic.least_bytes, and the gradient sums of a micro-batch). The VAE and the text encoders are diffusers'
and transformers' own in each. Left out: the optimizer, the loss and the inversion's update, together below 0.1 % of
the published recipe; of online training the VAE that decodes what is drawn, and the judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from inpo_fast.config import RunConfig
from inpo_fast.cost.flops import Passes, ask_texts, ask_vae, forward_flop
from inpo_fast.cost.memory_traffic import forward_traffic, least_bytes, network_traffic, roofline_bytes
from inpo_fast.method.ddpm_path import DDPMPath
from inpo_fast.method.inversion import check_inversion, evaluations_of
from inpo_fast.method.methods import method_of, uses_inversion
from inpo_fast.method.solvers import evaluations_a_step
from inpo_fast.models.families import denoiser_of


@dataclass(frozen=True)
class PairCost:
    """flop, roofline_bytes, fused_bytes: of one pair, by phase. traffic: bytes of one image or prompt in a phase, by
    kind, all that the fused path moves. evaluations: of the inversion, mean per image."""

    evaluations: float
    flop: dict[str, float]
    roofline_bytes: dict[str, float]
    fused_bytes: dict[str, float]
    traffic: dict[str, dict[str, int]]


def cost_of_a_pair(
    config: RunConfig,
    passes: Passes,
    network: torch.nn.Module,
    vae: torch.nn.Module,
    texts: Sequence[torch.nn.Module],
    *,
    pixels: int,
    side: int,
    tokens: int,
) -> PairCost:
    """The models: on the meta device, in the dtypes they compute in; the network is made fast in place, `passes` are
    its own from before. pixels, side: edge of an image and of its latent."""
    method, evaluations, each = method_of(config.method), _evaluations(config), config.objective.timesteps.per_pair
    sides, forward = method.sides, each * (2 if method.reference_point else 1)  # which takes all errors first
    times = {
        "VAE encoding": sides,
        "text encoding": 1,  # at most: prompts that a step has twice are encoded once
        "inversion": sides * evaluations * (1 if config.inversion.guidance in (0.0, 1.0) else 2),
        "reference": sides * method.uses_reference * forward,
        "policy forward": sides * forward,
        "policy backward": sides * each,
    }
    if config.online.every:
        times["drawing"] = _drawn(config)
    run_vae, run_texts = partial(ask_vae, vae, pixels), partial(ask_texts, texts, tokens)
    flop = {"VAE encoding": forward_flop(run_vae), "text encoding": forward_flop(run_texts)}
    flop |= dict.fromkeys(("inversion", "reference", "policy forward", "drawing"), passes.forward_flop)
    flop["policy backward"] = passes.backward_flop

    denoiser_of(network).make_fast(network, "fused")
    moved = network_traffic(network, side, tokens)
    traffic = {"VAE encoding": forward_traffic(run_vae), "text encoding": forward_traffic(run_texts)}
    traffic |= {"inversion": moved.inversion, "reference": moved.forward}
    traffic |= {"policy forward": moved.forward, "policy backward": moved.backward, "drawing": moved.forward}
    fused = {phase: n * least_bytes(traffic[phase]) for phase, n in times.items()}
    fused["policy backward"] += each * _gradient_sums(network) / config.train.micro_batch
    alike = traffic | {"inversion": moved.forward}  # one kernel for product and gate is the fused path's own choice
    return PairCost(
        evaluations=evaluations,
        flop={phase: float(n * flop[phase]) for phase, n in times.items()},
        roofline_bytes={phase: n * roofline_bytes(alike[phase]) for phase, n in times.items()},
        fused_bytes=fused,
        traffic=traffic,
    )


def _evaluations(config: RunConfig) -> float:
    """Of an image, for all timesteps of its pair: the mean over all that may be drawn."""
    if not uses_inversion(config.method, config.inversion):
        return 0.0
    how = config.inversion
    path = DDPMPath(torch.linspace(1.0, 0.005, 1001)[1:])  # how often a sample steps does not depend on abar
    check_inversion(how, path)
    steps = evaluations_of(how, path, path.possible_timesteps(config.objective.timesteps)).double().mean().item()
    return steps * evaluations_a_step(how.estimator, how.refinements)


def _drawn(config: RunConfig) -> float:
    """UNet evaluations that online training spends on drawing pairs, of the run's mean pair."""
    how, steps = config.online, config.train.steps
    return how.mix * how.evaluations_a_pair * max(0, steps - how.start) / steps


def _gradient_sums(network: torch.nn.Module) -> int:
    """Bytes of a micro-batch: each gradient is read and added to an fp32 sum (master_weights.py)."""
    return sum(p.nbytes + 8 * p.numel() for p in network.parameters() if p.requires_grad)
