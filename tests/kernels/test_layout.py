"""Strides and block sizes that the kernels walk by, against addresses taken from the tensors and a brute search."""

import pytest
import torch
from inpo_kernels.layout import exact_block, is_channels_last, plane_strides, power_of_two

SHAPES = {
    "usual": (2, 3, 5, 7),
    "one column": (2, 3, 5, 1),  # the stride of W says nothing: pixels are rows
    "one row": (2, 3, 1, 7),  # the stride of H says nothing
    "one pixel": (2, 3, 1, 1),
}
# From (B, C, H, W) to another view of it whose pixels are evenly spaced.
EVEN = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "crop of one column": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:2],  # even, though its rows are longer
    "crop of one row": lambda x: torch.nn.functional.pad(x, (1, 2))[:, :, :1, 1:-2],
    "some channels": lambda x: torch.cat([x, x, x], 1)[:, 1:4],
    "some images": lambda x: torch.cat([x, x])[1:3],
    "every other image": lambda x: x.repeat_interleave(2, 0)[::2],
    "one image for all": lambda x: x[:1].expand_as(x),
}
UNEVEN = {
    "crop of columns": lambda x: x[..., 1:],
    "every other row": lambda x: x[:, :, ::2],
    "transposed": lambda x: x.mT,
    "crop in channels_last": lambda x: x.to(memory_format=torch.channels_last)[..., 1:],
}


@pytest.mark.parametrize("view", EVEN.values(), ids=EVEN)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plane_strides_lead_to_every_element(shape, view):
    x = view(torch.arange(2 * 3 * shape[2] * shape[3]).view(shape))
    shape = x.shape
    image, channel, pixel = plane_strides("x", x)
    b, c, p = torch.meshgrid(*(torch.arange(n) for n in (*shape[:2], shape[2] * shape[3])), indexing="ij")
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // 8,), (1,), 0)
    assert torch.equal(memory[x.storage_offset() + b * image + c * channel + p * pixel].view(shape), x)


@pytest.mark.parametrize("view", UNEVEN.values(), ids=UNEVEN)
def test_uneven_pixels_are_refused(view):
    with pytest.raises(ValueError, match=r"^the pixels of ref are not evenly spaced .*contiguous"):
        plane_strides("ref", view(torch.zeros(2, 3, 5, 7)))
    plane_strides("ref", view(torch.zeros(2, 3, 5, 7)).contiguous())


def test_other_ranks_and_images_that_int32_cannot_count_are_refused():
    for shape in ((2, 3, 5), (1, 2, 3, 5, 7), ()):
        with pytest.raises(ValueError, match=r"^eps has shape .*expected"):
            plane_strides("eps", torch.zeros(shape))
    batch = torch.empty(1 << 20, 4, 64, 64, device="meta")  # 2^34 elements, but 2^14 in an image
    assert plane_strides("x", batch) == (16384, 4096, 1)
    channels_first = torch.empty(4, 1 << 20, 64, 64, device="meta").transpose(0, 1)
    for far in (torch.empty(1, 2, 1 << 15, 1 << 15, device="meta"), channels_first):
        with pytest.raises(ValueError, match=r"^an image of x spans 2\^31"):
            plane_strides("x", far)
        plane_strides("x", far[:, :1])
    assert plane_strides("x", torch.empty(3, 0, 5, 7, device="meta")) == (35, 35, 1)


def test_block_sizes():
    for n in range(2050):
        power = power_of_two(n)
        assert power >= n and (power == 1 or power // 2 < n) and power.bit_count() == 1
    for n in range(1, 2050):
        divisor = max(1 << k for k in range(12) if n % (1 << k) == 0)
        for least, most in ((32, 256), (64, 512), (1, 1024)):
            block = exact_block(n, least=least, most=most)
            if divisor >= least:
                assert block == min(divisor, most) and n % block == 0, "no lane is masked"
            else:
                assert block == min(power_of_two(n), most), "few masked lanes, not rows in crumbs"


@pytest.mark.parametrize("view", (EVEN | UNEVEN).values(), ids=EVEN | UNEVEN)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 3, 5, 7), (2, 1, 5, 7)])
def test_channels_last_is_what_torch_calls_so(shape, view):
    for base in (torch.zeros(shape), torch.zeros(shape).to(memory_format=torch.channels_last)):
        x = view(base)
        assert is_channels_last(x) == x.is_contiguous(memory_format=torch.channels_last)
