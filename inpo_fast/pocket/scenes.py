"""The pocket world's pictures: every scene there is, and how one is drawn.

`render` draws a scene at 32 x 32 with a `Finish`: how well centred, saturated, sharp and clean the picture is. The base
model learns from finishes of very different quality, which is what leaves room for preference training.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from inpo_fast.judges.pocket_scenes import (
    BACKGROUNDS,
    COLOURS,
    FULL_SATURATION,
    GREYS,
    HUES,
    RADIUS,
    SHAPES,
    SIZE,
    Scene,
    coverage,
)

HELD_OUT_SHARE = 0.12  # of all combinations: never seen by the base model nor by preference training


@dataclass(frozen=True)
class Finish:
    """The looks of one rendering. The default is a perfect picture."""

    dx: float = 0.0  # pixels off centre, to the right
    dy: float = 0.0  # pixels off centre, down
    saturation: float = 1.0  # 1 = full colour, 0 = grey
    edge: float = 1.0  # width of the outline's transition in pixels
    stain: float = 0.0  # amplitude of the low-frequency blotches, in units of full scale


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order; an object never has its background's colour."""
    grid = product(RADIUS, COLOURS, SHAPES, BACKGROUNDS)
    return [Scene(size, colour, shape, ground) for size, colour, shape, ground in grid if colour != ground]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """(seen, held out). The split is part of the world's definition, hence its fixed seed."""
    scenes = all_scenes()
    order = np.random.default_rng(2503_18454).permutation(len(scenes))
    held_out = {int(i) for i in order[: round(HELD_OUT_SHARE * len(scenes))]}
    seen = [s for i, s in enumerate(scenes) if i not in held_out]
    return seen, [s for i, s in enumerate(scenes) if i in held_out]


def colour_rgb(name: str, saturation: float = 1.0) -> np.ndarray:
    """RGB in [0, 1] of a named colour. `saturation` scales colourfulness and leaves greys alone."""
    if name in GREYS:
        return np.full(3, GREYS[name])
    sector = HUES[name] / 60.0
    channel = np.array([abs(sector - 3) - 1, 2 - abs(sector - 2), 2 - abs(sector - 4)]).clip(0, 1)  # pure hue
    value = 0.92
    return value * (1 - FULL_SATURATION * saturation * (1 - channel))


def render(scene: Scene, finish: Finish, rng: np.random.Generator) -> np.ndarray:
    """The picture, (32, 32, 3) uint8. `rng` draws the stains only."""
    alpha = coverage(scene.shape, RADIUS[scene.size], finish.dx, finish.dy, finish.edge)[..., None]
    ink, ground = (colour_rgb(name, finish.saturation) for name in (scene.colour, scene.background))
    image = alpha * ink + (1 - alpha) * ground + _stains(finish.stain, rng)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _stains(amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth blotches: 6x6 Gaussian noise, linearly enlarged, (32, 32, 3)."""
    knots = rng.standard_normal((6, 6, 3)) * amplitude
    at = np.linspace(0, 5, SIZE)
    low = np.minimum(at.astype(int), 4)
    part = (at - low)[:, None, None]
    rows = knots[low] * (1 - part) + knots[low + 1] * part  # (32, 6, 3)
    rows = rows.transpose(1, 0, 2)
    return (rows[low] * (1 - part) + rows[low + 1] * part).transpose(1, 0, 2)


def random_finish(rng: np.random.Generator) -> Finish:
    """A finish of the imperfect data the base model learns from."""
    return Finish(
        dx=rng.uniform(-4, 4),
        dy=rng.uniform(-4, 4),
        saturation=rng.uniform(0.4, 1.0),
        edge=rng.uniform(1.0, 3.0),
        stain=rng.uniform(0.0, 0.04),
    )
