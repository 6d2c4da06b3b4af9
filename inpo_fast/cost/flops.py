"""What a UNet, VAE and text encoder compute and keep: parameters, FLOPs, saved activations, on the meta device.

Exact for the shapes that run (2 FLOPs a multiply-add; convolutions, matrix products and attention only). Nothing is
loaded or computed: a model's configuration is enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from inpo_fast.models.peak_memory import fused_attention

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


def unet_passes(unet: torch.nn.Module, side: int, tokens: int, checkpointing: bool = False) -> Passes:
    """unet: a UNet2DConditionModel on the meta device, in the dtype it computes in; side: of the latent; tokens: of the
    text embedding. checkpointing: blocks keep their inputs only, and one block at a time is computed again."""
    parameters = sum(p.numel() for p in unet.parameters())
    with fused_attention():
        kept = _Kept(unet)
        with FlopCounterMode(display=False) as forward, kept.watching():
            answer = ask_unet(unet, side, tokens)
        forward = _by_class(forward, unet)
        activations, largest = kept.bytes, kept.largest_block
        if checkpointing:
            unet.enable_gradient_checkpointing()
            kept = _Kept(unet)
            with kept.watching():
                answer = ask_unet(unet, side, tokens)
            activations = kept.bytes + largest
        with FlopCounterMode(display=False) as backward:
            answer.backward(torch.empty_like(answer))
    return Passes(parameters, forward, _by_class(backward, unet), activations, largest)


def ask_unet(unet: torch.nn.Module, side: int, tokens: int) -> torch.Tensor:
    """One image through a meta UNet, as `unet_passes` describes it: the prediction (1, C, side, side)."""
    config, dtype = unet.config, unet.dtype
    sample = torch.empty(1, config.in_channels, side, side, dtype=dtype, device="meta")
    text = torch.empty(1, tokens, config.cross_attention_dim, dtype=dtype, device="meta")
    more = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        more["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, dtype=dtype, device="meta"),
            "time_ids": torch.empty(1, 6, dtype=dtype, device="meta"),
        }
    time = torch.empty(1, dtype=torch.int64, device="meta")
    return unet(sample, time, text, **more).sample


def forward_bytes(unet: torch.nn.Module, side: int, tokens: int) -> int:
    """Memory of one image in a pass without gradient, estimated: all skip connections, and three tensors of the size
    of the largest that a layer reads or writes."""
    largest, skips, handles = 0, 0, []

    def look(module, inputs, output):
        nonlocal largest
        sizes = [x.numel() for x in (*inputs, output) if isinstance(x, torch.Tensor)]
        largest = max(largest, *sizes)

    def skip(module, inputs, output):
        nonlocal skips
        skips += sum(x.numel() for x in output[1])

    for module in unet.modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(look))
    for block in unet.down_blocks:
        handles.append(block.register_forward_hook(skip))
    with torch.no_grad(), fused_attention():
        ask_unet(unet, side, tokens)
    for handle in handles:
        handle.remove()
    return (skips + 3 * largest) * unet.dtype.itemsize


def forward_flop(run: Callable[[], object]) -> int:
    """FLOPs of a call without gradient on the meta device."""
    with torch.no_grad(), fused_attention(), FlopCounterMode(display=False) as counter:
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

    def __init__(self, module: torch.nn.Module):
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held on to: a freed one's number would be used again
        self.blocks = [m for m in module.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
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
