"""Bytes that a model moves outside of its matrix products, counted on the meta device from the operations that run.

Counted for one image: of every operation each tensor it is given once and each result once. Weights are left out (a
batch shares them), so are views and allocations, which move nothing, and what torch's FLOP counter knows as a matrix
product. Three things that happen inside an operation are added because no argument shows them: the bias of a
convolution is a pass of its own over the result and its gradient one more read (torch's Convolution.cpp, cuDNN), and
a norm that reads its image again in a second launch is given a SECOND read, which a small batch may find in the L2.
Other copies inside operations, and what a cache saves between two operations, are not seen.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from inpo_fast.models.families import denoiser_of
from inpo_fast.models.meta_device import counting

SECOND = "second read"
KINDS = {  # operation, without the underscore of one in place -> kind; all others are copies
    "native_group_norm": "norm",
    "native_group_norm_backward": "norm",
    "native_layer_norm": "norm",
    "native_layer_norm_backward": "norm",
    "group_norm_silu": "norm",
    "group_norm_silu_backward": "norm",
    "layer_norm": "norm",
    "layer_norm_backward": "norm",
    "silu": "silu",
    "silu_backward": "silu",
    "gelu": "gate",
    "gelu_backward": "gate",
    "sigmoid": "gate",
    "mul": "gate",
    "geglu": "gate",
    "geglu_backward": "gate",
    "add": "add",
    "sum": "bias gradient",
}
AGAIN = {  # operation -> how many of its first tensors a second launch reads once more
    "native_group_norm": 1,
    "native_group_norm_backward": 2,
    "native_layer_norm_backward": 2,
    "group_norm_silu": 1,
    "group_norm_silu_backward": 2,
}
# What the product or the norm beside it could do on the way: cuBLASLt's and cuDNN's epilogues know a bias, its gradient
# and a constant factor, our GroupNorm knows SiLU.
RIDING = ("bias", "bias gradient", "scale", "silu")


@dataclass(frozen=True)
class NetworkTraffic:
    """Bytes of one image by kind. inversion: a forward pass that only moves the inversion (Denoiser.inverting)."""

    inversion: dict[str, int]
    forward: dict[str, int]
    backward: dict[str, int]


def roofline_bytes(kinds: dict[str, float]) -> float:
    """The convention of the roofline: what rides on a neighbour is free, a norm's second read is not."""
    return sum(size for kind, size in kinds.items() if kind not in RIDING)


def least_bytes(kinds: dict[str, float]) -> float:
    """The least that the counted operations can move as they are: a norm finds what it reads again in the L2."""
    return sum(size for kind, size in kinds.items() if kind != SECOND)


def network_traffic(network: torch.nn.Module, side: int, tokens: int) -> NetworkTraffic:
    """network: a denoiser's, on the meta device, plain or made fast, in the dtype it computes in; side: of the latent;
    tokens: of the text embedding."""
    denoiser = denoiser_of(network)
    network.zero_grad()  # a gradient left over would be added to
    with counting():
        with torch.no_grad(), denoiser.inverting(network), Traffic() as inversion:
            denoiser.meta_pass(network, side, tokens)
        with Traffic() as forward:
            output = denoiser.meta_pass(network, side, tokens)
        with Traffic() as backward:
            output.backward(torch.empty_like(output))
    return NetworkTraffic(dict(inversion.bytes), dict(forward.bytes), dict(backward.bytes))


def forward_traffic(run: Callable[[], object]) -> dict[str, int]:
    """Bytes by kind of a call without gradient on the meta device."""
    with torch.no_grad(), counting(), Traffic() as counter:
        run()
    return dict(counter.bytes)


class Traffic(TorchDispatchMode):
    """Adds up `bytes` by kind over the operations inside its block."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name == "convolution":
            return self._convolution(*args[:3], out)
        if name == "convolution_backward" and out[2] is not None:
            self.bytes["bias gradient"] += args[0].nbytes
        given, results = _tensors((args, kwargs)), _tensors(out)
        if operation.overloadpacket not in flop_registry and _moves(operation, name, given, results):
            read = [x for x in given if not isinstance(x, torch.nn.Parameter)]
            kind = KINDS.get(name.removesuffix("_"), "copy")
            if name in ("mul", "div") and len(given) == 1:
                kind = "scale"
            self.bytes[kind] += sum(_touched(x) for x in read) + sum(y.nbytes for y in results)
            if name in AGAIN:
                self.bytes[SECOND] += sum(_touched(x) for x in read[: AGAIN[name]])
        return out

    def _convolution(self, image, weight, bias, out):
        if bias is not None:
            self.bytes["bias"] += 2 * out.nbytes
        # cuDNN answers in channels_last where image or weights lie so; the meta device always in NCHW, and a copy that
        # is none on a GPU would follow
        lies = any(
            x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in (image, weight)
        )
        return out.contiguous(memory_format=torch.channels_last) if lies else out


def _tensors(tree) -> list[torch.Tensor]:
    """Each once, however often it is named."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}.values())


def _moves(operation, name: str, given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """False of a view and of an allocation."""
    if name.startswith(("empty", "new_empty")):
        return False
    storages = {x.untyped_storage()._cdata for x in given}
    return operation._schema.is_mutable or any(y.untyped_storage()._cdata not in storages for y in results)


def _touched(x: torch.Tensor) -> int:
    """Bytes: an expanded tensor has fewer than elements."""
    return min(x.nbytes, x.untyped_storage().nbytes())
