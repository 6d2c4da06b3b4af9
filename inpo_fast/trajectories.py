"""Trajectories of the reference's inversion, kept on disk: runs that differ in seed, beta or lr pay for them once.

With inversion.model=reference the climb from x_0 does not depend on the trained weights, and where levels are global
the climb to the highest one asks the UNet all that a climb to any t asks. So a record is x_0 (fp32, as the VAE gave it)
and the answers along the highest climb, in the dtype the UNet computes in; x_t follows for any t by the very updates of
the inversion, bit for bit. The states x_s between need not be kept: they would triple the size. Its key is a hash of
what the trajectory is a function of: pixels, size and crop if SDXL is told them, the noise of the VAE sample
(which depends on the seed: data.vae_sample=false lets seeds share), the prompt if the inversion is conditional.

With inversion.frozen t is drawn from the pair's content instead of seed and position, and a record is x_0, x_t and the
reference's answer at t. It holds for this t only, so any grid will do.

Batches: an image's answers are rounded by the batch they were computed in, and the cache fills batches otherwise than
a run without it. Equal to the last bit with inversion.batch=1, and with itself always; otherwise to rounding.
"""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from inpo_kernels.ddim_step import ddim_step_

from inpo_fast import draws
from inpo_fast.data.images import View
from inpo_fast.data.windows import DataConfig, Item
from inpo_fast.fast_unet import resolve
from inpo_fast.fingerprint import fingerprint
from inpo_fast.inversion import Eps, InversionConfig, invert
from inpo_fast.models import Models
from inpo_fast.objectives import ObjectiveConfig
from inpo_fast.refusal import Refusal
from inpo_fast.schedule import Climb, EvaluateAt, Grid, has_global_levels, plan
from inpo_fast.shards import ROWS, Shards, digest

GIB = 2**30
KEY = 33  # bytes of a key and its space in a shard's header


@dataclass(frozen=True)
class Trajectories:
    """An open cache and what its keys are made of. latent: (C, h, w) of x_0; answers: n of a record, 0 if frozen."""

    shards: Shards
    frozen: bool
    prompted: bool
    vae_sample: bool
    told_sizes: bool
    T: int
    latent: tuple[int, int, int]
    answers: int
    dtype: torch.dtype
    views: float  # different views of an image that a run may meet; infinite where each position has its own

    @property
    def record_bytes(self) -> int:
        """On disk, of one image: fp32 latents, answers in their own dtype, a checksum of 8 bytes for each, the key."""
        wide, narrow = (2, 1) if self.frozen else (1, self.answers)
        elements = self.latent[0] * self.latent[1] * self.latent[2]
        return elements * (4 * wide + self.dtype.itemsize * narrow) + 8 * (wide + narrow) + KEY

    def notes(self, steps: int, pairs_per_step: int, pairs: int, processes: int) -> list[str]:
        """What to know before the first step: first of all what the run may add beside the room there is. Refusal
        where that is too little.

        pairs: of the source. A process does not see what the others add meanwhile: at most, each makes all of it.
        """
        images = int(min(2 * steps * pairs_per_step, 2 * pairs * self.views * processes))
        there, place = len(self.shards), self.shards.folder.resolve()
        need = max(0, images - there) * self.record_bytes
        free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        what = (
            f"inversion.cache: at most {need / GIB:.3g} GiB more ({images:,} images x {self.record_bytes:,} bytes, "
            f"{there:,} there), {free / GIB:.3g} GiB free on the disk of {self.shards.folder}"
        )
        if need > free:
            raise Refusal(f"{what}; take another disk, fewer train.steps or a smaller inversion.steps")
        only = "inversion.cache: latents are drawn for each seed; with data.vae_sample=false other seeds can share it"
        return [what, only] if self.vae_sample else [what]

    def of(self, items: list[Item], image_keys: list[draws.Key]) -> "Held":
        """What is known of a window. image_keys: (seed, position, side) of each image, winner and loser in turn."""
        views = [view for item in items for view in (item.winner, item.loser)]
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
            contents = list(pool.map(_content, views))
            mirrored = list(pool.map(_content_mirrored, views)) if self.frozen else contents
        # whichever way round: both views of an image get one t, so that a pair has four records at most
        upright = [min(both) for both in zip(contents, mirrored, strict=True)]
        pairs = [digest(w.encode(), l.encode()) for w, l in zip(upright[::2], upright[1::2], strict=True)]
        keys = []
        for number, (view, content) in enumerate(zip(views, contents, strict=True)):
            facts = {
                "pixels": content,
                "told": [view.original, view.crop] if self.told_sizes else None,
                "vae": list(image_keys[number]) if self.vae_sample else "mean",
                "prompt": items[number // 2].prompt if self.prompted else None,
                "pair": pairs[number // 2] if self.frozen else None,
            }
            keys.append(self.shards.key(json.dumps(facts).encode()))
        return Held(self, keys, pairs)


class Held:
    """One window's part of the cache: what is there, and what is made and written because it is not.

    Images (M,) are numbered as the window numbers them. Two with one key are one record, computed once.
    """

    def __init__(self, cache: Trajectories, keys: list[str], pairs: list[str]):
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

    def t_keys(self, seed: int, items: list[Item]) -> list[draws.Key]:
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
        self, eps: Eps, x_0: torch.Tensor, t: torch.Tensor, climb_to: Callable[[torch.Tensor], Climb], batch: int
    ) -> tuple[torch.Tensor, int]:
        """x_t of the window's images (M, C, h, w) in fp32, and the image evaluations spent on it.

        eps: the reference with the inversion's conditioning. t: (M,) on the CPU. climb_to: the plan for given t.
        """
        if self.cache.frozen:
            return self._frozen_noise(eps, x_0, t, climb_to, batch)
        climb, spent, x_t = climb_to(t), 0, torch.empty_like(x_0)
        left = torch.argsort(climb.evaluations, descending=True, stable=True).tolist()
        for _ in range(2):  # a second time for what turned out to be damaged
            spent += self._make(left, eps, x_0, climb_to, batch)
            left = [i for lo in range(0, len(left), ROWS) for i in self._replay(left[lo : lo + ROWS], x_0, climb, x_t)]
            if not left:
                return x_t, spent
        raise Refusal(f"{self.cache.shards.folder}: what was just written there cannot be read back; take another disk")

    def _make(self, images: list[int], eps: Eps, x_0: torch.Tensor, climb_to, batch: int) -> int:
        """Climbs to the highest level with those of the images that have no record, and writes the records."""
        cache, new = self.cache, sorted({int(r) for r in self.record[images] if self.keys[r] not in self.cache.shards})
        self._made[new] = True
        spent, group = 0, max(1, ROWS // batch) * batch  # full batches; not all answers of a window at once
        for lo in range(0, len(new), group):
            part = new[lo : lo + group]
            here = torch.tensor([self.image[r] for r in part], device=x_0.device)
            recording = Recording(eps, here, cache.answers)
            _, more = invert(recording, x_0[here], climb_to(torch.full((len(part),), cache.T - 1)), batch=batch)
            parts = {"x_0": x_0[here][:, None], "answers": recording.answers()}
            cache.shards.write([self.keys[r] for r in part], parts)
            spent += more
        return spent

    def _replay(self, images: list[int], x_0: torch.Tensor, climb: Climb, x_t: torch.Tensor) -> list[int]:
        """x_t of the images, which are sorted by falling evaluations, from their answers; gives those without."""
        cache, device = self.cache, x_0.device
        keys = [self.keys[r] for r in self.record[images]]
        found = cache.shards.read("answers", keys, climb.evaluations[images].tolist())
        good = [i for i, answers in zip(images, found, strict=True) if answers is not None]
        if good:
            longest = int(climb.evaluations[good[0]])
            answers = torch.zeros(len(good), longest, *cache.latent, dtype=cache.dtype)
            for row, own in zip(answers, (own for own in found if own is not None), strict=True):
                row[: len(own)] = own
            rows, answers = torch.tensor(good, device=device), answers.to(device)
            p, q = (c[good].to(device) for c in (climb.p, climb.q))
            x = x_0[rows]
            for j in range(longest):  # p = 1 and q = 0 leave those alone that are there
                ddim_step_(x, answers[:, j], p[:, j], q[:, j])
            x_t[rows] = x
        return [i for i, answers in zip(images, found, strict=True) if answers is None]

    def _frozen_noise(
        self, eps: Eps, x_0: torch.Tensor, t: torch.Tensor, climb_to, batch: int
    ) -> tuple[torch.Tensor, int]:
        """As `noise`: x_t from disk, or climbed to; in `rows` by record."""
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
                climb = climb_to(t[images])
                rows[torch.tensor(new, device=device)], spent = invert(
                    lambda x, time, own: eps(x, time, here[own]), x_0[here], climb, batch=batch
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

    def __init__(self, eps: Eps, images: torch.Tensor, count: int):
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


def open_trajectories(
    models: Models, inversion: InversionConfig, objective: ObjectiveConfig, data: DataConfig
) -> Trajectories | None:
    """The cache that the configuration names, None where it names none. Writes nothing yet.

    Refusal when the grid has no global levels, or the folder was made for something else.
    """
    if inversion.cache is None:
        return None
    how = {"steps": inversion.steps, "grid": inversion.grid, "evaluate_at": inversion.evaluate_at}
    if not inversion.frozen and not has_global_levels(models.schedule, **how):
        good = [
            f"{grid} ({at})"
            for grid, at in product(get_args(Grid), get_args(EvaluateAt))
            if has_global_levels(models.schedule, **how | {"grid": grid, "evaluate_at": at})
        ]
        raise Refusal(
            f"inversion.cache: inversion.grid={inversion.grid} with evaluate_at={inversion.evaluate_at} asks the UNet "
            f"for each t at other levels, so that no trajectory serves two of them; these grids can be cached: "
            f"{', '.join(good)}; with inversion.frozen=true any"
        )
    resolution = data.resolution or models.resolution
    side = models.reference.config.sample_size * resolution // models.resolution
    latent = (models.reference.config.in_channels, side, side)
    T = models.schedule.T
    top = plan(models.schedule, torch.tensor([T - 1]), **how)
    prompted = inversion.frozen or inversion.guidance == 1.0
    fixed = not data.vae_sample and data.crop == "center"
    views = (1 + data.flip) * (1 + (prompted and 0 < data.prompt_dropout < 1))
    return Trajectories(
        shards=Shards(Path(inversion.cache), _identity(models, inversion, objective, resolution, latent)),
        frozen=inversion.frozen,
        prompted=prompted,
        vae_sample=data.vae_sample,
        told_sizes=models.is_xl and models.config.micro_conditioning == "image",
        T=T,
        latent=latent,
        answers=0 if inversion.frozen else int(top.evaluations[0]),
        dtype=models.dtype,
        views=views if fixed else float("inf"),
    )


def _identity(
    models: Models, inversion: InversionConfig, objective: ObjectiveConfig, resolution: int, latent: tuple
) -> dict:
    """All that answers and latents depend on beside the image; the manifest."""
    schedule, settings = models.schedule, models.config
    levels = (schedule.abar.tolist(), schedule.first_abar, schedule.steps_offset)
    fast = resolve(settings.fast, models.device)
    encoders = [getattr(models.pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    identity = {
        "holds": "frozen steps" if inversion.frozen else "trajectories",
        "fp8": inversion.fp8,
        "layout": 1,
        "reference": fingerprint(models.reference),
        "vae": fingerprint(models.vae),
        "text": digest(*(fingerprint(encoder).encode() for encoder in encoders if encoder is not None)),
        "empty_prompt": "zeros" if models.pipeline.config.get("force_zeros_for_empty_prompt") else "encoded",
        "precision": settings.precision,
        # where the fused inversion meets an adapter it takes another kernel, which rounds otherwise
        "fast": f"{fast}, {'adapters' if models.adapters else 'no adapters'}" if fast != "off" else fast,
        "device": models.device.type,
        "steps": inversion.steps,
        "grid": inversion.grid,
        "evaluate_at": inversion.evaluate_at,
        "guidance": inversion.guidance,
        "schedule": digest(repr(levels).encode()),
        "prediction": "v" if models.predicts_v else "epsilon",
        "micro_conditioning": settings.micro_conditioning if models.is_xl else None,
        "latent": latent,
        "resolution": resolution,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
    if inversion.frozen:
        identity |= {
            "timesteps": [objective.timesteps.min, objective.timesteps.max],
            "tau_norm": objective.tau_norm,  # decides at which x_t the reference was asked
        }
    return identity


def _content(view: View) -> str:
    return _of_pixels(view.pixels)


def _content_mirrored(view: View) -> str:
    return _of_pixels(view.pixels[:, ::-1])


def _of_pixels(pixels: np.ndarray) -> str:
    return digest(repr(pixels.shape).encode(), np.ascontiguousarray(pixels).data)
