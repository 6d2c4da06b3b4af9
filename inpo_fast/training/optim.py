"""The optimizers, the learning rate as a function of the step, the loss scale of fp16, and averaged weights."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from inpo_kernels.adamw import adamw_

from inpo_fast.config.run import OptimConfig
from inpo_fast.runtime.errors import UserError


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


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimConfig, seed: int = 0
) -> torch.optim.Optimizer:
    """seed: of the rounding of adamw-bf16. UserError, naming the extra, where a package is missing."""
    parameters = list(parameters)
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    adam = {"betas": tuple(config.betas), "eps": config.eps}
    if config.kind == "adamw":
        # fused on a GPU: one launch; on the CPU torch's plain loop
        return torch.optim.AdamW(parameters, **common, **adam, fused=parameters[0].is_cuda or None)
    if config.kind == "adamw-bf16":
        return AdamWBf16(parameters, **common, **adam, seed=seed)
    if config.kind == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as problem:
            raise UserError(
                f"optim.kind=adamw-8bit needs bitsandbytes ({problem}); pip install 'inpo-fast[gpu]'"
            ) from problem
        return _in_order(AdamW8bit)(parameters, **common, **adam)
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **common, scale_parameter=False, relative_step=False, warmup_init=False)


def _in_order(optimizer: type) -> type:
    """bitsandbytes' optimizer, for parameters however they lie in memory.

    It walks through parameter, gradient and state in the order of memory and makes the first two contiguous for that,
    for good: a channels_last model loses its layout, and masters no longer lie as the copies do. Here it is given
    contiguous ones for the moment, and its state is contiguous too. So state and update do not depend on the layout: a
    run can be continued with another models.fast.
    """

    class InOrder(optimizer):
        state_in_order = True

        def init_state(self, group, p, gindex, pindex) -> None:
            with _contiguous(p):
                super().init_state(group, p, gindex, pindex)

        def update_step(self, group, p, gindex, pindex) -> None:
            with _contiguous(p):
                super().update_step(group, p, gindex, pindex)

    return InOrder


@contextmanager
def _contiguous(p: torch.nn.Parameter) -> Iterator[None]:
    data, gradient = p.data, p.grad
    if data.is_contiguous() and gradient.is_contiguous():
        yield
        return
    p.data, p.grad = data.contiguous(), gradient.contiguous()
    try:
        yield
    finally:
        data.copy_(p.data)
        p.data, p.grad = data, gradient


class AdamWBf16(torch.optim.Optimizer):
    """AdamW with stochastically rounded bf16 moments: kernels/adamw.py. All parameters in one launch."""

    def __init__(self, parameters, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, seed: int):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    for name in ("m", "v"):
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["step"] = 0
                state["step"] += 1
            if params:
                adamw_(
                    params, [p.grad for p in params], [s["m"] for s in states], [s["v"] for s in states],
                    lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                    step=states[0]["step"], seed=self.seed,
                )  # fmt: skip


@dataclass
class LossScale:
    """fp16 reaches down to 6e-8 only: the loss is scaled up before the backward pass and the gradient down after it.

    Halved when a gradient overflows (that update is left out), doubled after `patience` good steps.
    """

    value: float = 2.0**16
    good: int = 0
    patience: int = 200

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good >= self.patience:
            self.value, self.good = self.value * 2, 0


class Average:
    """A running mean or EMA of the weights after each update. fp32."""

    def __init__(self, parameters: Sequence[torch.Tensor], config: OptimConfig, steps: int):
        self.parameters, self.config, self.steps = parameters, config, steps
        self.mean = [p.detach().float().clone() for p in parameters]

    def weight(self, step: int) -> float:
        """Of the weights after step 0, 1, … in the average; 1: it is nothing but these."""
        return average_weight(step, self.steps, self.config)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step 0, 1, …: a function of the step alone, so a resumed run continues exactly."""
        torch._foreach_lerp_(self.mean, [p.detach().float() for p in self.parameters], self.weight(step))


def average_weight(step: int, steps: int, config: OptimConfig) -> float:
    """The share of the weights after step 0, 1, … in the average of a run of `steps`."""
    if config.average == "ema":
        return 1 - min(config.ema_decay, (step + 1) / (step + 10))
    taken = step - steps // 2  # iterates already in the mean
    return 1.0 if taken <= 0 else 1 / (taken + 1)
