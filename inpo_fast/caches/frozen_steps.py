"""inversion.frozen: a pair's x_t and the reference's output at it, read from disk, or computed and written."""

from collections.abc import Callable

import torch

from inpo_fast.caches.cached_batch import CachedBatch, ScheduleOf
from inpo_fast.method.inversion import Predict, invert
from inpo_fast.runtime.record_store import RecordStore


class FrozenSteps(CachedBatch):
    """t is a function of the pair's content, so a record holds what a step needs of the reference."""

    def __init__(self, store: RecordStore, keys: list[str], pair_contents: list[str]):
        super().__init__(store, keys)
        self.pair_contents = pair_contents
        # one row a record
        self._x_0: torch.Tensor | None = None
        self._x_t: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._known = torch.zeros(len(self.keys), dtype=torch.bool)  # which of the outputs

    @torch.no_grad()
    def x_t(
        self,
        eps: Predict,
        x_0: torch.Tensor,
        t: torch.Tensor,
        schedule_of: ScheduleOf,
        batch: int,
        width: int | None = None,
    ) -> tuple[torch.Tensor, int]:
        evaluations, device = 0, x_0.device
        if self._x_t is None:  # else: the step is repeated with smaller batches
            found = list(zip(*(self.store.read(part, self.keys) for part in ("x_t", "answer")), strict=True))
            new = [r for r, (x, output) in enumerate(found) if x is None or output is None]
            self._new[new] = True
            rows = torch.empty(len(found), *x_0.shape[1:], device=device)
            if new:
                images = torch.tensor([self.image[r] for r in new])
                here = images.to(device)
                rows[torch.tensor(new, device=device)], evaluations = invert(
                    lambda x, time, own: eps(x, time, here[own]),
                    x_0[here],
                    schedule_of(t[images]),
                    batch=batch,
                    width=width,
                )
            old = sorted(set(range(len(found))) - set(new))
            if old:
                rows[torch.tensor(old, device=device)] = torch.cat([found[r][0] for r in old]).to(device)
                self._keep(torch.tensor(old), torch.cat([found[r][1] for r in old]).to(device))
            self._x_t, self._x_0 = rows, x_0[torch.tensor(self.image, device=device)]
        return self._x_t[self.record.to(device)], evaluations

    @torch.no_grad()
    def reference(
        self, images: torch.Tensor, predict: Callable[[slice | torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        """New records are written as soon as the outputs of all of the step's images are there."""
        records = self.record[images]
        new = (~self._known[records]).nonzero()[:, 0]
        if len(new):
            # all of a micro-batch in one go, as the policy predicts it: at the first step their outputs are equal
            self._keep(records[new], predict(slice(None) if len(new) == len(images) else new))
            if self._known.all():
                self._write()
        return self._outputs[records.to(self._outputs.device)], len(new)

    def _keep(self, records: torch.Tensor, outputs: torch.Tensor) -> None:
        if self._outputs is None:
            self._outputs = outputs.new_empty(len(self.keys), *outputs.shape[1:])
        self._outputs[records.to(outputs.device)] = outputs
        self._known[records] = True

    def _write(self) -> None:
        new = self._new.nonzero()[:, 0]
        parts = {"x_0": self._x_0, "x_t": self._x_t, "answer": self._outputs}
        rows = {name: value[new.to(value.device)][:, None] for name, value in parts.items()}
        self.store.write([self.keys[r] for r in new], rows)
