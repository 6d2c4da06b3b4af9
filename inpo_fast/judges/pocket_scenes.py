"""What a caption of the pocket world asks for: one coloured shape on a plain background, in a picture of 32 x 32.

A scene is four words (size, colour, shape, background). Drawing one is pocket/scenes.py's.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Scene:
    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


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
