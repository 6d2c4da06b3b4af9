"""What a cache on disk knows of the images of one step: its interface, and the latents that both kinds of record have.

trajectory_cache.py says what a record is made from. trajectory_replay.py recomputes x_t from the model outputs along an
inversion; frozen_steps.py reads x_t itself, and the reference's output at it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from inpo_fast.method.inversion import Predict
from inpo_fast.method.inversion_schedule import InversionTrajectory
from inpo_fast.runtime.record_store import RecordStore

ScheduleOf = Callable[[torch.Tensor], InversionTrajectory]  # of timesteps (M,) on the CPU


class CachedBatch(ABC):
    """The records of one step's images: those on disk, and those that are computed and written.

    Images (M,) are numbered as in the step's batch. Several with one key have one record, computed once.
    """

    pair_contents: list[str] | None = None  # (N,): digests that t is drawn from, where it depends on a pair's content

    def __init__(self, store: RecordStore, keys: list[str]):
        """keys: (M,), of each image's record."""
        self.store = store
        self.keys = list(dict.fromkeys(keys))
        number = {key: i for i, key in enumerate(self.keys)}
        self.record = torch.tensor([number[key] for key in keys])  # (M,): of each image, into keys
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        self.image = [first[key] for key in self.keys]  # one image of each record
        self._latents = store.read("x_0", self.keys)
        self._new = torch.tensor([x is None for x in self._latents])  # by record: computed, not read

    @property
    def missing(self) -> list[int]:
        """The images that the VAE has to encode."""
        return [i for i, x in zip(self.image, self._latents, strict=True) if x is None]

    @property
    def hits(self) -> torch.Tensor:
        """(M,) float: 1 where nothing had to be computed for an image."""
        return (~self._new[self.record]).double()

    def x_0(self, encoded: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """(M, C, h, w) fp32. encoded: batches of latents of the `missing` images, in order."""
        known = [x for x in self._latents if x is not None]
        rows = torch.cat([*encoded, *([torch.cat(known).to(device)] if known else [])])
        place = torch.empty(len(self.keys), dtype=torch.int64)
        new = torch.tensor([x is None for x in self._latents])
        place[torch.cat([new.nonzero()[:, 0], (~new).nonzero()[:, 0]])] = torch.arange(len(self.keys))
        return rows[place[self.record].to(device)]

    @abstractmethod
    def x_t(
        self, eps: Predict, x_0: torch.Tensor, t: torch.Tensor, schedule_of: ScheduleOf, batch: int, width: int | None
    ) -> tuple[torch.Tensor, int]:
        """x_t of the images (M, C, h, w) in fp32, and the image evaluations spent on it.

        eps: the reference with the inversion's conditioning. t: (M,) on the CPU.
        batch, width: as of `invert`; width, however few of the images are new.
        """

    def reference(
        self, images: torch.Tensor, predict: Callable[[slice | torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        """The reference's outputs at x_t for some images (B,), and how many of them were predicted.

        predict(part): those of a part of the B.
        """
        return predict(slice(None)), len(images)
