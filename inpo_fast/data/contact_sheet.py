"""Sample pairs in one picture, for a person to look at."""

import io
import textwrap

from PIL import Image, ImageDraw

from inpo_fast.data.images import decode
from inpo_fast.data.pair import Pair

TILE, CAPTION = 192, 40  # pixels of a picture, characters of a line below it


def contact_sheet(pairs: list[Pair], max_pixels: int) -> bytes:
    """PNG: one pair a cell, the better image on the left, the prompt below."""
    columns = 2
    rows = -(-len(pairs) // columns)
    cell = (2 * TILE + 16, TILE + 52)
    sheet = Image.new("RGB", (columns * cell[0] + 8, rows * cell[1] + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        left, top = 8 + number % columns * cell[0], 8 + number // columns * cell[1]
        for side, image in enumerate((pair.winner, pair.loser)):
            picture = decode(image, max_pixels)
            scale = TILE / max(picture.size)
            way = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            picture = picture.resize([max(1, round(n * scale)) for n in picture.size], way)
            sheet.paste(picture, (left + side * (TILE + 4), top))
        lines = textwrap.wrap(pair.prompt, 2 * CAPTION)[:2] or ["(empty prompt)"]
        sure = "" if pair.label == 1.0 else f"  ({pair.label:.2f} sure)"
        pen.text((left, top + TILE + 4), f"left is better{sure}: " + "\n".join(lines), fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
