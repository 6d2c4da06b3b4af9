"""The trained parameters three times: fp32 masters, the copies that the model computes with, their summed gradient.

bf16 keeps 8 bits: an update of 1e-5 times a weight would vanish in it, and so would the hundredth of many small
gradients. Masters and sums are therefore fp32, and the working copies are rounded from the masters once per update,
in place, so that whatever holds them (a captured graph, an inversion) sees the new values. In fp32 masters and copies
are the same tensors.
"""

from collections.abc import Iterable

import torch
from inpo_kernels.refresh import refresh_


class Weights:
    """names, working (the model's own parameters), masters (fp32 leaves with `.grad`): lists of equal length."""

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], masters: dict[str, torch.Tensor] | None = None):
        """masters: fp32 values of the parameters where the model holds rounded ones."""
        named = list(named)
        self.names = [name for name, _ in named]
        self.working = [parameter for _, parameter in named]
        self.shared = all(parameter.dtype == torch.float32 for parameter in self.working)
        if self.shared:
            self.masters = self.working
        else:
            values = [p.detach().float() if masters is None else masters[name] for name, p in named]
            self.masters = [
                torch.nn.Parameter(torch.empty_like(p, dtype=torch.float32).copy_(value))
                for p, value in zip(self.working, values, strict=True)
            ]
            self.refresh()

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The fp32 sums, allocated once."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters]

    def zero(self) -> None:
        torch._foreach_zero_(self.gradients)
        if not self.shared:
            for parameter in self.working:
                parameter.grad = None

    def accumulate(self) -> None:
        """After each backward pass: what the working copies received goes into the fp32 sums."""
        if self.shared:
            return
        for parameter, total in zip(self.working, self.gradients, strict=True):
            if parameter.grad is not None:
                total.add_(parameter.grad)
                parameter.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """After each update of the masters."""
        if not self.shared:
            refresh_(self.masters, [parameter.detach() for parameter in self.working])
