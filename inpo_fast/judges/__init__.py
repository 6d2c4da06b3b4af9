"""Judges score images against prompts. One interface: `judge.score(images, prompts) -> Scores`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Scores:
    """total: (N,), what the judge says. parts: named components, each (N,); may be empty.

    A judge that can tell them apart reports the parts "alignment" and "looks".
    """

    total: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


class Judge(Protocol):
    name: str
    tie: float  # totals that differ by less are a tie

    def check(self, prompts: Sequence[str]) -> None:
        """Refusal of prompts that this judge cannot judge."""
        ...

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """images: (H, W, 3) uint8 arrays; one prompt each."""
        ...
