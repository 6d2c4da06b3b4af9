"""What bench.step times: ways to compute the gradient of some pairs, on one set of weights."""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from diffusers import UNet2DConditionModel

from bench.step.naive import lockstep_step, naive_step
from inpo_fast.data.loader import Item
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.models.fast.fast_unet import make_fast
from inpo_fast.models.models import DTYPES, Models
from inpo_fast.runtime.phases import phase
from inpo_fast.training.step import train_step
from inpo_fast.training.step_batch import StepConfig, make_step_batch

STEPS, SEED = 10, 0
NAMES = ("naive", "lockstep", "plain", "fused", "compiled")
CHANNELS_LAST = {"fused", "compiled"}  # what wants it
# beta: large logits would turn bf16's rounding of an error into another weight of the pair, in all contenders alike
BETA = {"fp32": 2000.0, "bf16": 20.0}
SIZES = {"naive": (), "lockstep": ("lockstep_batch",)}  # what may be halved; of all others:
OURS = ("micro_batch", "inversion_batch")


@dataclass
class Contender:
    """One way to compute the gradient of some pairs; it leaves it in the masters' `.grad`."""

    name: str
    step: Callable[[list[Item]], None]
    items: list[Item]
    sizes: dict[str, int] = field(default_factory=dict)  # as they are now: `step` looks here
    setup: dict[str, float] = field(default_factory=dict)  # seconds: its modules, its first call
    gradient_error: float | None = None  # relative, from the first contender's
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    waits: int | None = None
    too_large: list[str] = field(default_factory=list)  # sizes that it ran out of memory at
    failed: bool = False  # at the smallest of them too


def move_policy(models: Models) -> None:
    """The policy must differ from the reference, or every logit is 0. Drawn where the weights are."""
    with torch.no_grad():
        for i, p in enumerate(models.parameters()):
            seeded = None if p.is_meta else torch.Generator(p.device).manual_seed(i)
            noise = torch.randn(p.shape, generator=seeded, device=p.device)
            p.add_(0.01 * p.std().nan_to_num() * noise)
    models.weights.refresh()


def build(name: str, models: Models, items: list[Item], asked: argparse.Namespace) -> Contender:
    """asked: precision and sizes, as bench.step was called with."""
    how = {"beta": BETA[asked.precision], "inversion_steps": STEPS, "seed": SEED}
    sizes = {size: getattr(asked, size) for size in SIZES.get(name, OURS)}
    if name not in SIZES:
        sizes["vae_batch"] = models.vae_batch(items[0].winner.pixels.shape[0])
    if name == "naive":
        other, autocast = naive_models(models), None if asked.precision == "fp32" else DTYPES[asked.precision]
        sums = [p.grad for p in other.policy.parameters()]
        own = [(g, total) for g, total in zip(sums, models.weights.gradients, strict=True) if g is not total]

        def naive(items: list[Item]) -> None:
            for g, _ in own:
                g.zero_()
            naive_step(items, other, autocast=autocast, **how)
            for g, total in own:
                total.copy_(g)

        return Contender(name, naive, items)
    if name == "lockstep":
        twins = {who: twin(getattr(models, who)) for who in ("policy", "reference")}
        if models.device.type == "cuda":
            for unet in twins.values():
                unet.forward = torch.compile(unet.forward, dynamic=False)
        other = _with_unets(models, **twins)
        return Contender(
            name, lambda items: lockstep_step(items, other, batch=sizes["lockstep_batch"], **how), items, sizes
        )
    twins = {who: twin(getattr(models, who)) for who in ("policy", "reference")}
    other = _with_unets(models, **twins)
    for unet in twins.values():
        make_fast(unet, "off" if name == "plain" else name)
    inversion = InversionConfig(steps=STEPS, grid="diffusers-0.22", evaluate_at="target", guidance=1.0)
    empty = other.encode_empty()

    def ours(items: list[Item]) -> None:
        at_once = replace(inversion, batch=sizes["inversion_batch"])
        objective, vae_batch = ObjectiveConfig(beta=how["beta"]), sizes["vae_batch"]
        step_config = StepConfig(
            method="inpo",
            objective=objective,
            inversion=at_once,
            micro_batch=sizes["micro_batch"],
            vae_sample=True,
            seed=SEED,
            vae_batch=vae_batch,
        )
        with phase("encode"):
            step_batch = make_step_batch(items, other, step_config, empty)
        train_step(step_batch, other, step_config, len(items), clip=float("inf"))

    return Contender(name, ours, items, sizes)


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


def naive_models(models: Models) -> Models:
    """An fp32 policy in NCHW with the values of the masters, whose gradients go to the masters' own sums where these
    lie alike. The reference has the working precision, as in the published script."""
    with torch.device("meta"):
        policy = UNet2DConditionModel.from_config(models.policy.config)
    masters = zip(models.weights.names, models.weights.masters, strict=True)
    values = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in masters}
    policy.load_state_dict(values, assign=True)
    for p, total in zip(policy.requires_grad_(True).parameters(), models.weights.gradients, strict=True):
        p.grad = total if total.stride() == p.stride() else torch.zeros_like(p)
    return _with_unets(models, policy.eval(), twin(models.reference))
