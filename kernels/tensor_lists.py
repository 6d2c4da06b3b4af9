"""One launch over many tensors: a table of their addresses, and which block of which tensor a program takes."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl

BLOCK = 2048
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Table:
    """addresses: one (T,) int64 for each list; sizes (T,); tensor, block (P,) of each program. On their device."""

    addresses: list[torch.Tensor]
    sizes: torch.Tensor
    tensor: torch.Tensor
    block: torch.Tensor
    aligned: bool  # all addresses are multiples of 16 bytes: loads may be wide


def spacing(x: torch.Tensor) -> list[int]:
    """Strides that matter: the gradient of a (4, 8, 1, 1) weight may have others than the weight in its last two."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def check(lists: dict[str, list[torch.Tensor]]) -> None:
    """ValueError, naming list and number, where the lists do not hold alike tensors of one dtype each."""
    (first_name, first), *_ = lists.items()
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(f"{name} has {len(tensors)} tensors, {first_name} {len(first)}")
        for i, (x, y) in enumerate(zip(tensors, first, strict=True)):
            if x.shape != y.shape or spacing(x) != spacing(y) or x.device != first[0].device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(x.shape)}, strides {x.stride()}, on {x.device}; "
                    f"{first_name}[{i}] {tuple(y.shape)}, strides {y.stride()}, on {y.device}: they must be alike"
                )
            if x.dtype != tensors[0].dtype or x.dtype not in TYPES:
                raise ValueError(
                    f"{name}[{i}] is {x.dtype}, {name}[0] {tensors[0].dtype}: one floating dtype in a list"
                )
            if not (x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)):
                raise ValueError(f"{name}[{i}] has gaps in memory (strides {x.stride()}); call .contiguous() on it")


def table(*lists: list[torch.Tensor]) -> Table:
    """The table of K lists of T alike tensors (see `check`). Kept for as long as the same tensors come again."""
    where = tuple(tuple(x.data_ptr() for x in tensors) for tensors in lists)
    return _build(where, tuple(x.numel() for x in lists[0]), lists[0][0].device)


@lru_cache(maxsize=8)
def _build(where: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], device: torch.device) -> Table:
    size = torch.tensor(sizes)
    blocks = (size + BLOCK - 1) // BLOCK
    programs = int(blocks.sum())
    block = torch.arange(programs) - (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    return Table(
        addresses=[torch.tensor(pointers, device=device) for pointers in where],
        sizes=size.to(device),
        tensor=torch.repeat_interleave(torch.arange(len(sizes)), blocks).to(device),
        block=block.to(device),
        aligned=all(pointer % 16 == 0 for pointers in where for pointer in pointers),
    )
