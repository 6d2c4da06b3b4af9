"""ZeRO-1 (arXiv 1910.02054): each process keeps one part of each tensor, cut along the first dimension as FSDP2 does.
Two messages a step: sums are reduced to parts, parts are gathered to whole tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from inpo_fast.runtime.distributed import BUCKET
from inpo_fast.runtime.watch import exchange

# torch 2.13 gave them new names and warns of the old ones
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Zero1Partition:
    """This process's number among `world`. Rows are dealt as torch.chunk does: ceil(n / world) each, the last ones
    get fewer or none."""

    rank: int
    world: int

    def rows(self, length: int, rank: int | None = None) -> slice:
        each = -(-length // self.world)
        begin = min(length, each * (self.rank if rank is None else rank))
        return slice(begin, min(length, begin + each))

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this process's rows. whole: at least 1-dimensional."""
        return whole[self.rows(len(whole))]

    @torch.no_grad()
    def reduce(self, whole: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
        """parts <- this process's rows of the sum of `whole` over all processes."""
        for some, mine in self._buckets(whole, parts):
            sizes = [self._largest(w) for w in some]
            message = torch.zeros(self.world, sum(sizes), dtype=mine[0].dtype, device=mine[0].device)
            for rank in range(self.world):
                for cell, w in zip(message[rank].split(sizes), some, strict=True):
                    rows = w[self.rows(len(w), rank)]
                    cell[: rows.numel()].view(rows.shape).copy_(rows)
            received = torch.empty_like(message[0])
            with exchange("gradients"):
                _reduce_scatter(received, message.view(-1))
            for cell, part in zip(received.split(sizes), mine, strict=True):
                part.copy_(cell[: part.numel()].view(part.shape))

    @torch.no_grad()
    def gather(self, parts: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> None:
        """whole <- the parts of all processes, rounded to its dtype before they travel."""
        for some, mine in self._buckets(whole, parts):
            sizes = [self._largest(w) for w in some]
            message = torch.zeros(sum(sizes), dtype=some[0].dtype, device=mine[0].device)
            for cell, part in zip(message.split(sizes), mine, strict=True):
                cell[: part.numel()].view(part.shape).copy_(part)
            received = torch.empty(self.world, len(message), dtype=message.dtype, device=message.device)
            with exchange("weights"):
                _all_gather(received.view(-1), message)
            for rank in range(self.world):
                for cell, w in zip(received[rank].split(sizes), some, strict=True):
                    rows = w[self.rows(len(w), rank)]
                    rows.copy_(cell[: rows.numel()].view(rows.shape))

    def _largest(self, whole: torch.Tensor) -> int:
        """Elements of the first process's part."""
        return whole[self.rows(len(whole), 0)].numel()

    def _buckets(
        self, whole: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Few large messages instead of one per tensor; a bucket has one dtype."""
        some, mine, size = [], [], 0
        for w, part in zip(whole, parts, strict=True):
            if some and (size >= BUCKET or w.dtype != some[0].dtype):
                yield some, mine
                some, mine, size = [], [], 0
            some.append(w)
            mine.append(part)
            size += w.numel()
        if some:
            yield some, mine
