"""Networks on the meta device, where shapes are known and nothing is computed: what is counted there follows from them.

Most of torch's operations work out the shape of their result in Python, through dozens of smaller ones. A network
repeats its blocks, so here each operation is asked once for each shape: half of a plan.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NEVER_ASKED = object()
RESULTS: dict[tuple, tuple | None] = {}  # what was asked -> described; None: asked again each time


@contextmanager
def counting() -> Iterator[None]:
    """Around all that is counted on the meta device: the attention that a GPU runs, and results from RESULTS. Modes
    that count are entered inside."""
    with _fused_attention(), _KnownResults():
        yield


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch would take the unfused attention, which no GPU runs: it keeps whole attention maps."""

    def fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _KnownResults(TorchDispatchMode):
    """Answers an operation on meta tensors with empty ones of the shapes that it had before; never one whose answer is
    a tensor that it was given, or a view of one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = (operation, _described(args), _described(tuple(kwargs.items())))
        try:
            known = RESULTS.get(asked, NEVER_ASKED)
        except TypeError:  # an argument without a hash
            return operation(*args, **kwargs)
        if isinstance(known, tuple):
            return _empty(known)
        out = operation(*args, **kwargs)
        if known is NEVER_ASKED:
            RESULTS[asked] = _described(out) if _is_new((args, kwargs), out) else None
        return out


def _is_new(given, out) -> bool:
    """Whether only meta tensors come out, and none that shares its memory with what was given."""
    results = [x for x in tree_leaves(out) if x is not None]
    if not all(isinstance(y, torch.Tensor) and y.is_meta for y in results):
        return False
    storages = {x.untyped_storage()._cdata for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
    return not any(y.untyped_storage()._cdata in storages for y in results)


def _described(x) -> tuple:
    """With a hash. The type belongs to it: 1, 1.0 and True are equal and give results of other dtypes."""
    if isinstance(x, torch.Tensor):
        return torch.Tensor, x.shape, x.stride(), x.dtype, x.device
    return (type(x), *map(_described, x)) if isinstance(x, (list, tuple)) else (type(x), x)


def _empty(described):
    kind, *what = described
    if kind is torch.Tensor:
        shape, stride, dtype, device = what
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return kind(map(_empty, what)) if kind in (list, tuple) else what[0]
