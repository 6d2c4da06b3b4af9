"""Properties of pocket pictures that no judge is paid for: what else a training changes. Each (N,) for N pictures."""

from collections.abc import Sequence

import numpy as np

from inpo_fast.judges.pocket_rules import separate
from inpo_fast.judges.pocket_scenes import RADIUS, Scene, coverage, parse_caption


def brightness(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Mean of all pixels, 0..1."""
    return np.array([picture.mean() / 255 for picture in pictures])


def grain(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Root mean square of what a 3x3 median takes away from the background, 0..1: pixels that differ from their
    neighbours. Not the object: a median also takes its corners away."""
    return np.array([_grain(np.asarray(picture, np.float64) / 255) for picture in pictures])


def outline(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Soft intersection over union of the object with its caption's shape and size, at the object's own place, 0..1.

    The rule judge only asks which shape fits best and lets the size be off by a pixel, and nearly all of the base's
    pictures get both in full: it does not pay for this.
    """
    return np.array([_overlap(*both) for both in zip(pictures, map(parse_caption, captions), strict=True)])


MEASURES = {"brightness": brightness, "grain": grain, "outline": outline}


def _grain(pixels: np.ndarray) -> float:
    _, _, alpha = separate(pixels)
    far = _windows(alpha[..., None], 5).max((-2, -1))[..., 0] == 0  # no part of the object within two pixels
    rest = (pixels - np.median(_windows(pixels, 3), axis=(-2, -1)))[far]
    return float(np.sqrt((rest**2).mean())) if rest.size else 0.0


def _windows(picture: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C, size, size): what surrounds each pixel, the border repeated outwards."""
    room = size // 2
    padded = np.pad(picture, ((room, room), (room, room), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))


def _overlap(picture: np.ndarray, scene: Scene) -> float:
    _, _, alpha = separate(np.asarray(picture, np.float64) / 255)
    if not alpha.any():
        return 0.0
    y, x = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]]
    middle = coverage(scene.shape, RADIUS[scene.size])
    dx, dy = ((alpha * at).sum() / alpha.sum() - (middle * at).sum() / middle.sum() for at in (x, y))
    template = coverage(scene.shape, RADIUS[scene.size], dx, dy)
    return float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
