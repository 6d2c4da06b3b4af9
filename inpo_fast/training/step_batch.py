"""The pairs of one optimizer step on this rank as tensors on the device: latents, text, timesteps.

Everything random of a step is drawn here from (seed, purpose, position, side): the result does not depend on the
micro-batch size nor on the number of processes beyond rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from inpo_fast.caches.cached_batch import CachedBatch
from inpo_fast.caches.encode import encode_views
from inpo_fast.caches.latent_cache import LatentCache
from inpo_fast.caches.trajectory_cache import TrajectoryCache
from inpo_fast.config import RunConfig
from inpo_fast.data.loader import Item, side_keys
from inpo_fast.method import methods
from inpo_fast.method.config import InversionConfig, ObjectiveConfig
from inpo_fast.method.inversion import evaluations_of
from inpo_fast.method.methods import MethodName, method_of
from inpo_fast.models.models import Conditioning, Models, Text
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.transfer import to_device


@dataclass(frozen=True)
class StepConfig:
    """What train_step needs to know of a run."""

    method: MethodName
    objective: ObjectiveConfig
    inversion: InversionConfig
    micro_batch: int
    vae_sample: bool
    seed: int
    fused_loss: bool = True  # False: the plain path, for comparison
    trajectories: TrajectoryCache | None = None  # of inversion.cache
    latents: LatentCache | None = None  # of data.cache
    vae_batch: int | None = None  # None: models.vae_batch

    @classmethod
    def of(cls, config: RunConfig, **more) -> "StepConfig":
        """What a configuration says; more: other fields."""
        batch, data = config.train.micro_batch, config.data
        said = (config.method, config.objective, config.inversion, batch, data.vae_sample, config.seed)
        return cls(*said, **{"vae_batch": data.vae_batch, **more})


@dataclass
class StepBatch:
    """The pairs of one optimizer step on this rank, on the device.

    x_0: (N, S, C, H, W) latents, S sides (winner first). t: (N,) on the CPU. times, a, s: (N, S), the
    network's time and the path's a_t and s_t, on the device. label, weight: (N,) fp32, of the pairs. Images
    of the conditioning are numbered pair * S + side.
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
    keys: list[keyed_rng.Key] = field(default_factory=list)  # (seed, position, side) of each image
    held: CachedBatch | None = None  # what inversion.cache knows of the images
    point: torch.Tensor | None = None  # of kto, of all processes' windows; kept where a step is repeated
    number: int = 0  # of the timestep
    others: tuple["StepBatch", ...] = ()  # the same pairs at their further timesteps (objective.timesteps.per_pair)

    @property
    def moments(self) -> tuple["StepBatch", ...]:
        """All timesteps of the pairs, each as a window."""
        return (self, *self.others)


@torch.no_grad()
def make_step_batch(items: list[Item], models: Models, recipe: StepConfig, empty: Text) -> StepBatch:
    """Latents, text and timesteps of decoded pairs. t depends on (seed, position) only (inversion.frozen: on the pair's
    content), and is shared by the sides."""
    sides = method_of(recipe.method).sides
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
    path = models.noise_path
    t = path.draw_timesteps(recipe.objective.timesteps, drawn)
    if recipe.inversion.grid == "snap" and uses_inversion(recipe):
        t = path.snap(t, recipe.inversion.steps)
    times, a, s = (
        to_device(c[..., None].repeat(1, 1, sides), models.device) for c in (path.network_time(t), *path.a_s(t))
    )
    first = StepBatch(
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


def _with_cached(encoded: list[torch.Tensor], items: list[Item], sides: int, device: torch.device) -> torch.Tensor:
    """(M, C, h, w): the encoded images and those whose latents came from a cache, in the window's order."""
    fresh = iter(torch.cat(encoded).split(sides) if encoded else ())
    return torch.cat([next(fresh) if item.x_0 is None else to_device(item.x_0[:sides], device) for item in items])


def inversion_costs(positions: Sequence[int], recipe: StepConfig, models: Models) -> list[int]:
    """UNet evaluations that the inversion of one side of each pair of the step will take, before it is read."""
    keys = [("t", recipe.seed, position) for position in positions]
    t = models.noise_path.draw_timesteps(recipe.objective.timesteps, keys)
    return evaluations_of(recipe.inversion, models.noise_path, t).tolist()


def uses_inversion(recipe: StepConfig) -> bool:
    return methods.uses_inversion(recipe.method, recipe.inversion)
