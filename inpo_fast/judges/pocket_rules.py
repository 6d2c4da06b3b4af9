"""The pocket world's rule judge: half alignment with the caption, half looks.

It is a synthetic rule, never "human preference". It finds the object by colour, fits every
shape's template to it and compares what it sees with what the caption asks for. All parts are
in [0, 1] and reported, so that one sees why a picture won:

alignment  colour, background, shape, size   (mean)
looks      centring, saturation, cleanliness, edges   (mean)

Each part of the looks is full from the point where a person stops seeing a difference: no score
is left to earn by faint smoothing, which is what makes a judge a grain meter.
"""

from functools import lru_cache

import numpy as np

from inpo_fast.judges import Scores
from inpo_fast.judges.pocket_scenes import FULL_SATURATION, GREYS, HUES, RADIUS, SHAPES, Scene, coverage, parse_caption

ALIGNMENT = ("colour", "background", "shape", "size")
LOOKS = ("centring", "saturation", "cleanliness", "edges")


class RuleJudge:
    name = "pocket-rules"
    id = "pocket-rules 1"  # scores are kept under it: count up when a rule changes
    # Two totals nearer than this look alike: a tie. Sampling the same scene with 8-bit rounding
    # moves the total by less than half of it.
    tie = 0.01

    def check(self, prompts: list[str]) -> None:
        for prompt in prompts:
            parse_caption(prompt)

    def score(self, images: list[np.ndarray], prompts: list[str]) -> Scores:
        """images: (32, 32, 3) uint8 arrays, prompts: captions. Totals and parts, each (N,)."""
        seen = [judge_image(image, parse_caption(prompt)) for image, prompt in zip(images, prompts, strict=True)]
        parts = {key: np.array([s[key] for s in seen]) for key in (*ALIGNMENT, *LOOKS)}
        parts["alignment"] = np.mean([parts[key] for key in ALIGNMENT], axis=0)
        parts["looks"] = np.mean([parts[key] for key in LOOKS], axis=0)
        return Scores(total=(parts["alignment"] + parts["looks"]) / 2, parts=parts)


def judge_image(image: np.ndarray, scene: Scene) -> dict[str, float]:
    """The eight parts for one picture, each in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    ground, ink, alpha = separate(pixels)
    area = alpha.sum()
    if area < 12 or np.linalg.norm(ink - ground) < 0.08:  # nothing there
        seen_ground = float(colour_name(ground) == scene.background)
        return dict.fromkeys((*ALIGNMENT, *LOOKS), 0.0) | {"background": seen_ground}
    y, x = np.mgrid[0 : pixels.shape[0], 0 : pixels.shape[1]]
    centre = (pixels.shape[0] - 1) / 2
    dx, dy = (alpha * x).sum() / area - centre, (alpha * y).sum() / area - centre
    fits = {shape: _fit(alpha, shape, area, dx, dy) for shape in SHAPES}
    rival = max(fit for shape, fit in fits.items() if shape != scene.shape)
    radius = (area / _unit_area(scene.shape)) ** 0.5
    aim_x, aim_y = _centroid(scene.shape, RADIUS[scene.size])
    residual = pixels - (alpha[..., None] * ink + (1 - alpha[..., None]) * ground)
    edge_width = 4 * (alpha * (1 - alpha)).sum() / _outline(scene.shape, radius)
    return {
        "colour": float(colour_name(ink) == scene.colour),
        "background": float(colour_name(ground) == scene.background),
        "shape": _ramp(fits[scene.shape] - rival, -0.04, 0.04),
        "size": _ramp(-abs(radius - RADIUS[scene.size]), -3.0, -1.0),
        "centring": _ramp(-np.hypot(dx - aim_x, dy - aim_y), -5.0, -0.5),
        "saturation": _ramp(_saturation(ink), 0.3 * FULL_SATURATION, 0.92 * FULL_SATURATION),
        "cleanliness": _ramp(-np.sqrt((residual**2).mean()), -0.08, -0.02),
        # the sharpest edge that comes through the pocket's VAE is 2 pixels wide
        "edges": _ramp(-edge_width, -3.4, -2.0),
    }


def separate(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background colour (3,), object colour (3,) and the object's share of each pixel (H, W)."""
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    ground = np.median(np.concatenate([border, pixels[:, -2:].reshape(-1, 3)]), axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    strong = distance >= 0.7 * np.quantile(distance, 0.985)
    ink = np.median(pixels[strong], axis=0)
    axis = ink - ground
    alpha = ((pixels - ground) @ axis / max(axis @ axis, 1e-6)).clip(0, 1)
    alpha[alpha < 0.15] = 0.0  # stains are not the object
    return ground, ink, alpha


def colour_name(rgb: np.ndarray) -> str:
    """The nearest named colour: by value when grey, else by hue."""
    if _saturation(rgb) < 0.17 or rgb.max() < 0.15:
        return min(GREYS, key=lambda name: abs(GREYS[name] - rgb.mean()))
    hue = _hue(rgb)
    return min(HUES, key=lambda name: min(abs(HUES[name] - hue), 360 - abs(HUES[name] - hue)))


def _saturation(rgb: np.ndarray) -> float:
    return float((rgb.max() - rgb.min()) / max(rgb.max(), 1e-6))


def _hue(rgb: np.ndarray) -> float:
    r, g, b = rgb
    return float(np.degrees(np.arctan2(3**0.5 * (g - b), 2 * r - g - b)) % 360)


def _ramp(value: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, linear between."""
    return float(np.clip((value - zero) / (one - zero), 0, 1))


def _fit(alpha: np.ndarray, shape: str, area: float, dx: float, dy: float) -> float:
    """Soft intersection over union of the object with the template of equal area and centroid."""
    radius = float(np.clip((area / _unit_area(shape)) ** 0.5, 2.0, 14.0))
    cx, cy = _centroid(shape, radius)
    template = _template(shape, round(radius * 4), round((dx - cx) * 4), round((dy - cy) * 4))
    return float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())


@lru_cache(maxsize=50_000)
def _template(shape: str, radius_quarters: int, dx_quarters: int, dy_quarters: int) -> np.ndarray:
    return coverage(shape, radius_quarters / 4, dx_quarters / 4, dy_quarters / 4, edge=1.6)


@lru_cache
def _unit_area(shape: str) -> float:
    """Area of the shape of radius 1, in pixels."""
    return float(coverage(shape, 10.0).sum() / 100.0)


@lru_cache
def _unit_centroid(shape: str) -> tuple[float, float]:
    alpha = coverage(shape, 10.0)
    y, x = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]]
    centre = (alpha.shape[0] - 1) / 2
    return float((alpha * x).sum() / alpha.sum() - centre) / 10, float((alpha * y).sum() / alpha.sum() - centre) / 10


def _centroid(shape: str, radius: float) -> tuple[float, float]:
    """Where the centroid of a centred shape lies; only the triangle's and the star's are off 0."""
    cx, cy = _unit_centroid(shape)
    return cx * radius, cy * radius


def _outline(shape: str, radius: float) -> float:
    """Sum of 4 a (1 - a) over a crisp rendering: proportional to the length of the outline."""
    return _unit_outline(shape) * radius


@lru_cache
def _unit_outline(shape: str) -> float:
    alpha = coverage(shape, 10.0)
    return float(4 * (alpha * (1 - alpha)).sum() / 10.0)
