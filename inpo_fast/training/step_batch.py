"""The pairs of one optimizer step on this rank as tensors on the device: latents, text, timesteps.

Everything random of a step is made here from (seed, purpose, global sample index, side): timesteps, the VAE's noise,
and the keys of the noise that x_t is made with. So the result does not depend on the micro-batch size nor on the number
of processes beyond rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
from inpo_fast.models.denoiser import Conditioning, Text
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.runtime.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What train_step needs to know of a run."""

    method: MethodName
    objective: ObjectiveConfig
    inversion: InversionConfig
    micro_batch: int
    vae_sample: bool
    seed: int
    fused_loss: bool = True  # False: the plain path, for comparison
    trajectory_cache: TrajectoryCache | None = None  # of inversion.cache
    latent_cache: LatentCache | None = None  # of data.cache
    vae_batch: int | None = None  # None: models.vae_batch

    @classmethod
    def of(cls, config: RunConfig, **more) -> "StepConfig":
        """What a configuration says; more: other fields."""
        return cls(
            method=config.method,
            objective=config.objective,
            inversion=config.inversion,
            micro_batch=config.train.micro_batch,
            vae_sample=config.data.vae_sample,
            seed=config.seed,
            vae_batch=config.data.vae_batch,
            **more,
        )

    def lowered(self, sizes: Mapping[str, int]) -> "StepConfig":
        """With at most so much computed at once. sizes: by the setting's key, as TooLarge names it."""
        batch = min(self.inversion.batch, sizes.get("inversion.batch", self.inversion.batch))
        vae_batches = [size for size in (self.vae_batch, sizes.get("data.vae_batch")) if size]
        return replace(
            self,
            inversion=replace(self.inversion, batch=batch),
            micro_batch=min(self.micro_batch, sizes.get("train.micro_batch", self.micro_batch)),
            vae_batch=min(vae_batches, default=None),
        )


@dataclass(kw_only=True)
class StepBatch:
    """The pairs of one optimizer step on this rank, on the device: N pairs, K timesteps each, S sides (winner first).

    x_0: (N, S, C, H, W) latents. t: (K, N) on the CPU, shared by the sides. times, a, s: (K, N, S), the
    network's time and the path's a_t and s_t, on the device. label, weight: (N,) fp32, of the pairs. Images, (N * S,),
    are numbered pair * S + side, in the conditioning too.
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
    gaussian_keys: list[list[keyed_rng.Key]]  # (K, N): of the noise of x_t without inversion, one for both sides
    eta_keys: list[int]  # (N * S,): of the noise of the inversion's steps (inversion.eta)
    cached: CachedBatch | None = None  # what inversion.cache knows of the images
    slots: int | None = None  # samples of an inversion's call where its size is fixed; None: all images, if they fit
    reference_point: torch.Tensor | None = None  # kto's, of all processes; kept where a step is repeated


@torch.no_grad()
def make_step_batch(items: list[Item], models: Models, config: StepConfig, empty: Text) -> StepBatch:
    """Latents, text and timesteps of decoded pairs."""
    sides = method_of(config.method).sides
    keys = side_keys(items, config.seed, sides)
    cached = None if config.trajectory_cache is None else config.trajectory_cache.batch(items, keys)
    x_0 = _latents(items, keys, sides, cached, models, config)
    conditional, unconditional = _conditioning(items, sides, x_0, models, config, empty)
    path = models.noise_path
    t = path.draw_timesteps(config.objective.timesteps, _timestep_keys(config, [x.position for x in items], cached))
    if config.inversion.grid == "snap" and uses_inversion(config):
        t = path.snap(t, config.inversion.steps)
    times, a, s = (
        to_device(c[..., None].repeat(1, 1, sides), models.device) for c in (path.network_time(t), *path.a_s(t))
    )
    return StepBatch(
        items=items,
        x_0=x_0.unflatten(0, (len(items), sides)),
        t=t,
        times=times,
        a=a,
        s=s,
        label=to_device(torch.tensor([item.label for item in items], dtype=torch.float32), models.device),
        weight=to_device(torch.tensor([item.weight for item in items], dtype=torch.float32), models.device),
        conditional=conditional,
        unconditional=unconditional,
        gaussian_keys=[_gaussian_keys(items, config.seed, k) for k in range(len(t))],
        eta_keys=[keyed_rng.hash_key("eta", *key) for key in keys],
        cached=cached,
    )


def _latents(
    items: list[Item],
    keys: list[keyed_rng.Key],
    sides: int,
    cached: CachedBatch | None,
    models: Models,
    config: StepConfig,
) -> torch.Tensor:
    """(N * S, C, h, w) fp32: encoded, from inversion.cache, or from data.cache (an item's own)."""
    views = [view for item in items for view in (item.winner, item.loser)[:sides]]
    new = cached.missing if cached else [i for i in range(len(views)) if items[i // sides].x_0 is None]
    encoded = encode_views([views[i] for i in new], [keys[i] for i in new], models, config.vae_sample, config.vae_batch)
    x_0 = cached.x_0(encoded, models.device) if cached else _with_cached(encoded, items, sides, models.device)
    return x_0.contiguous()  # whatever the VAE's layout is: sums over an image are rounded in the order of memory


def _conditioning(
    items: list[Item], sides: int, x_0: torch.Tensor, models: Models, config: StepConfig, empty: Text
) -> tuple[Conditioning, Conditioning]:
    """What the UNet is told of each image, with its prompt and with the empty one."""
    views = [view for item in items for view in (item.winner, item.loser)[:sides]]
    prompts = list(dict.fromkeys(item.prompt for item in items))
    cache = config.latent_cache
    text = models.encode_prompts(prompts) if cache is None else cache.encode_prompts(prompts, models)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    row = to_device(torch.tensor([number[item.prompt] for item in items for _ in range(sides)]), models.device)
    sizes = models.sizes([(view.original, view.crop) for view in views], x_0.shape[-1])
    return models.conditioning(text, row, sizes), models.conditioning(empty, torch.zeros_like(row), sizes)


def _timestep_keys(
    config: StepConfig, positions: Sequence[int], cached: CachedBatch | None = None
) -> list[keyed_rng.Key]:
    """What t of each pair is drawn from: its content with inversion.frozen, else seed and global sample index."""
    if cached is not None and cached.pair_contents is not None:
        return [("t", content) for content in cached.pair_contents]
    return [("t", config.seed, position) for position in positions]


def _gaussian_keys(items: list[Item], seed: int, k: int) -> list[keyed_rng.Key]:
    """Of the pairs' noise at their timestep k. The first timestep's have no k, as where there is only one."""
    return [("noise", seed, item.position, *((k,) if k else ())) for item in items]


def _with_cached(encoded: list[torch.Tensor], items: list[Item], sides: int, device: torch.device) -> torch.Tensor:
    """(M, C, h, w): the encoded images and those whose latents came from data.cache, in the order of the items."""
    fresh = iter(torch.cat(encoded).split(sides) if encoded else ())
    return torch.cat([next(fresh) if item.x_0 is None else to_device(item.x_0[:sides], device) for item in items])


def inversion_costs(positions: Sequence[int], config: StepConfig, models: Models) -> list[int]:
    """UNet evaluations that the inversion of one side of each pair of the step will take, before it is read."""
    t = models.noise_path.draw_timesteps(config.objective.timesteps, _timestep_keys(config, positions))
    return evaluations_of(config.inversion, models.noise_path, t).tolist()


def uses_inversion(config: StepConfig) -> bool:
    return methods.uses_inversion(config.method, config.inversion)
