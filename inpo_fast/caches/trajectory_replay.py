"""x_t from the model outputs along an inversion on disk; inversions that are not there are computed and written."""

from dataclasses import dataclass

import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast.caches.cached_batch import CachedBatch, ScheduleOf
from inpo_fast.method.inversion import Predict, invert
from inpo_fast.method.inversion_schedule import InversionTrajectory
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import ROWS, RecordStore


@dataclass(frozen=True)
class TrajectoryRecord:
    """What is kept of an image's inversion: x_0, latent (C, h, w), and `outputs` model outputs in dtype, those of the
    inversion to t = highest."""

    highest: int | float
    outputs: int
    latent: tuple[int, int, int]
    dtype: torch.dtype


class TrajectoryReplay(CachedBatch):
    """x_t follows for any t from the outputs of the highest one by the updates of the inversion, bit for bit."""

    def __init__(self, store: RecordStore, keys: list[str], form: TrajectoryRecord):
        super().__init__(store, keys)
        self.form = form

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
        trajectory, evaluations, x_t = schedule_of(t), 0, torch.empty_like(x_0)
        left = torch.argsort(trajectory.evaluations, descending=True, stable=True).tolist()
        for _ in range(2):  # a second time for what turned out to be damaged
            evaluations += self._record(left, eps, x_0, schedule_of, batch, width)
            parts = [left[lo : lo + ROWS] for lo in range(0, len(left), ROWS)]
            left = [image for part in parts for image in self._replay(part, x_0, trajectory, x_t)]
            if not left:
                return x_t, evaluations
        raise UserError(f"{self.store.folder}: what was just written there cannot be read back; take another disk")

    def _record(
        self, images: list[int], eps: Predict, x_0: torch.Tensor, schedule_of: ScheduleOf, batch: int, width: int | None
    ) -> int:
        """Inverts those of the images that have no record, to the highest t, and writes the records."""
        new = sorted({int(r) for r in self.record[images] if self.keys[r] not in self.store})
        self._new[new] = True
        evaluations, group = 0, max(1, ROWS // batch) * batch  # full batches; not all outputs of a step at once
        for lo in range(0, len(new), group):
            part = new[lo : lo + group]
            # all have equally many steps, so with a multiple of the width every call is full: the last image repeated
            repeated = -len(part) % (width or 1)
            here = torch.tensor([self.image[r] for r in (*part, *part[-1:] * repeated)], device=x_0.device)
            recorder = OutputRecorder(eps, here, self.form.outputs)
            invert(recorder, x_0[here], schedule_of(torch.full((len(here),), self.form.highest)), batch=width or batch)
            parts = {"x_0": x_0[here][: len(part), None], "answers": recorder.outputs()[: len(part)]}
            self.store.write([self.keys[r] for r in part], parts)
            evaluations += len(part) * self.form.outputs
        return evaluations

    def _replay(
        self, images: list[int], x_0: torch.Tensor, trajectory: InversionTrajectory, x_t: torch.Tensor
    ) -> list[int]:
        """Writes x_t of the images, which are sorted by falling evaluations; returns those whose record is damaged."""
        device, keys = x_0.device, [self.keys[r] for r in self.record[images]]
        found = self.store.read("answers", keys, trajectory.evaluations[images].tolist())
        good = [i for i, outputs in zip(images, found, strict=True) if outputs is not None]
        if good:
            longest = int(trajectory.evaluations[good[0]])
            outputs = torch.zeros(len(good), longest, *self.form.latent, dtype=self.form.dtype)
            for row, own in zip(outputs, (own for own in found if own is not None), strict=True):
                row[: len(own)] = own
            rows, outputs = torch.tensor(good, device=device), outputs.to(device)
            p, q = (c[good].to(device) for c in (trajectory.p, trajectory.q))
            x = x_0[rows]
            for j in range(longest):  # p = 1 and q = 0 leave those alone that have arrived
                ddim_step_(x, outputs[:, j], p[:, j], q[:, j])
            x_t[rows] = x
        return [i for i, outputs in zip(images, found, strict=True) if outputs is None]


class OutputRecorder:
    """An eps that keeps its outputs: row r of the inversion is image `images[r]` of the step."""

    def __init__(self, eps: Predict, images: torch.Tensor, count: int):
        self.eps, self.count = eps, count
        self.images = torch.cat([images, images[-1:]])  # the last one stands for slots without an image, row -1
        self.calls = torch.zeros_like(self.images)
        self.kept: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        output = self.eps(x, time, self.images[rows])
        if self.kept is None:
            self.kept = output.new_empty(len(self.images), self.count, *output.shape[1:])
        self.kept[rows, self.calls[rows].clamp_max(self.count - 1)] = output
        self.calls[rows] += 1
        return output

    def outputs(self) -> torch.Tensor:
        """(images, count, C, h, w): each image's, in the order of its calls."""
        calls = self.calls[:-1].tolist()  # a sync, where there is something to write anyway
        assert calls == [self.count] * len(calls), f"{set(calls)} outputs an image, planned were {self.count}"
        return self.kept[:-1]
