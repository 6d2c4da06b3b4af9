"""The pairs of one optimizer step on this rank as tensors on the device: latents, text, timesteps.

Everything random of a step is drawn here from (seed, purpose, position, side): the result does not depend on the
micro-batch size nor on the number of processes beyond rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from inpo_fast import draws
from inpo_fast import objectives as obj
from inpo_fast.config import RunConfig
from inpo_fast.data.images import View
from inpo_fast.data.windows import Item
from inpo_fast.held import Held
from inpo_fast.inversion import InversionConfig, evaluations_of
from inpo_fast.latents import Latents
from inpo_fast.memory import fits
from inpo_fast.models import Conditioning, Models, Text
from inpo_fast.objectives import SIDES, Method, ObjectiveConfig
from inpo_fast.schedule import around, snap
from inpo_fast.trajectories import Trajectories
from inpo_fast.transfer import to_device


@dataclass(frozen=True)
class Recipe:
    """What train_step needs to know of a run."""

    method: Method
    objective: ObjectiveConfig
    inversion: InversionConfig
    micro_batch: int
    vae_sample: bool
    seed: int
    fused_loss: bool = True  # False: the plain path, for comparison
    trajectories: Trajectories | None = None  # of inversion.cache
    latents: Latents | None = None  # of data.cache
    vae_batch: int | None = None  # None: models.vae_batch

    @classmethod
    def of(cls, config: RunConfig, **more) -> "Recipe":
        """What a configuration says; more: other fields."""
        batch, data = config.train.micro_batch, config.data
        said = (config.method, config.objective, config.inversion, batch, data.vae_sample, config.seed)
        return cls(*said, **{"vae_batch": data.vae_batch, **more})


@dataclass
class Window:
    """The pairs of one optimizer step on this rank, on the device.

    x_0: (N, S, C, H, W) latents, S sides (winner first). t: (N,) on the CPU; times (N, S), a and s (N, S), its copies
    on the device, sqrt(abar_t) and sqrt(1 - abar_t). label, weight: (N,) fp32, of the pairs. Images of the
    conditioning are numbered pair * S + side.
    """

    items: list[Item]
    x_0: torch.Tensor
    t: torch.Tensor
    times: torch.Tensor
    a: torch.Tensor
    s: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    conditional: Conditioning
    unconditional: Conditioning
    keys: list[draws.Key] = field(default_factory=list)  # (seed, position, side) of each image
    held: Held | None = None  # what inversion.cache knows of the images
    point: torch.Tensor | None = None  # of kto, of all processes' windows; kept where a step is repeated
    number: int = 0  # of the timestep
    others: tuple["Window", ...] = ()  # the same pairs at their further timesteps (objective.timesteps.per_pair)

    @property
    def moments(self) -> tuple["Window", ...]:
        """All timesteps of the pairs, each as a window."""
        return (self, *self.others)


@torch.no_grad()
def make_window(items: list[Item], models: Models, recipe: Recipe, empty: Text) -> Window:
    """Latents, text and timesteps of decoded pairs. t depends on (seed, position) only (inversion.frozen: on the pair's
    content), and is shared by the sides."""
    sides = SIDES[recipe.method]
    views = [view for item in items for view in (item.winner, item.loser)[:sides]]
    keys = side_keys(items, recipe.seed, sides)
    held = None if recipe.trajectories is None else recipe.trajectories.of(items, keys)
    new = held.missing if held else [i for i in range(len(views)) if items[i // sides].x_0 is None]
    encoded = encode_views([views[i] for i in new], [keys[i] for i in new], models, recipe.vae_sample, recipe.vae_batch)
    # contiguous, whatever the VAE's layout is: sums over an image are rounded in the order of memory
    x_0 = (
        _with_cached(encoded, items, sides, models.device) if held is None else held.x_0(encoded, models.device)
    ).contiguous()
    prompts = list(dict.fromkeys(item.prompt for item in items))
    text = models.encode_prompts(prompts) if recipe.latents is None else recipe.latents.encode_prompts(prompts, models)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    row = to_device(torch.tensor([number[item.prompt] for item in items for _ in range(sides)]), models.device)
    time_ids = None
    if models.is_xl:
        target = (x_0.shape[-1] * models.resolution // models.reference.config.sample_size,) * 2
        published = models.config.micro_conditioning == "published"
        told = [(*target, 0, 0) if published else (*view.original, *view.crop) for view in views]
        time_ids = to_device(torch.tensor([(*sizes, *target) for sizes in told]).float(), models.device)
    drawn = [("t", recipe.seed, item.position) for item in items] if held is None else held.t_keys(recipe.seed, items)
    t = _timesteps(recipe, drawn)
    if recipe.inversion.grid == "snap" and uses_inversion(recipe):
        t = snap(t, recipe.inversion.steps, models.schedule.T)
    times, a, s = (to_device(c[..., None].repeat(1, 1, sides), models.device) for c in (t, *models.schedule.a_s(t)))
    first = Window(
        items=items,
        x_0=x_0.unflatten(0, (len(items), sides)),
        t=t[0],
        times=times[0],
        a=a[0],
        s=s[0],
        label=to_device(torch.tensor([item.label for item in items], dtype=torch.float32), models.device),
        weight=to_device(torch.tensor([item.weight for item in items], dtype=torch.float32), models.device),
        conditional=Conditioning(text, row, time_ids),
        unconditional=Conditioning(empty, torch.zeros_like(row), time_ids),
        keys=keys,
        held=held,
    )
    return replace(
        first,
        others=tuple(replace(first, t=t[k], times=times[k], a=a[k], s=s[k], number=k) for k in range(1, len(t))),
    )


def _timesteps(recipe: Recipe, keys: Sequence[draws.Key]) -> torch.Tensor:
    """(K, N): of each pair, the first drawn from its key."""
    span = recipe.objective.timesteps
    first = torch.tensor([draws.integer(span.min, span.max, *key) for key in keys])
    return around(first, span.min, span.max, span.per_pair)


def side_keys(items: list[Item], seed: int, sides: int) -> list[draws.Key]:
    """What is drawn for each image is drawn from this: (seed, position, side)."""
    return [(seed, item.position, side) for item in items for side in range(sides)]


@torch.no_grad()
def encode_views(
    views: list[View], keys: list[draws.Key], models: Models, vae_sample: bool, batch: int | None = None
) -> list[torch.Tensor]:
    """Latents of the views, fp32 on the device, in batches (B, C, h, w). batch: None for models.vae_batch.

    The VAE always sees a batch of one size, the last one filled up: kernels are chosen by size, so an image would
    otherwise be rounded by how many came with it, and a cache of latents would not hold the bits of a run without it.
    TooLarge where not even the VAE fits.
    """
    if not views:
        return []
    latents, chunk = [], batch or models.vae_batch(views[0].pixels.shape[0])
    for lo in range(0, len(views), chunk):
        part = views[lo : lo + chunk]
        filled = [*range(lo, lo + len(part)), *[lo] * (chunk - len(part))]
        pixels = torch.from_numpy(np.stack([views[i].pixels for i in filled]))
        side = models.reference.config.sample_size * pixels.shape[1] // models.resolution
        shape = (models.reference.config.in_channels, side, side)
        noise = draws.normals(shape, [("vae", *keys[i]) for i in filled]) if vae_sample else None
        with fits("data.vae_batch", chunk):
            pixels = to_device(pixels, models.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            encoded = models.encode_images(pixels, None if noise is None else to_device(noise, models.device))
        latents.append(encoded[: len(part)])
    return latents


def _with_cached(encoded: list[torch.Tensor], items: list[Item], sides: int, device: torch.device) -> torch.Tensor:
    """(M, C, h, w): the encoded images and those whose latents came from a cache, in the window's order."""
    fresh = iter(torch.cat(encoded).split(sides) if encoded else ())
    return torch.cat([next(fresh) if item.x_0 is None else to_device(item.x_0[:sides], device) for item in items])


def inversion_costs(positions: Sequence[int], recipe: Recipe, models: Models) -> list[int]:
    """UNet evaluations that the inversion of one side of each pair of the step will take, before it is read."""
    t = _timesteps(recipe, [("t", recipe.seed, position) for position in positions])
    return evaluations_of(recipe.inversion, models.schedule, t).tolist()


def uses_inversion(recipe: Recipe) -> bool:
    return obj.uses_inversion(recipe.method, recipe.inversion)
