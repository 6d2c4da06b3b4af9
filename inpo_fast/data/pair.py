"""A preference pair, and what a source of them is."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from inpo_fast.data.text import unusable


class BadPair(Exception):
    """This pair cannot be used; it is dropped as a unit."""


@dataclass(frozen=True)
class Pair:
    """A preference: `winner` and `loser` are encoded images (PNG, JPEG, WebP …). BadPair where the prompt is no text
    that a tokenizer takes.

    label: how sure it is that the winner is the better one, 0.5 to 1. weight: of the pair in the loss.
    """

    id: str
    prompt: str
    winner: bytes
    loser: bytes
    label: float = 1.0
    weight: float = 1.0

    def __post_init__(self):
        if wrong := unusable(self.prompt):
            raise BadPair(f"{self.id}: {wrong}")


class Source(Protocol):
    """The pairs, and what the order needs to know of how they lie.

    ties: rows left out because neither image is the better one; `undecided` (data/labels.py) has all that are left out
    for their labels, and is made of the ties where a source has none. blocks: (blocks,) int64, where each stretch of
    pairs that is read as a whole ends, the last one at len(); None where any pair can be read alone. bytes: of all
    encoded images and prompts, 0 where `blocks` is None. A source that wraps another one maps `blocks` to its own
    indices; one without these two is taken for one of cheap random access.
    """

    ties: int
    blocks: np.ndarray | None
    bytes: int

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, str]:
        """Digests of what the pairs are: `rows` and `pictures`, as data/identity.py explains; asked through
        `identity_of`, once."""
        ...

    def read(self, index: int) -> Pair:
        """The pair at index 0..len-1, from any thread. BadPair if its record cannot be used."""
        ...
