"""Trajectories of the reference's inversion, kept on disk: runs that differ in seed, beta or lr pay for them once.

With inversion.model=reference the inversion of x_0 does not depend on the trained weights, and where levels are global
the inversion to the highest t evaluates the UNet wherever one to any t below does. So a record is x_0 (fp32, as the VAE
gave it) and the model outputs of the inversion to objective.timesteps.max, in the dtype the UNet computes in; x_t
follows for any t by the very updates of the inversion, bit for bit. The states x_s between need not be kept: they would
triple the size. Its key is a hash of what the trajectory is a function of: pixels, size and crop if SDXL is conditioned
on them, the noise of the VAE sample (which depends on the seed: data.vae_sample=false lets seeds share), the prompt if
the inversion is conditional.

With inversion.frozen t is drawn from the pair's content instead of seed and global sample index, and a record is x_0,
x_t and the reference's output at t. It holds for this t only, so any grid will do.

Batches: an image's outputs are rounded by the batch they were computed in, and the cache fills batches otherwise than
a run without it. Equal to the last bit with inversion.batch=1 and one data.vae_batch, and with itself always; otherwise
to rounding.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from math import prod
from pathlib import Path
from typing import get_args

import numpy as np

from inpo_fast.caches.cached_batch import CachedBatch
from inpo_fast.caches.frozen_steps import FrozenSteps
from inpo_fast.caches.trajectory_replay import TrajectoryRecord, TrajectoryReplay
from inpo_fast.data.images import View
from inpo_fast.data.loader import DataConfig, Item
from inpo_fast.method.config import EvaluateAt, InversionConfig, ObjectiveConfig
from inpo_fast.method.inversion_schedule import inversion_schedule, shares_prefix
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import parse_json, read_text
from inpo_fast.runtime.fingerprint import fingerprint, tokenizer_fingerprints
from inpo_fast.runtime.memory import GIB
from inpo_fast.runtime.record_store import MANIFEST, RecordStore, digest

KEY = 33  # bytes of a key and its space in a shard's header


@dataclass(frozen=True)
class TrajectoryCache:
    """An open cache and what its keys are made of."""

    store: RecordStore
    form: TrajectoryRecord  # of a trajectory; with frozen its latent and dtype count
    frozen: bool
    prompted: bool  # the inversion is conditional
    vae_sample: bool
    told_sizes: bool  # the UNet is conditioned on size and crop
    views: float  # different views of an image that a run may meet; infinite where each position has its own

    @property
    def record_bytes(self) -> int:
        """On disk, of one image: fp32 latents, outputs in their own dtype, a checksum of 8 bytes for each, the key."""
        wide, narrow = (2, 1) if self.frozen else (1, self.form.outputs)
        return prod(self.form.latent) * (4 * wide + self.form.dtype.itemsize * narrow) + 8 * (wide + narrow) + KEY

    def notes(self, steps: int, pairs_per_step: int, pairs: int, processes: int) -> list[str]:
        """What to know before the first step: first of all what the run may add beside the room there is. UserError
        where that is too little.

        pairs: of the source. A process does not see what the others add meanwhile: at most, each makes all of it.
        """
        images = int(min(2 * steps * pairs_per_step, 2 * pairs * self.views * processes))
        there, place = len(self.store), self.store.folder.resolve()
        need = max(0, images - there) * self.record_bytes
        free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        what = (
            f"inversion.cache: at most {need / GIB:.3g} GiB more ({images:,} images x {self.record_bytes:,} bytes, "
            f"{there:,} there), {free / GIB:.3g} GiB free on the disk of {self.store.folder}"
        )
        if need > free:
            raise UserError(f"{what}; take another disk, fewer train.steps or a smaller inversion.steps")
        only = "inversion.cache: latents are drawn for each seed; with data.vae_sample=false other seeds can share it"
        return [what, only] if self.vae_sample else [what]

    def batch(self, items: list[Item], image_keys: list[keyed_rng.Key]) -> CachedBatch:
        """What is known of a step's images. image_keys: (seed, global sample index, side) of each, winner and loser in
        turn."""
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
            keys.append(self.store.key(json.dumps(facts).encode()))
        return FrozenSteps(self.store, keys, pairs) if self.frozen else TrajectoryReplay(self.store, keys, self.form)


def open_trajectory_cache(
    models: Models, inversion: InversionConfig, objective: ObjectiveConfig, data: DataConfig
) -> TrajectoryCache | None:
    """The cache that the configuration names, None where it names none. Writes nothing yet.

    UserError when the grid has no global levels, or the folder was made for something else.
    """
    if inversion.cache is None:
        return None
    path = models.noise_path
    how = {"steps": inversion.steps, "grid": inversion.grid, "evaluate_at": inversion.evaluate_at}
    if not inversion.frozen and not shares_prefix(path, **how):
        good = [
            f"{grid} ({at})"
            for grid, at in product(path.grids, get_args(EvaluateAt))
            if shares_prefix(path, **how | {"grid": grid, "evaluate_at": at})
        ]
        raise UserError(
            f"inversion.cache: inversion.grid={inversion.grid} with evaluate_at={inversion.evaluate_at} evaluates "
            f"the UNet for each t at other levels, so that no trajectory serves two of them; these grids can be "
            f"cached: {', '.join(good)}; with inversion.frozen=true any"
        )
    resolution = data.resolution or models.resolution
    latent = models.latent_shape(resolution)
    outputs, highest = 0, path.possible_timesteps(objective.timesteps).amax()
    if not inversion.frozen:
        levels = path.all_levels(inversion.steps)
        needed, counts = (inversion_schedule(path, t, **how).evaluations for t in (highest[None], levels))
        outputs = _outputs(Path(inversion.cache), max(1, int(needed)))
        highest = levels[counts >= outputs][0] if outputs <= counts[-1] else highest
    prompted = inversion.frozen or inversion.guidance == 1.0
    fixed = not data.vae_sample and data.crop == "center"
    views = (1 + data.flip) * (1 + (prompted and 0 < data.prompt_dropout < 1))
    return TrajectoryCache(
        store=RecordStore(Path(inversion.cache), _identity(models, inversion, objective, resolution, latent, outputs)),
        form=TrajectoryRecord(highest.item(), outputs, latent, models.dtype),
        frozen=inversion.frozen,
        prompted=prompted,
        vae_sample=data.vae_sample,
        told_sizes=models.micro_conditioning == "image",
        views=views if fixed else float("inf"),
    )


def _outputs(folder: Path, needed: int) -> int:
    """How many a record has: what the run's highest t needs, or what a folder that has more of them says."""
    try:
        there = parse_json(read_text(folder / MANIFEST))["answers"]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or not of this kind: the check that follows says so
        return needed
    return max(needed, there) if isinstance(there, int) else needed


def _identity(
    models: Models, inversion: InversionConfig, objective: ObjectiveConfig, resolution: int, latent: tuple, outputs: int
) -> dict:
    """All that model outputs and latents depend on beside the image; the manifest."""
    fast, settings = models.fast, models.config
    if fast == "compiled":
        fast += " as a CUDA graph" if settings.cuda_graphs else " by blocks"
    identity = {
        "holds": "frozen steps" if inversion.frozen else "trajectories",
        "fp8": inversion.fp8,
        "layout": 1,
        "reference": fingerprint(models.reference),
        "vae": fingerprint(models.vae),
        "text": digest(*(fingerprint(encoder).encode() for encoder in models.encoders)),
        "tokenizers": tokenizer_fingerprints(models.pipeline),
        "empty_prompt": "zeros" if models.denoiser.zeros_for_empty(models.pipeline) else "encoded",
        "precision": settings.precision,
        # where the fused inversion meets an adapter it takes another kernel, which rounds otherwise
        "fast": f"{fast}, {'adapters' if models.adapters else 'no adapters'}" if fast != "off" else fast,
        "device": models.device.type,
        "steps": inversion.steps,
        "grid": inversion.grid,
        "evaluate_at": inversion.evaluate_at,
        "guidance": inversion.guidance,
        "schedule": digest(models.noise_path.identity.encode()),
        "prediction": models.noise_path.output,
        "micro_conditioning": models.micro_conditioning,
        "latent": latent,
        "resolution": resolution,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
    if not inversion.frozen:
        identity["answers"] = outputs
    else:
        identity |= {
            "timesteps": [objective.timesteps.min, objective.timesteps.max],
            "tau_norm": objective.tau_norm,  # decides at which x_t the reference predicted
        }
    return identity


def _content(view: View) -> str:
    return _of_pixels(view.pixels)


def _content_mirrored(view: View) -> str:
    return _of_pixels(view.pixels[:, ::-1])


def _of_pixels(pixels: np.ndarray) -> str:
    return digest(repr(pixels.shape).encode(), np.ascontiguousarray(pixels).data)
