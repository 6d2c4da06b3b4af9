"""The trained parameters three times: fp32 masters, the copies that the model computes with, their summed gradient.

bf16 keeps 8 bits: an update of 1e-5 times a weight would vanish in it, and so would the hundredth of many small
gradients. Masters and sums are therefore fp32, and the working copies are rounded from the masters once per update,
in place, so that whatever holds them (a captured graph, an inversion) sees the new values. In fp32 masters and copies
are the same tensors.

With a Zero1Partition several processes keep one part each of the masters, and so of the optimizer's state (zero1.py).
The model computes with whole copies: an evaluation needs no message, however many of them a process makes.
"""

from collections.abc import Iterable, Iterator

import torch
from inpo_kernels.refresh import refresh_

from inpo_fast.models.zero1 import Zero1Partition
from inpo_fast.runtime import distributed


class MasterWeights:
    """names, working (the model's own parameters), masters (fp32 leaves with `.grad`): lists of equal length.

    sums: what the backward passes add to, fp32, whole. Without a partition they are the masters' `.grad`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.nn.Parameter]],
        masters: dict[str, torch.Tensor] | None = None,
        partition: Zero1Partition | None = None,
    ):
        """masters: fp32 values of the parameters where the model holds rounded ones."""
        named = list(named)
        self.names = [name for name, _ in named]
        self.working = [parameter for _, parameter in named]
        self.partition = partition
        self.narrow = any(parameter.dtype != torch.float32 for parameter in self.working)
        self.shared = not self.narrow and partition is None
        self._narrow_sums: list[torch.Tensor] = []  # with a partition the masters' gradients are parts only
        if self.shared:
            self.masters = self.working
            return
        values = [p.detach().float() if masters is None else masters[name] for name, p in named]
        if partition is None:
            self.masters = [
                torch.nn.Parameter(torch.empty_like(p, dtype=torch.float32).copy_(value))
                for p, value in zip(self.working, values, strict=True)
            ]
        else:
            self.masters = [
                torch.nn.Parameter(partition.part(value).to(p.device, copy=True).contiguous())
                for p, value in zip(self.working, values, strict=True)
            ]
        self.refresh()
        if self.narrow:
            for number, parameter in enumerate(self.working):
                parameter.register_post_accumulate_grad_hook(lambda p, number=number: self._add(number, p))

    def _add(self, number: int, working: torch.nn.Parameter) -> None:
        """During the backward pass, as soon as a narrow gradient is whole: never more than one of them is held."""
        (self._narrow_sums[number] if self.partition else self.masters[number].grad).add_(working.grad)
        working.grad = None

    @property
    def sums(self) -> list[torch.Tensor]:
        """The fp32 sums, allocated once."""
        if self.partition is not None and self.narrow:
            if not self._narrow_sums:
                self._narrow_sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.working]
            return self._narrow_sums
        return _gradients(self.masters if self.partition is None else self.working)

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The masters' `.grad`."""
        return _gradients(self.masters)

    def zero(self) -> None:
        """Before the first backward pass of a step: they add to the sums."""
        torch._foreach_zero_(self.sums)

    def reduce(self) -> list[torch.Tensor]:
        """Adds the sums of all processes up into the masters' gradients, which are returned. Once per step."""
        if self.partition is None:
            distributed.sum_(self.sums, "gradients")
        else:
            self.partition.reduce(self.sums, self.gradients)
        return self.gradients

    def clip(self, largest: float) -> torch.Tensor:
        """Scales the gradient down to a norm of `largest`; returns the norm it had, over all processes' parts."""
        norm = torch.nn.utils.get_total_norm(self.gradients)
        if self.partition is not None:
            square = norm.square()
            distributed.sum_([square], "norm of the gradient")
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.masters, largest, norm)
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """After each update of the masters."""
        if self.partition is not None:
            self.partition.gather(self.masters, [parameter.detach() for parameter in self.working])
        elif not self.shared:
            refresh_(self.masters, [parameter.detach() for parameter in self.working])

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 master) one after the other, on every process. All processes must take all of them."""
        for name, master, working in zip(self.names, self.masters, self.working, strict=True):
            if self.partition is None:
                yield name, master.detach()
            else:
                whole = torch.empty_like(working, dtype=torch.float32)
                self.partition.gather([master], [whole])
                yield name, whole


def _gradients(owners: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    for owner in owners:
        if owner.grad is None:
            owner.grad = torch.zeros_like(owner)
    return [owner.grad for owner in owners]
