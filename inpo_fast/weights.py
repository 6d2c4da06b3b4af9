"""The trained parameters three times: fp32 masters, the copies that the model computes with, their summed gradient.

bf16 keeps 8 bits: an update of 1e-5 times a weight would vanish in it, and so would the hundredth of many small
gradients. Masters and sums are therefore fp32, and the working copies are rounded from the masters once per update,
in place, so that whatever holds them (a captured graph, an inversion) sees the new values. In fp32 masters and copies
are the same tensors.
"""

from collections.abc import Iterable

import torch
from inpo_kernels.refresh import refresh_


def _add_to(master: torch.nn.Parameter, working: torch.nn.Parameter) -> None:
    """During the backward pass, as soon as a narrow gradient is whole: never more than one of them is held."""
    master.grad.add_(working.grad)
    working.grad = None


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
            for parameter, master in zip(self.working, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(lambda p, master=master: _add_to(master, p))

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The fp32 sums, allocated once."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters]

    def zero(self) -> None:
        """Before the first backward pass of a step: they add to these sums."""
        torch._foreach_zero_(self.gradients)

    @torch.no_grad()
    def refresh(self) -> None:
        """After each update of the masters."""
        if not self.shared:
            refresh_(self.masters, [parameter.detach() for parameter in self.working])
