"""Encoded bytes to a training view: decode, resize the short side, crop, flip. PIL only, no torchvision."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from inpo_fast.data.pair import BadPair
from inpo_fast.runtime import git_lfs
from inpo_fast.runtime.files import open_regular

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class View:
    """pixels: (H, W, 3) uint8, resolution x resolution; None where the latents are known. original, crop: (height,
    width) and (top, left), which SDXL is told."""

    pixels: np.ndarray | None
    original: tuple[int, int]
    crop: tuple[int, int]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: BinaryIO) -> Image.Image:
    """By its header, nothing decoded yet. Of the formats that pictures are in and no other: Pillow would hand
    PostScript to a program of the system. Raises whatever Pillow raises of bytes that are no image."""
    return Image.open(file, formats=_formats())


def decode(encoded: bytes, max_pixels: int) -> Image.Image:
    """An RGB image, fully loaded. BadPair when it is truncated, not an image, or larger than max_pixels."""
    try:
        image = open_image(io.BytesIO(encoded))
        if image.width * image.height > max_pixels:
            raise BadPair(f"{image.width}x{image.height} pixels, more than data.max_pixels={max_pixels}")
        image.load()  # opening reads the header only: a truncated file fails here
        if image.mode.startswith("I;16"):  # convert() would clip it to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except BadPair:
        raise
    except UnidentifiedImageError as problem:  # its own words hold the address of an object
        if git_lfs.holds_pointer(encoded):
            raise BadPair(f"the image {git_lfs.WHAT}") from problem
        raise BadPair("image cannot be decoded (not an image of a known format, or cut off in its header)") from problem
    except Exception as problem:  # damaged bytes make PIL raise anything: OSError, SyntaxError, TypeError, RuntimeError
        raise BadPair(f"image cannot be decoded ({problem})") from problem


def short_side(image: Path | bytes) -> int | None:
    """Pixels of the shorter side by the image's header, nothing decoded; None where it has none that can be read."""
    try:
        with open_regular(image) if isinstance(image, Path) else io.BytesIO(image) as file:
            return min(open_image(file).size)
    except Exception:  # as in decode, which says what is wrong when the pair is read
        return None


def make_view(
    image: Image.Image, resolution: int, *, flip: bool, crop: Literal["center", "random"], draw: tuple[float, float]
) -> View:
    """Short side to `resolution` (bilinear, antialiased), square crop, flip.

    draw: two numbers in [0, 1) that place a random crop.
    """
    width, height = image.size
    scale = resolution / min(width, height)
    if scale != 1:
        wide, high = (max(resolution, round(side * scale)) for side in (width, height))
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    room = image.height - resolution, image.width - resolution
    where = (0.5, 0.5) if crop == "center" else draw
    top, left = (round(free * part) for free, part in zip(room, where, strict=True))
    pixels = np.asarray(image)[top : top + resolution, left : left + resolution]
    return View(np.ascontiguousarray(pixels[:, ::-1] if flip else pixels), (height, width), (top, left))


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
