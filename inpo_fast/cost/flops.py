"""What a network, VAE and text encoder compute and keep: parameters, FLOPs, saved activations, on the meta device.

Exact for the shapes that run (2 FLOPs a multiply-add; convolutions, matrix products and attention only). Nothing is
loaded or computed: a model's configuration is enough.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from inpo_fast.models.families import denoiser_of
from inpo_fast.models.meta_device import counting

CLASSES = ("conv 3x3", "conv 1x1", "linear", "attention")  # in the table's order
WEIGHT = {"convolution": 1, "convolution_backward": 2}  # operation -> which of its arguments the weight is


@dataclass(frozen=True)
class Passes:
    """One image through a module. forward, backward: FLOPs by class; activations: bytes kept for the backward pass;
    block: of them, those that the largest block keeps."""

    parameters: int
    forward: dict[str, int]
    backward: dict[str, int]
    activations: int
    block: int

    @property
    def forward_flop(self) -> int:
        return sum(self.forward.values())

    @property
    def backward_flop(self) -> int:
        return sum(self.backward.values())


def network_passes(network: torch.nn.Module, side: int, tokens: int, checkpointing: bool = False) -> Passes:
    """network: a denoiser's, on the meta device, in the dtype it computes in; side: of the latent; tokens: of the text
    embedding. checkpointing: blocks keep their inputs only, and one block at a time is computed again."""
    parameters, denoiser = sum(p.numel() for p in network.parameters()), denoiser_of(network)
    with counting():
        kept = _Kept(network, denoiser.blocks(network))
        with Flops() as forward, kept.watching():
            output = denoiser.meta_pass(network, side, tokens)
        activations, largest = kept.bytes, kept.largest_block
        if checkpointing:
            network.enable_gradient_checkpointing()
            kept = _Kept(network, denoiser.blocks(network))
            with kept.watching():
                output = denoiser.meta_pass(network, side, tokens)
            activations = kept.bytes + largest
        with Flops() as backward:
            output.backward(torch.empty_like(output))
    return Passes(parameters, forward.by_class(), backward.by_class(), activations, largest)


def forward_flop(run: Callable[[], object]) -> int:
    """FLOPs of a call without gradient on the meta device."""
    with torch.no_grad(), counting(), Flops() as counter:
        run()
    return sum(counter.flop.values())


def ask_vae(vae: torch.nn.Module, pixels: int) -> object:
    """One image through the encoder of a meta AutoencoderKL."""
    return vae.encode(torch.empty(1, 3, pixels, pixels, dtype=next(vae.parameters()).dtype, device="meta"))


def ask_texts(encoders: Sequence[torch.nn.Module], tokens: int) -> object:
    """One prompt through all text encoders of a model (CLIPTextModel on the meta device)."""
    return [encoder(torch.zeros(1, tokens, dtype=torch.int64, device="meta")) for encoder in encoders]


class Flops(TorchDispatchMode):
    """Adds up `flop` by class over the operations inside its block, by torch's own formulas. Its FlopCounterMode gives
    the same and takes twice as long: it follows modules and looks for a decomposition of each operation."""

    def __init__(self):
        super().__init__()
        self.flop: Counter[str] = Counter()

    def by_class(self) -> dict[str, int]:
        known = [kind for kind in CLASSES if kind in self.flop]
        return {kind: self.flop[kind] for kind in (*known, *(self.flop.keys() - set(known)))}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        if formula := flop_registry.get(operation.overloadpacket):
            self.flop[_kind(operation.overloadpacket.__name__, args)] += formula(*args, **kwargs, out_val=out)
        return out


def _kind(operation: str, args: tuple) -> str:
    if operation in WEIGHT:
        return "conv 1x1" if args[WEIGHT[operation]].shape[2:] == (1, 1) else "conv 3x3"
    if operation in ("bmm", "baddbmm") or "attention" in operation:
        return "attention"
    return "linear" if operation in ("mm", "addmm") else operation


class _Kept:
    """Bytes of the storages that autograd keeps, weights left out, and how many of them the largest block adds."""

    def __init__(self, module: torch.nn.Module, blocks: list[torch.nn.Module]):
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held on to: a freed one's number would be used again
        self.blocks = blocks
        self.largest_block = 0

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        before: dict[torch.nn.Module, int] = {}
        handles = []
        for block in self.blocks:
            handles.append(block.register_forward_pre_hook(lambda block, _: before.update({block: self.bytes})))
            handles.append(block.register_forward_hook(lambda block, *_: self._left(before[block])))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, before: int) -> None:
        self.largest_block = max(self.largest_block, self.bytes - before)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return x
