"""The amplitude leak: what the first step's loss pays for larger or smaller noise predictions, and by whose labels.

Where policy and reference are equal, multiply the policy's prediction by 1 + k. Each image's error changes by
de/dk = 2 mean(eps^2 - tau eps) = 2 c, the loss of a pair by dloss/dk = beta / 2 (c_better - c_worse). A method whose
targets say nothing about the amplitude has no such pull. `pull` is c_worse - c_better over the mean of eps^2: above 0
the loss falls as predictions grow. Nothing is trained here; t, inversion and targets are the trainer's own.

Pairs: drawn by the base (the shipped ones), rendered (made_pairs.above), and crops of the photograph that comes with
matplotlib against copies of them with one fault each. Labels: the stored ones, or whoever else is asked.
"""

import io
import time
from collections.abc import Callable

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image, ImageFilter

from bench.results import provenance
from bench.study import made_pairs
from bench.study.cells import Cell, Study, config_of, settings_of
from bench.study.measures import MEASURES
from inpo_fast.config import RunConfig
from inpo_fast.data.images import View, decode
from inpo_fast.data.loader import Item, PairLoader
from inpo_fast.data.sources import open_source
from inpo_fast.judges.registry import make_judge
from inpo_fast.method.losses import normalise, rms
from inpo_fast.method.noise_path import noised, target
from inpo_fast.models.loading import open_pipeline, quiet_libraries
from inpo_fast.models.models import Models
from inpo_fast.runtime import keyed_rng
from inpo_fast.training.noisy_latents import noisy_latents
from inpo_fast.training.step_batch import StepConfig, make_step_batch

PAIRS = 192
RESAMPLES = 2000
OUTSIDE = "clip:inpo_fast/pocket/assets/clip"


def run_cell(study: Study, cell: Cell, seed: int) -> dict:
    """rows: pairs, label, how many are decided, mean pull with its interval over pairs, tau of better and worse."""
    quiet_libraries()
    torch.set_num_threads(1)
    config, begun = config_of(study, cell, seed), time.perf_counter()
    models = Models(open_pipeline(config.models), torch.device("cpu"), config.models)
    rows = []
    for name, source in (("drawn by the base", config.data.source), ("rendered", str(made_pairs.ABOVE))):
        items = stored(config, source, models)
        found = amplitudes(items, models, config)
        for label, better in labels(items).items():
            rows.append(_row(name, label, found, better))
    for fault, damage in FAULTS.items():
        items = photographs(damage, models.resolution)
        rows.append(_row("a photograph", f"whole, not {fault}", amplitudes(items, models, config), np.ones(len(items))))
    return {
        "settings": settings_of(config),
        "seed": seed,
        "rows": rows,
        "seconds": time.perf_counter() - begun,
        **provenance(),
    }


def stored(config: RunConfig, source: str, models: Models) -> list[Item]:
    how = {"resolution": models.resolution, "seed": config.seed, "rank": 0, "world": 1}
    loader = PairLoader(open_source(source), config.data, **how)
    return [loader.load(position) for position in range(PAIRS)]


def photographs(damage: Callable[[Image.Image, int], Image.Image], side: int) -> list[Item]:
    """Crops at places of their own, half of them of the photograph at half its size."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = decode(file.read(), 10**8)
    sizes = [photograph.resize([edge // by for edge in photograph.size], Image.Resampling.LANCZOS) for by in (1, 2)]
    items = []
    for i in range(PAIRS):
        image = sizes[i % 2]
        left, top = (int(keyed_rng.uniform("crop", axis, i) * (image.size[axis] - side)) for axis in range(2))
        crop = image.crop((left, top, left + side, top + side))
        views = [View(np.asarray(picture), (side, side), (0, 0)) for picture in (crop, damage(crop, i))]
        items.append(Item(i, f"photograph {i}", "", *views))
    return items


def _noisy(image: Image.Image, i: int) -> Image.Image:
    noise = np.random.default_rng(i).normal(0, 8, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8))


def _pale(image: Image.Image, i: int) -> Image.Image:
    return Image.blend(image.convert("L").convert("RGB"), image, 0.5)


def _squeezed(image: Image.Image, i: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=15)
    return decode(encoded.getvalue(), 10**8)


FAULTS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "noisy": _noisy,
    "blurred": lambda image, i: image.filter(ImageFilter.GaussianBlur(1)),
    "pale": _pale,
    "JPEG 15": _squeezed,
}


@torch.no_grad()
def amplitudes(items: list[Item], models: Models, config: RunConfig) -> dict[str, np.ndarray]:
    """Of each image, (N, 2) all: c; the mean of eps^2; rms of tau before it is normalised; the correlation of tau
    with x_0, and of tau with itself one place to the right: both 0 for noise."""
    step_config = StepConfig(
        method=config.method,
        objective=config.objective,
        inversion=config.inversion,
        micro_batch=len(items),
        vae_sample=False,
        seed=config.seed,
    )
    step_batch = make_step_batch(items, models, step_config, models.encode_empty())
    (x_t,), _ = noisy_latents(step_batch, models, step_config)
    x_t = x_t.flatten(0, 1)
    levels = step_batch.a.flatten(), step_batch.s.flatten()
    x_0 = step_batch.x_0.flatten(0, 1)
    tau = target(x_t, x_0, *levels)
    size, own = rms(tau), (tau * x_0).mean((1, 2, 3)) / (rms(tau) * rms(x_0))
    neighbours = (tau[..., 1:] * tau[..., :-1]).mean((1, 2, 3)) / tau.square().mean((1, 2, 3))
    norm = config.objective.tau_norm
    if norm != "none":
        tau = normalise(tau, x_0 if norm == "orthogonal" else None)
        x_t = noised(x_0, tau, *levels)
    rows = torch.arange(len(tau))
    eps = models.predict("reference", x_t, step_batch.times.flatten(), step_batch.conditional.arguments(rows))
    energy = eps.square().mean((1, 2, 3))
    found = {
        "c": energy - (tau * eps).mean((1, 2, 3)),
        "energy": energy,
        "rms": size,
        "with x_0": own,
        "with its neighbour": neighbours,
    }
    return {name: values.view(-1, 2).numpy() for name, values in found.items()}


def labels(items: list[Item]) -> dict[str, np.ndarray]:
    """By whom: for each pair +1 where the stored winner is the better one, -1 where the loser is, 0 for a tie."""
    pictures = [view.pixels for item in items for view in (item.winner, item.loser)]
    captions = [item.prompt for item in items for _ in range(2)]
    found = {"stored": np.ones(len(items))}
    for name in ("pocket-rules", OUTSIDE):
        judge = make_judge(name)
        scores = judge.score(pictures, captions).total.reshape(-1, 2)
        found[judge.name] = _signs(scores, judge.tie)
    found["less grain"] = _signs(-MEASURES["grain"](pictures, captions).reshape(-1, 2), 1e-4)
    found["brighter"] = _signs(MEASURES["brightness"](pictures, captions).reshape(-1, 2), 1e-3)
    return found


def _signs(scores: np.ndarray, tie: float) -> np.ndarray:
    difference = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(difference) < tie, 0, np.sign(difference))


def _row(pairs: str, label: str, found: dict[str, np.ndarray], better: np.ndarray) -> dict:
    decided = better != 0
    sides = np.where(better[:, None] > 0, [0, 1], [1, 0])[decided]  # (n, 2): the better one first
    ordered = {name: np.take_along_axis(values[decided], sides, 1) for name, values in found.items()}
    pull = (ordered["c"][:, 1] - ordered["c"][:, 0]) / found["energy"].mean()
    means = pull[np.random.default_rng(0).integers(len(pull), size=(RESAMPLES, len(pull)))].mean(1)
    return {
        "pairs": pairs,
        "label": label,
        "count": int(decided.sum()),
        "pull": [float(v) for v in (pull.mean(), *np.quantile(means, [0.025, 0.975]))],
        "tau": {name: values.mean(0).tolist() for name, values in ordered.items() if name not in ("c", "energy")},
    }
