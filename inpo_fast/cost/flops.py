"""What a network, VAE and text encoder compute and keep: parameters, FLOPs, saved activations, on the meta device.

Exact for the shapes that run (2 FLOPs a multiply-add; convolutions, matrix products and attention only). Nothing is
loaded or computed: a model's configuration is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from inpo_fast.models.families import denoiser_of
from inpo_fast.models.meta_device import counting

CLASSES = {  # operation -> class of the table
    "aten.convolution": "conv",
    "aten.convolution_backward": "conv",
    "aten.mm": "linear",
    "aten.addmm": "linear",
    "aten.bmm": "attention",
    "aten.baddbmm": "attention",
}


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
        with FlopCounterMode(display=False) as forward, kept.watching():
            output = denoiser.meta_pass(network, side, tokens)
        forward = _by_class(forward, network)
        activations, largest = kept.bytes, kept.largest_block
        if checkpointing:
            network.enable_gradient_checkpointing()
            kept = _Kept(network, denoiser.blocks(network))
            with kept.watching():
                output = denoiser.meta_pass(network, side, tokens)
            activations = kept.bytes + largest
        with FlopCounterMode(display=False) as backward:
            output.backward(torch.empty_like(output))
    return Passes(parameters, forward, _by_class(backward, network), activations, largest)


def forward_flop(run: Callable[[], object]) -> int:
    """FLOPs of a call without gradient on the meta device."""
    with torch.no_grad(), counting(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ask_vae(vae: torch.nn.Module, pixels: int) -> object:
    """One image through the encoder of a meta AutoencoderKL."""
    return vae.encode(torch.empty(1, 3, pixels, pixels, dtype=next(vae.parameters()).dtype, device="meta"))


def ask_texts(encoders: Sequence[torch.nn.Module], tokens: int) -> object:
    """One prompt through all text encoders of a model (CLIPTextModel on the meta device)."""
    return [encoder(torch.zeros(1, tokens, dtype=torch.int64, device="meta")) for encoder in encoders]


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


def _by_class(counter: FlopCounterMode, module: torch.nn.Module) -> dict[str, int]:
    """FLOPs of conv 3x3, conv 1x1, linear and attention."""
    out: dict[str, int] = {}
    for operation, flop in counter.get_flop_counts()["Global"].items():
        name = str(operation)
        kind = "attention" if "attention" in name else CLASSES.get(name, name)
        out[kind] = out.get(kind, 0) + flop
    pointwise = {
        name for name, m in module.named_modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)
    }
    small = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.partition(".")[2].removesuffix(".base_layer") in pointwise
    )
    all_convolutions = out.pop("conv", 0)
    if not small:  # the backward pass does not say which module a convolution belongs to
        return {"conv": all_convolutions} | out
    return {"conv 3x3": all_convolutions - small, "conv 1x1": small} | out
