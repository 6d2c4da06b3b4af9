"""The pocket world: captioned scenes of one coloured shape on a plain background.

A scene is four words (size, colour, shape, background). `render` draws it at 32x32 with a
`Finish`: how well centred, saturated, sharp and clean the picture is. The base model learns
from finishes of very different quality, which is what leaves room for preference training.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from inpo_fast.runtime.errors import UserError

SIZE = 32  # pixels; shapes are not readable at 16
HUES = {"red": 0.0, "yellow": 50.0, "green": 125.0, "cyan": 182.0, "blue": 226.0, "purple": 288.0}  # degrees
GREYS = {"white": 0.96, "gray": 0.55, "black": 0.06}  # value
COLOURS = tuple(HUES)
BACKGROUNDS = (*GREYS, *HUES)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
RADIUS = {"small": 7.0, "large": 11.0}  # pixels
FULL_SATURATION = 0.85
HELD_OUT_SHARE = 0.12  # of all combinations: never seen by the base model nor by preference training


@dataclass(frozen=True)
class Scene:
    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


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


def parse_caption(caption: str) -> Scene:
    """The scene a caption describes. UserError of a sentence that is not one of this world's."""
    words = caption.strip().lower().split()
    scene = Scene(words[1], words[2], words[3], words[6]) if len(words) == 8 else None
    known = (
        scene is not None
        and " ".join(words) == scene.caption
        and (
            scene.size in RADIUS and scene.colour in HUES and scene.shape in SHAPES and scene.background in BACKGROUNDS
        )
    )
    if not known:
        raise UserError(
            f"not a pocket caption: {caption!r}; expected 'a SIZE COLOUR SHAPE on a BACKGROUND background' with "
            f"SIZE in {list(RADIUS)}, COLOUR in {list(COLOURS)}, SHAPE in {list(SHAPES)}, "
            f"BACKGROUND in {list(BACKGROUNDS)}"
        )
    return scene


def colour_rgb(name: str, saturation: float = 1.0) -> np.ndarray:
    """RGB in [0, 1] of a named colour. `saturation` scales colourfulness and leaves greys alone."""
    if name in GREYS:
        return np.full(3, GREYS[name])
    sector = HUES[name] / 60.0
    channel = np.array([abs(sector - 3) - 1, 2 - abs(sector - 2), 2 - abs(sector - 4)]).clip(0, 1)  # pure hue
    value = 0.92
    return value * (1 - FULL_SATURATION * saturation * (1 - channel))


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline (negative inside) of a shape centred on 0, y pointing down."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95 * radius
    if shape == "ring":
        return np.abs(r - 0.78 * radius) - 0.27 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "cross":
        bar = 0.32 * radius
        upright = np.maximum(np.abs(x) - bar, np.abs(y) - radius)
        across = np.maximum(np.abs(y) - bar, np.abs(x) - radius)
        return np.minimum(upright, across)
    if shape == "triangle":
        return _polygon(x, y, np.array([[0.0, -1.15], [1.1, 0.8], [-1.1, 0.8]]) * radius)
    if shape == "star":
        angle = np.pi / 5 * np.arange(10) - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.2, 0.52) * radius
        return _polygon(x, y, np.stack([reach * np.cos(angle), reach * np.sin(angle)], 1))
    raise ValueError(f"unknown shape {shape!r}; one of {SHAPES}")


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon with corners (K, 2)."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = x1 - x0, y1 - y0
        along = (((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey)).clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 - along * ex, y - y0 - along * ey))
        if ey != 0:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * ex / ey)
    return np.where(inside, -nearest, nearest)


def coverage(shape: str, radius: float, dx: float = 0.0, dy: float = 0.0, edge: float = 1.0) -> np.ndarray:
    """Share of the object in each pixel, (32, 32) in [0, 1]."""
    centre = (SIZE - 1) / 2
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    distance = signed_distance(shape, x - centre - dx, y - centre - dy, radius)
    return (0.5 - distance / edge).clip(0, 1)


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
