"""What a cache of trajectories holds of one window, and what is computed and written because it does not hold it.

trajectory_cache.py says what a record is. Here records are read and replayed, or made; with inversion.frozen the
reference's answers at x_t are too.
"""

from collections.abc import Callable

import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast.data.loader import Item
from inpo_fast.method.inversion import Predict, invert
from inpo_fast.method.inversion_schedule import InversionTrajectory
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.record_store import ROWS


class CachedBatch:
    """One window's part of the cache: what is there, and what is made and written because it is not.

    Images (M,) are numbered as the window numbers them. Two with one key are one record, computed once.
    """

    def __init__(self, cache, keys: list[str], pairs: list[str]):
        self.cache, self.pairs = cache, pairs
        self.keys = list(dict.fromkeys(keys))
        number = {key: i for i, key in enumerate(self.keys)}
        self.record = torch.tensor([number[key] for key in keys])  # (M,): of each image, into keys
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        self.image = [first[key] for key in self.keys]  # one image of each record
        self._latents = cache.shards.read("x_0", self.keys)
        self._made = torch.tensor([x is None for x in self._latents])  # not taken from disk
        # frozen, one row a record: x_t, the reference's answers and which of these are known
        self._x_t: torch.Tensor | None = None
        self._answers: torch.Tensor | None = None
        self._answered = torch.zeros(len(self.keys), dtype=torch.bool)

    @property
    def missing(self) -> list[int]:
        """The images that the VAE has to encode."""
        return [i for i, x in zip(self.image, self._latents, strict=True) if x is None]

    @property
    def hits(self) -> torch.Tensor:
        """(M,) float: 1 where nothing had to be made for an image."""
        return (~self._made[self.record]).double()

    def t_keys(self, seed: int, items: list[Item]) -> list[keyed_rng.Key]:
        """What t of each of the window's pairs is drawn from."""
        if self.cache.frozen:
            return [("t", pair) for pair in self.pairs]
        return [("t", seed, item.position) for item in items]

    def x_0(self, encoded: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """(M, C, h, w) fp32. encoded: batches of latents of the `missing` images, in order."""
        known = [x for x in self._latents if x is not None]
        rows = torch.cat([*encoded, *([torch.cat(known).to(device)] if known else [])])
        place = torch.empty(len(self.keys), dtype=torch.int64)
        new = torch.tensor([x is None for x in self._latents])
        place[torch.cat([new.nonzero()[:, 0], (~new).nonzero()[:, 0]])] = torch.arange(len(self.keys))
        return rows[place[self.record].to(device)]

    @torch.no_grad()
    def noise(
        self,
        eps: Predict,
        x_0: torch.Tensor,
        t: torch.Tensor,
        schedule_of: Callable[[torch.Tensor], InversionTrajectory],
        batch: int,
        width: int | None = None,
    ) -> tuple[torch.Tensor, int]:
        """x_t of the window's images (M, C, h, w) in fp32, and the image evaluations spent on it.

        eps: the reference with the inversion's conditioning. t: (M,) on the CPU. schedule_of: the trajectories to
        given t. width: as of `invert`, however few of the images are new.
        """
        if self.cache.frozen:
            return self._frozen_noise(eps, x_0, t, schedule_of, batch, width)
        trajectory, spent, x_t = schedule_of(t), 0, torch.empty_like(x_0)
        left = torch.argsort(trajectory.evaluations, descending=True, stable=True).tolist()
        for _ in range(2):  # a second time for what turned out to be damaged
            spent += self._make(left, eps, x_0, schedule_of, batch, width)
            left = [
                i for lo in range(0, len(left), ROWS) for i in self._replay(left[lo : lo + ROWS], x_0, trajectory, x_t)
            ]
            if not left:
                return x_t, spent
        raise UserError(
            f"{self.cache.shards.folder}: what was just written there cannot be read back; take another disk"
        )

    def _make(
        self, images: list[int], eps: Predict, x_0: torch.Tensor, schedule_of, batch: int, width: int | None
    ) -> int:
        """Inverts to the highest level those of the images that have no record, and writes the records."""
        cache, new = self.cache, sorted({int(r) for r in self.record[images] if self.keys[r] not in self.cache.shards})
        self._made[new] = True
        spent, group = 0, max(1, ROWS // batch) * batch  # full batches; not all answers of a window at once
        for lo in range(0, len(new), group):
            part = new[lo : lo + group]
            # all go equally far: with a multiple of the width every call is full (the last image again and again)
            again = -len(part) % (width or 1)
            here = torch.tensor([self.image[r] for r in (*part, *part[-1:] * again)], device=x_0.device)
            recording = Recording(eps, here, cache.answers)
            invert(recording, x_0[here], schedule_of(torch.full((len(here),), cache.top)), batch=width or batch)
            parts = {"x_0": x_0[here][: len(part), None], "answers": recording.answers()[: len(part)]}
            cache.shards.write([self.keys[r] for r in part], parts)
            spent += len(part) * cache.answers
        return spent

    def _replay(
        self, images: list[int], x_0: torch.Tensor, trajectory: InversionTrajectory, x_t: torch.Tensor
    ) -> list[int]:
        """x_t of the images, which are sorted by falling evaluations, from their answers; gives those without."""
        cache, device = self.cache, x_0.device
        keys = [self.keys[r] for r in self.record[images]]
        found = cache.shards.read("answers", keys, trajectory.evaluations[images].tolist())
        good = [i for i, answers in zip(images, found, strict=True) if answers is not None]
        if good:
            longest = int(trajectory.evaluations[good[0]])
            answers = torch.zeros(len(good), longest, *cache.latent, dtype=cache.dtype)
            for row, own in zip(answers, (own for own in found if own is not None), strict=True):
                row[: len(own)] = own
            rows, answers = torch.tensor(good, device=device), answers.to(device)
            p, q = (c[good].to(device) for c in (trajectory.p, trajectory.q))
            x = x_0[rows]
            for j in range(longest):  # p = 1 and q = 0 leave those alone that are there
                ddim_step_(x, answers[:, j], p[:, j], q[:, j])
            x_t[rows] = x
        return [i for i, answers in zip(images, found, strict=True) if answers is None]

    def _frozen_noise(
        self, eps: Predict, x_0: torch.Tensor, t: torch.Tensor, schedule_of, batch: int, width: int | None
    ) -> tuple[torch.Tensor, int]:
        """As `noise`: x_t from disk, or inverted; in `rows` by record."""
        spent, device = 0, x_0.device
        if self._x_t is None:  # else: the step is repeated with smaller batches
            found = (self.cache.shards.read(part, self.keys) for part in ("x_t", "answer"))
            known = list(zip(*found, strict=True))
            new = [r for r, (x, answer) in enumerate(known) if x is None or answer is None]
            self._made[new] = True
            rows = torch.empty(len(known), *x_0.shape[1:], device=device)
            if new:
                images = torch.tensor([self.image[r] for r in new])
                here = images.to(device)
                trajectory = schedule_of(t[images])
                rows[torch.tensor(new, device=device)], spent = invert(
                    lambda x, time, own: eps(x, time, here[own]), x_0[here], trajectory, batch=batch, width=width
                )
            old = sorted(set(range(len(known))) - set(new))
            if old:
                rows[torch.tensor(old, device=device)] = torch.cat([known[r][0] for r in old]).to(device)
                self._keep(torch.tensor(old), torch.cat([known[r][1] for r in old]).to(device))
            self._x_t, self._x_0 = rows, x_0[torch.tensor(self.image, device=device)]
        return self._x_t[self.record.to(device)], spent

    @torch.no_grad()
    def reference(
        self, images: torch.Tensor, ask: Callable[[slice | torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        """Frozen: the reference's answers at x_t for some images (B,) of the window, and how many were predicted.

        ask(part): predicts those of a part of the B. New records are written as soon as the window's last is answered.
        """
        records = self.record[images]
        new = (~self._answered[records]).nonzero()[:, 0]
        if len(new):
            # all of a micro-batch in one go, as the policy predicts it: at the first step their answers are equal
            self._keep(records[new], ask(slice(None) if len(new) == len(images) else new))
            if self._answered.all():
                self._write_frozen()
        return self._answers[records.to(self._answers.device)], len(new)

    def _keep(self, records: torch.Tensor, answers: torch.Tensor) -> None:
        if self._answers is None:
            self._answers = answers.new_empty(len(self.keys), *answers.shape[1:])
        self._answers[records.to(answers.device)] = answers
        self._answered[records] = True

    def _write_frozen(self) -> None:
        new = self._made.nonzero()[:, 0]
        parts = {"x_0": self._x_0, "x_t": self._x_t, "answer": self._answers}
        rows = {name: value[new.to(value.device)][:, None] for name, value in parts.items()}
        self.cache.shards.write([self.keys[r] for r in new], rows)


class Recording:
    """An eps that keeps what it answers: row r of the inversion is image `images[r]` of the window."""

    def __init__(self, eps: Predict, images: torch.Tensor, count: int):
        self.eps, self.count = eps, count
        self.images = torch.cat([images, images[-1:]])  # the last one stands for slots without an image, row -1
        self.asked = torch.zeros_like(self.images)
        self.kept: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, time: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        answer = self.eps(x, time, self.images[rows])
        if self.kept is None:
            self.kept = answer.new_empty(len(self.images), self.count, *answer.shape[1:])
        self.kept[rows, self.asked[rows].clamp_max(self.count - 1)] = answer
        self.asked[rows] += 1
        return answer

    def answers(self) -> torch.Tensor:
        """(images, count, C, h, w): each image's, in the order they were asked for."""
        asked = self.asked[:-1].tolist()  # a sync, where there is something to write anyway
        assert asked == [self.count] * len(asked), f"{set(asked)} answers an image, planned were {self.count}"
        return self.kept[:-1]
