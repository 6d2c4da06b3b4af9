"""Plans of the shipped recipes on random weights, and what they are made of, each counted once in a process.

Counts follow from shapes alone, and SDXL's take seconds: neither beta nor n nor the number of GPUs changes them. What
counts a model, its FLOPs, activations and traffic, is remembered by the model's configuration and parameters.
"""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inpo_fast.config import RunConfig, parse
from inpo_fast.cost import flops, memory_traffic, plan, step_cost
from inpo_fast.models import peak_memory
from inpo_fast.models.unet import UNet
from inpo_fast.runtime.files import write_bytes

FORWARD_BYTES = UNet.forward_bytes
COUNTED: dict[tuple, object] = {}
TEXT_BYTES = plan.text_bytes


def recipe(name: str, *more: str) -> RunConfig:
    """A shipped recipe on random weights of its architecture."""
    model = ("--models.base=", f"--models.random={name.partition('-')[0]}")
    return parse("test", ["--config", name, *model, *more])


@cache
def plan_of(name: str, *more: str, gpus: int = 1) -> plan.Plan:
    return counted_once(recipe(name, *more), gpus)


def plan_without_unet(name: str, *more: str) -> plan.Plan:
    """What is not the UNet's: its counts, and the cost of a pair, are nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "network_passes", lambda *_: flops.Passes(0, {}, {}, 0, 0))
        patch.setattr(UNet, "forward_bytes", lambda *_: 0)
        patch.setattr(plan, "cost_of_a_pair", lambda *_, **__: SimpleNamespace(flop={}))
        return plan.make_plan(recipe(name, *more), 1)


def counted_once(config: RunConfig, gpus: int) -> plan.Plan:
    """plan.make_plan, with the counts below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "network_passes", network_passes)
        for count in (peak_memory.encoding_bytes, peak_memory.decoding_bytes):
            patch.setattr(plan, count.__name__, partial(remembered, count))
        patch.setattr(UNet, "forward_bytes", forward_bytes)
        patch.setattr(step_cost, "network_traffic", network_traffic)
        patch.setattr(plan, "text_bytes", text_bytes)
        patch.setattr(step_cost, "forward_flop", partial(remembered_call, flops.forward_flop))
        patch.setattr(step_cost, "forward_traffic", partial(remembered_call, memory_traffic.forward_traffic))
        return plan.make_plan(config, gpus)


def network_passes(unet: torch.nn.Module, side: int, tokens: int, checkpointing: bool = False) -> flops.Passes:
    passes = remembered(flops.network_passes, unet, side, tokens, checkpointing)
    if checkpointing:
        unet.enable_gradient_checkpointing()  # as the count leaves it: the traffic is that of such a UNet
    return passes


def network_traffic(unet: torch.nn.Module, side: int, tokens: int) -> memory_traffic.NetworkTraffic:
    return remembered(memory_traffic.network_traffic, unet, side, tokens)


def text_bytes(denoiser: UNet, texts: list[torch.nn.Module], tokens: int) -> int:
    return _once(("text", *map(_described, texts), tokens), lambda: TEXT_BYTES(denoiser, texts, tokens))


def forward_bytes(denoiser: UNet, unet: torch.nn.Module, side: int, tokens: int) -> int:
    return remembered(lambda *how: FORWARD_BYTES(denoiser, *how), unet, side, tokens, called=FORWARD_BYTES)


def remembered(count: Callable, unet: torch.nn.Module, *how, called: Callable | None = None):
    """count(unet, *how), the first time that it is asked for such a UNet. called: what it goes by, where it is new each
    time."""
    return _once((called or count, _described(unet), how), lambda: count(unet, *how))


def remembered_call(count: Callable, run: partial):
    """count(run), the first time for such a run: step_cost.py asks a VAE, or a list of text encoders."""
    asked, *how = run.args
    modules = asked if isinstance(asked, list) else [asked]
    return _once((count, run.func, *map(_described, modules), *how), lambda: count(run))


def _once(key: tuple, make: Callable):
    """Once a process; with pytest-xdist once for all workers of a run."""
    if key not in COUNTED:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
        if run is None:
            COUNTED[key] = make()
            return COUNTED[key]
        name = hashlib.sha256(repr([getattr(part, "__qualname__", part) for part in key]).encode()).hexdigest()
        file = Path(tempfile.gettempdir()) / f"counts-{run}" / name
        try:
            COUNTED[key] = pickle.loads(file.read_bytes())  # what a worker of this run has written
        except FileNotFoundError:
            COUNTED[key] = make()
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, pickle.dumps(COUNTED[key]))
    return COUNTED[key]


def _described(module: torch.nn.Module) -> tuple:
    """All that a count depends on: shapes, dtypes, what wants a gradient, and how the passes are made."""
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
    fast = "fast_mode" in module.__dict__
    return str(module.config), weights, fast, getattr(module, "is_gradient_checkpointing", None)
