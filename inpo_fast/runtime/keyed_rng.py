"""Randomness without state: every random number is a function of a key.

A key is (seed, purpose, position, ...). There is no generator to save or to keep in step, so the
draws are the same on any number of processes, for any micro-batch size, and after a resume.
"""

import hashlib

import torch

Key = tuple[int | str, ...]


def hash_key(*key: int | str) -> int:
    """63 well-mixed bits of a key. Stable across machines, Python versions and processes."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def integer(low: int, high: int, *key: int | str) -> int:
    """Uniform on low..high inclusive (bias below 2**-40 for ranges of a few thousand)."""
    return low + hash_key(*key) % (high - low + 1)


def uniform(*key: int | str) -> float:
    """Uniform on [0, 1), 53 bits."""
    return (hash_key(*key) >> 10) / 2**53


def normal(shape: tuple[int, ...], *key: int | str) -> torch.Tensor:
    """Standard normal, fp32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash_key(*key)))


def normals(shape: tuple[int, ...], keys: list[Key]) -> torch.Tensor:
    """One independent standard normal sample of `shape` for each key, (len(keys), *shape)."""
    return torch.stack([normal(shape, *key) for key in keys])
