"""AdamW, the learning rate as a function of the step, clipping, and averaged weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its learning rate over time, averaged weights."""

    lr: float = 1.024e-5
    """Published value for SD1.5 and SDXL alike (1e-8 x 1024 pairs). Does not depend on the number of GPUs."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine end at 0 with the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    average: Literal["none", "last-half", "ema"] = "none"
    """Averaged weights become the output model: running mean over the last half of the steps, or EMA."""
    ema_decay: float = 0.99


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step 0, 1, … steps - 1: linear warm-up that reaches lr at step warmup_steps - 1, then decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.decay == "linear":
        return config.lr * (1 - progress)
    if config.decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay
    )


class Average:
    """A running mean or EMA of the weights after each update. fp32."""

    def __init__(self, parameters: Sequence[torch.Tensor], config: OptimConfig, steps: int):
        self.parameters, self.config, self.steps = parameters, config, steps
        self.mean = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, …: a function of the step alone, so a resumed run continues exactly."""
        if self.config.average == "ema":
            weight = 1 - min(self.config.ema_decay, (step + 1) / (step + 10))
        else:
            taken = step - self.steps // 2  # iterates already in the mean
            weight = 1.0 if taken <= 0 else 1 / (taken + 1)
        torch._foreach_lerp_(self.mean, [p.detach().float() for p in self.parameters], weight)
