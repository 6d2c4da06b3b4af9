"""Pictures before and after: the contact sheet samples.png, and the same pictures as data inside the page."""

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from inpo_fast.comparison.evaluation import Gallery
from inpo_fast.comparison.picture_store import read_picture
from inpo_fast.data.images import open_image
from inpo_fast.runtime.errors import UserError
from inpo_fast.runtime.files import open_regular

MARK = ("Software", "inpo-fast")  # a PNG's own word for what wrote it
SHEET = 12  # comparisons on a contact sheet
SHEET_COLUMNS = 6
SHEET_BYTES = 1_900_000
ENLARGED = 160  # pixels to which smaller pictures are enlarged, by a whole factor, so that every pixel stays a square
SIDES = (320, 256, 192, 160, 128, 96, 64)  # to which larger ones are shrunk; the first that fits the limit in bytes


@dataclass(frozen=True)
class Comparison:
    """The same prompt from the same noise, by both models. Pictures: (H, W, 3) uint8."""

    prompt: str
    base: np.ndarray
    aligned: np.ndarray

    @property
    def pixelated(self) -> bool:
        return max(self.base.shape[:2]) < ENLARGED


def comparison(base: Gallery, aligned: Gallery, number: int) -> Comparison:
    return Comparison(base.captions[number], base.pictures[number], aligned.pictures[number])


def before_after(base: Gallery, aligned: Gallery) -> list[Comparison]:
    """Prompts evenly spread over the list, first seed first: never chosen by how they came out."""
    prompts = len(base.prompts)
    rows = np.unique(np.linspace(0, prompts - 1, min(SHEET, prompts)).round().astype(int))
    seeds = range(min(base.seeds, max(1, SHEET // prompts)))
    return [comparison(base, aligned, int(row) * base.seeds + seed) for row in rows for seed in seeds]


def fitted(picture: np.ndarray, side: int) -> Image.Image:
    """Small pictures enlarged by nearest neighbour, large ones shrunk to `side`."""
    image = Image.fromarray(picture)
    longest = max(image.size)
    if longest > side:
        return image.resize([max(1, round(n * side / longest)) for n in image.size], Image.Resampling.LANCZOS)
    factor = max(1, ENLARGED // longest)
    return image.resize([n * factor for n in image.size], Image.Resampling.NEAREST)


def contact_sheet(chosen: Sequence[Comparison], base: str = "base") -> bytes:
    """PNG: the row called `base` above the aligned model's, captions below."""
    for side in SIDES:
        content = _png(_sheet(chosen, side, base))
        if len(content) <= SHEET_BYTES:
            break
    return content


def _sheet(chosen: Sequence[Comparison], side: int, base: str) -> Image.Image:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 13)
    pairs = [(fitted(c.base, side), fitted(c.aligned, side)) for c in chosen]
    width = max(image.width for pair in pairs for image in pair)
    height = max(image.height for pair in pairs for image in pair)
    gap, left, text = 8, 68, 62
    columns = min(SHEET_COLUMNS, len(pairs))
    block = 2 * height + 4 + text + gap
    size = left + columns * (width + gap), gap + -(-len(pairs) // columns) * block
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, (case, (before, after)) in enumerate(zip(chosen, pairs, strict=True)):
        x, y = left + number % columns * (width + gap), gap + number // columns * block
        if number % columns == 0:
            for row, name in enumerate((base, "aligned")):
                pen.text((left - 8, y + row * (height + 4) + height // 2), name, "#444444", font, anchor="rm")
        sheet.paste(before, (x, y))
        sheet.paste(after, (x, y + height + 4))
        letters = max(8, int(width / font.getlength("n")))
        lines = textwrap.wrap(case.prompt, letters, max_lines=3, placeholder=" …") or [""]
        pen.multiline_text((x, y + 2 * height + 10), "\n".join(lines), "#222222", font, spacing=3)
    return sheet


def data_uris(comparisons: Sequence[Comparison], limit: int) -> dict[int, str]:
    """Of both pictures of each, as picture_uris."""
    return picture_uris([picture for c in comparisons for picture in (c.base, c.aligned)], limit)


def picture_uris(pictures: Sequence[np.ndarray], limit: int) -> dict[int, str]:
    """id of a picture's array -> data URI. All together stay below `limit` bytes, by shrinking if they must."""
    arrays = {id(picture): picture for picture in pictures}
    for side in SIDES:
        encoded = {key: _encoded(picture, side) for key, picture in arrays.items()}
        if sum(len(content) for _, content in encoded.values()) <= limit:
            break
    return {
        key: f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
        for key, (kind, content) in encoded.items()
    }


def strips(folder: Path, limit: int, most: int = 6) -> list[tuple[int, str, bool]]:
    """(step, data URI, whether it is pixelated) of the pictures that a run left, evenly spread over its steps.

    All together stay below `limit` bytes; a file that cannot be read is left out.
    """
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
    rows = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    found = []
    for path in (paths[row] for row in rows):
        try:
            found.append((int(path.stem), read_picture(path)))
        except UserError:
            continue
    for width in (1600, 1200, 800, 500, 300):
        encoded = [_strip(picture, width) for _, picture in found]
        if sum(len(content) for _, content in encoded) <= limit:
            break
    return [
        (step, f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}", kind == "png")
        for (step, _), (kind, content) in zip(found, encoded, strict=True)
    ]


def _strip(picture: np.ndarray, width: int) -> tuple[str, bytes]:
    image = Image.fromarray(picture)
    if picture.shape[0] < ENLARGED and picture.shape[1] <= width:
        return "png", _png(image)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=86)
    return "jpeg", out.getvalue()


def _encoded(picture: np.ndarray, side: int) -> tuple[str, bytes]:
    """Small pictures as they are, lossless (the page enlarges them); large ones as JPEG."""
    image = Image.fromarray(picture)
    if max(image.size) < ENLARGED:
        return "png", _png(image)
    out = io.BytesIO()
    fitted(picture, side).save(out, "JPEG", quality=86)
    return "jpeg", out.getvalue()


def _png(image: Image.Image) -> bytes:
    out, about = io.BytesIO(), PngInfo()
    about.add_text(*MARK)
    image.save(out, "PNG", pnginfo=about)
    return out.getvalue()


def is_sheet(path: Path) -> bool:
    """Whether a file is a picture that this project wrote."""
    try:
        with open_regular(path) as file:
            return open_image(file).info.get(MARK[0]) == MARK[1]
    except Exception:  # Pillow raises anything of damaged bytes
        return False
