"""The most memory that a part of a model takes at once, counted on the meta device."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inpo_fast.models.meta_device import counting


def peak_bytes(run: Callable[[], object], modules: Iterable[torch.nn.Module]) -> int:
    """The most that a call without gradient on the meta device has alive at once: what it makes, but not the modules'
    own tensors. Exact for torch's tensors; what a kernel takes for itself (workspace) is not seen."""
    alive = _Alive(modules)
    with torch.no_grad(), counting(), alive:
        run()
    return alive.peak


def encoding_bytes(vae: torch.nn.Module, pixels: int, images: int = 1) -> int:
    """Memory of images through the encoder of a meta AutoencoderKL, their fp32 pixels included."""
    dtype = next(vae.parameters()).dtype

    def encode() -> None:
        pictures = torch.empty(images, 3, pixels, pixels, device="meta")
        vae.encode(pictures.to(dtype))

    return peak_bytes(encode, [vae])


def decoding_bytes(vae: torch.nn.Module, side: int, images: int = 1) -> int:
    """As `encoding_bytes`, of latents (images, C, side, side) through the decoder, one after the other."""
    dtype, channels = next(vae.parameters()).dtype, vae.config.latent_channels
    with one_by_one(vae):
        return peak_bytes(
            lambda: vae.decode(torch.empty(images, channels, side, side, dtype=dtype, device="meta")), [vae]
        )


@contextmanager
def one_by_one(vae: torch.nn.Module) -> Iterator[None]:
    """Within the block a diffusers VAE takes the images of a batch one after the other."""
    own, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = own


class _Alive(TorchDispatchMode):
    """Bytes of the storages that came to be inside and are not freed yet, and the most of them there were at once."""

    def __init__(self, modules: Iterable[torch.nn.Module]):
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata for m in modules for x in (*m.parameters(), *m.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number not in self.known:  # else: a view, written in place, or a weight
            self.known.add(number)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self.known.discard(number)
        self.now -= size
