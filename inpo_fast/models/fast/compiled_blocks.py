"""models.fast=compiled: each block of a UNet under torch.compile, one graph for policy, reference and inversion.

The compiler makes one graph for calls that want a gradient and another for calls that do not, and the two round
differently: step-0 logits would not be 0. Here every evaluation runs the graph that has a gradient. Where nobody asks
for one, each block's output is cut off at once, so that what it kept for its backward pass is freed before the next
block begins.

A block's weights are inputs of its graph: policy and reference share it, and what the optimizer writes is seen. The
batch is of any size from two on, so that a last smaller one compiles nothing; a batch of one has graphs of its own, and
so would inference mode, under which pictures are therefore not drawn. A block that the compiler does not take whole, or
for which it would make too many graphs, is an error: it never runs uncompiled in silence.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

# graphs of one function, over all shapes of blocks: SD1.5 has 14 of its ResNet blocks, torch would give up at 8
MOST_GRAPHS = 128
OPTIONS = {"triton.mix_order_reduction": False}  # wrong gradients since torch 2.10 (pytorch issue 193061)


def blockwise(function: Callable) -> Callable:
    """`function` as the forward pass of a block that has `fast_mode`: (block, *arguments) -> tensor, or a tuple."""

    @functools.wraps(function)
    def forward(self: nn.Module, *args, **kwargs):
        if torch.compiler.is_compiling():  # inside a larger graph
            return function(self, *args, **kwargs)
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and x.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        out = graph_of(function)(self, *args, **kwargs)
        if not self.fast_mode.cuts:
            return out
        return tuple(map(cut, out)) if isinstance(out, tuple) else cut(out)

    return forward


@functools.cache
def graph_of(function: Callable) -> Callable:
    """The compiled function, one in a process: dynamo keeps its graphs by the shapes of block and arguments."""
    return torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)


def cut(x):
    """A tensor without its history. It keeps its flag: the next block must not see that nobody wants a gradient."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


@contextmanager
def limits() -> Iterator[None]:
    """Within the block dynamo makes as many graphs as there are shapes, and more than that are an error."""
    # fullgraph=True makes an error of it
    with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=16 * MOST_GRAPHS):
        yield


def evaluate(unet: nn.Module, forward: Callable, *args, **kwargs):
    """`forward` of a UNet whose blocks are compiled. Without gradient: on the graphs that have one, cut block by
    block."""
    mode = unet.fast_mode
    with limits():
        # fp8 is the inversion's alone and has no gradient: graphs of its own
        if torch.is_grad_enabled() or mode.fp8 is not None:
            return forward(unet, *args, **kwargs)
        mode.cuts = True
        try:
            with torch.enable_grad():
                out = forward(unet, *args, **kwargs)
        finally:
            mode.cuts = False
    if isinstance(out, tuple):
        return tuple(x.detach() for x in out)
    out.sample = out.sample.detach()
    return out
