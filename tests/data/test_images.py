"""Views against PIL's own resize and a numpy crop; damaged, oversized and unusual images."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from inpo_fast.data.images import decode, make_view
from inpo_fast.data.pair import BadPair

LIMIT = 50_000_000


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing: 1 bit a pixel, an empty data chunk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# (width, height), resolution -> resized (width, height), centre crop (top, left); by hand
VIEWS = {
    "landscape": ((60, 40), 20, (30, 20), (0, 5)),
    "portrait": ((40, 60), 20, (20, 30), (5, 0)),
    "square": ((48, 48), 16, (16, 16), (0, 0)),
    "upscale": ((10, 15), 20, (20, 30), (5, 0)),
    "uneven": ((50, 33), 16, (24, 16), (0, 4)),
    "half a pixel": ((25, 16), 16, (25, 16), (0, 4)),  # 4.5 rounds to even, as torchvision's CenterCrop does
    "as it is": ((16, 16), 16, (16, 16), (0, 0)),
    "extreme": ((400, 3), 8, (1067, 8), (0, 530)),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_centre_view(name, flip):
    size, resolution, resized, (top, left) = VIEWS[name]
    image = noise(*size)
    view = make_view(image, resolution, flip=flip, crop="center", draw=(0.1, 0.9))
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    expected = whole[top : top + resolution, left : left + resolution]
    assert np.array_equal(view.pixels, np.fliplr(expected) if flip else expected)
    assert view.pixels.shape == (resolution, resolution, 3)
    assert view.pixels.dtype == np.uint8
    assert view.pixels.flags.c_contiguous  # torch.from_numpy takes no negative strides
    assert view.original == size[::-1]
    assert view.crop == (top, left)


unit = st.floats(0, 1, exclude_max=True)


@settings(max_examples=60, deadline=None, database=None)
@given(width=st.integers(1, 70), height=st.integers(1, 70), resolution=st.integers(1, 40), draw=st.tuples(unit, unit))
def test_random_crop_stays_inside_and_says_where(width, height, resolution, draw):
    image = noise(width, height)
    view = make_view(image, resolution, flip=False, crop="random", draw=draw)
    scale = resolution / min(width, height)
    wide, high = (max(resolution, round(side * scale)) for side in (width, height))
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BILINEAR))
    (top, left) = view.crop
    assert 0 <= top <= high - resolution
    assert 0 <= left <= wide - resolution
    assert np.array_equal(view.pixels, whole[top : top + resolution, left : left + resolution])
    assert view.original == (height, width)


def test_random_crop_reaches_both_ends_along_the_right_side():
    for size, axis in (((90, 30), 1), ((30, 90), 0)):
        ends = [make_view(noise(*size), 30, flip=False, crop="random", draw=(d, d)).crop for d in (0.0, 0.5, 0.999)]
        assert [end[axis] for end in ends] == [0, 30, 60]
        assert [end[1 - axis] for end in ends] == [0, 0, 0]
    draws = {make_view(noise(90, 30), 30, flip=False, crop="random", draw=(d, 0.5)).crop for d in (0.0, 0.999)}
    assert draws == {(0, 30)}  # the first number places the top, the second the left


def test_decoding_is_lossless_and_rgb():
    image = noise(20, 12)
    assert np.array_equal(np.asarray(decode(encode(image), LIMIT)), np.asarray(image))


def test_limit_is_the_largest_allowed():
    encoded = encode(noise(20, 12))
    assert decode(encoded, 240).size == (20, 12)
    with pytest.raises(BadPair, match=r"^20x12 pixels, more than data\.max_pixels=239"):
        decode(encoded, 239)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_a_bad_pair(format, part):
    encoded = encode(noise(64, 48), format)
    with pytest.raises(BadPair, match="image cannot be decoded"):
        decode(encoded[: int(part * len(encoded))], LIMIT)


def test_text_is_a_bad_pair():
    with pytest.raises(BadPair, match="image cannot be decoded"):
        decode(b"<html>404</html>", LIMIT)


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, EOFError, struct.error])
def test_whatever_a_decoder_raises_is_a_bad_pair(monkeypatch, kind):
    """Damaged AVIF makes PIL raise RuntimeError, damaged TIFF TypeError."""

    def load(self):
        raise kind("damaged")

    encoded = encode(noise(8, 8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(BadPair, match=r"image cannot be decoded \(damaged\)"):
        decode(encoded, LIMIT)


BOMBS = {
    "whole": (encode(Image.new("1", (9_000, 9_000))), r"9000x9000 pixels, more than data\.max_pixels=50000000"),
    "header": (png_header(9_000, 9_000), r"9000x9000 pixels, more than data\.max_pixels=50000000"),
    "beyond PIL's own limit": (png_header(20_000, 20_000), "400000000 pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_dropped_by_its_header(monkeypatch, name):
    encoded, message = BOMBS[name]
    assert len(encoded) < 50_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadPair, match=message):
        decode(encoded, LIMIT)


def palette() -> Image.Image:
    image = Image.new("P", (6, 4), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 1, 1, 1, 10, 200, 30])
    return image


MODES = {
    "greyscale": (encode(Image.new("L", (6, 4), 77)), (77, 77, 77)),
    "16 bits": (encode(Image.fromarray(np.full((4, 6), 77 * 256 + 200, np.uint16))), (77, 77, 77)),
    "1 bit": (encode(Image.new("1", (6, 4), 1)), (255, 255, 255)),
    "alpha": (encode(Image.new("RGBA", (6, 4), (10, 200, 30, 128))), (10, 200, 30)),
    "grey and alpha": (encode(Image.new("LA", (6, 4), (77, 0))), (77, 77, 77)),
    "palette": (encode(palette()), (10, 200, 30)),
    "CMYK": (encode(Image.new("CMYK", (6, 4), (245, 55, 225, 0)), "TIFF"), (10, 200, 30)),
}


@pytest.mark.parametrize("name", MODES)
def test_other_colour_modes_become_rgb(name):
    encoded, colour = MODES[name]
    image = decode(encoded, LIMIT)
    assert image.mode == "RGB"
    assert image.size == (6, 4)
    assert (np.asarray(image) == colour).all()


def test_exif_orientation_is_not_followed():
    """As in the published code, which opens with PIL and never transposes."""
    image = noise(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert np.array_equal(
        np.asarray(decode(encode(image, "JPEG", exif=exif), LIMIT)), np.asarray(decode(encode(image, "JPEG"), LIMIT))
    )
