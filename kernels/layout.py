"""How the kernels walk through memory: strides of images, and block sizes that waste no lanes."""

import torch


def plane_strides(name: str, x: torch.Tensor) -> tuple[int, int, int]:
    """Strides (image, channel, pixel) of x (B, C, H, W) whose pixels are evenly spaced: NCHW or channels_last.

    One pixel stride stands for both H and W. ValueError where that is not so (a crop, a transposed image).
    """
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, C, H, W)")
    image, channel, row, pixel = x.stride()
    height, width = x.shape[2:]
    if width == 1:
        pixel = row
    elif height > 1 and row != width * pixel:
        raise ValueError(f"the pixels of {name} are not evenly spaced (strides {x.stride()}); call .contiguous() on it")
    if (x.shape[1] - 1) * channel + (height * width - 1) * pixel >= 2**31 - 2**13:  # masked lanes count a block further
        raise ValueError(f"an image of {name} spans 2^31 elements (strides {x.stride()}): kernels count in int32 there")
    return image, channel, pixel


def is_channels_last(x: torch.Tensor) -> bool:
    """x.is_contiguous(memory_format=torch.channels_last), from its strides: torch 2.11's own answer is wrong about most
    operators' results while it compiles for batches of any size (findings/torch-2.11-layout-of-any-batch.sh)."""
    expected = 1
    for dim in (1, 3, 2, 0):
        if x.shape[dim] != 1:
            if x.stride(dim) != expected:
                return False
            expected *= x.shape[dim]
    return True


def power_of_two(n: int) -> int:
    """The smallest power of two >= n: block sizes must be one."""
    return 1 << max(n - 1, 0).bit_length()


def exact_block(n: int, least: int, most: int) -> int:
    """A block size for n elements in a row: the largest power of two <= most that divides n, so that no lane is
    masked; one that covers n (up to most) where that divisor is below `least` and rows would be read in crumbs."""
    divisor = n & -n
    return min(divisor, most) if divisor >= least else min(power_of_two(n), most)
