"""copies <- masters, rounded to the copies' dtype, in place and in one launch for all tensors of a model.

fp32 masters keep what an update of 1e-6 adds; forward and backward read bf16 copies. Once per optimizer step.
Lists of T alike tensors, dense in memory. Reads 4 bytes and writes 2 per element.
"""

import torch
import triton
import triton.language as tl
from inpo_kernels.tensor_lists import BLOCK, TYPES, check, table


def refresh_reference(masters: list[torch.Tensor], copies: list[torch.Tensor]) -> list[torch.Tensor]:
    """The definition, new tensors: rounded to nearest, ties to even."""
    return [master.to(copy.dtype) for master, copy in zip(masters, copies, strict=True)]


@triton.jit
def _round_block(p_master, p_copy, o, n, COPY: tl.constexpr, FULL: tl.constexpr):
    if FULL:  # without a mask loads and stores are 16 bytes wide
        tl.store(p_copy + o, tl.load(p_master + o).to(tl.float32).to(COPY))
    else:
        m = o < n
        tl.store(p_copy + o, tl.load(p_master + o, mask=m, other=0.0).to(tl.float32).to(COPY), mask=m)


@triton.jit
def _refresh_kernel(
    p_masters, p_copies, p_sizes, p_tensor, p_block,
    MASTER: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_t = tl.load(p_tensor + i)
    start, n = tl.load(p_block + i) * BLOCK, tl.load(p_sizes + i_t)
    o = start + tl.arange(0, BLOCK)
    p_master = tl.load(p_masters + i_t).to(tl.pointer_type(MASTER))
    p_copy = tl.load(p_copies + i_t).to(tl.pointer_type(COPY))
    if ALIGNED:
        p_master, p_copy = tl.multiple_of(p_master, 16), tl.multiple_of(p_copy, 16)
    if start + BLOCK <= n:
        _round_block(p_master, p_copy, o, n, COPY, True)
    else:
        _round_block(p_master, p_copy, o, n, COPY, False)


@torch.library.custom_op("inpo::refresh", mutates_args=("copies",))
def _refresh(masters: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    if not masters or not sum(x.numel() for x in masters):
        return
    t = table(masters, copies)
    _refresh_kernel[(len(t.block),)](
        *t.addresses, t.sizes, t.tensor, t.block,
        MASTER=TYPES[masters[0].dtype], COPY=TYPES[copies[0].dtype], ALIGNED=t.aligned, BLOCK=BLOCK,
    )  # fmt: skip


@_refresh.register_fake
def _(masters, copies):
    return None


@torch.no_grad()
def refresh_(masters: list[torch.Tensor], copies: list[torch.Tensor]) -> None:
    """copies <- masters in place: the kernel on CUDA, the reference elsewhere. ValueError on lists that do not fit."""
    check({"masters": masters, "copies": copies})
    if masters and masters[0].is_cuda:
        _refresh(masters, copies)
    else:
        for copy, new in zip(copies, refresh_reference(masters, copies), strict=True):
            copy.copy_(new)
