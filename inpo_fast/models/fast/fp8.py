"""Linear layers in fp8, for the inversion only.

e4m3 keeps 4 bits: 3 % off on each product's factors, averaged over the sum. That moves x_t a little, which the loss
takes as it is (both predictions see the same x_t); in a prediction that the loss compares it would not be allowed.
One scale for each row of the activations and of the weights (amax / 448).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-12


class Narrow:
    """(out, in) e4m3 and (out,) fp32 scales of a linear layer. Kept at the layer, so that a compiled block's graph is
    that of all blocks of its shape; a copy of the layer has none."""

    def __init__(self, layer: nn.Linear):
        self.weight = torch.empty_like(layer.weight, dtype=torch.float8_e4m3fn, requires_grad=False)
        self.scale = torch.empty(len(layer.weight), dtype=torch.float32, device=layer.weight.device)

    def __deepcopy__(self, memo) -> None:
        return None


class Fp8Weights:
    """Of linear layers, rounded anew by `refresh` in place."""

    def __init__(self, layers: Iterable[nn.Linear]):
        self.layers = list(layers)
        for layer in self.layers:
            layer.narrow = Narrow(layer)

    @torch.no_grad()
    def refresh(self) -> None:
        for layer in self.layers:
            new, new_scale = quantise(layer.weight)
            layer.narrow.weight.copy_(new)
            layer.narrow.scale.copy_(new_scale)

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) to (…, out) in x's dtype."""
        narrow = layer.narrow
        rows, scale = quantise(x.reshape(-1, x.shape[-1]))
        out = _product(rows, scale, narrow.weight, narrow.scale, x.dtype)
        return (out if layer.bias is None else out + layer.bias).unflatten(0, x.shape[:-1])


def eligible(layer: nn.Module) -> bool:
    """The tensor cores want multiples of 16. An adapter around a layer is not a plain one."""
    return type(layer) is nn.Linear and layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) to e4m3 and (N,) fp32 scales: x is about e4m3 times its row's scale."""
    scale = (x.abs().amax(-1).float() / LARGEST).clamp_min(SMALLEST_SCALE)
    return (x.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def _product(a, scale_a, b, scale_b, dtype: torch.dtype) -> torch.Tensor:
    """(M, K) times (N, K) transposed: the tensor cores' own on CUDA, widened elsewhere."""
    if a.is_cuda and dtype == torch.bfloat16:
        return torch._scaled_mm(a, b.t(), scale_a[:, None], scale_b[None, :], out_dtype=dtype, use_fast_accum=True)
    return (F.linear(a.float(), b.float()) * scale_a[:, None] * scale_b).to(dtype)
