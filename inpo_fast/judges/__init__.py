"""Judges score images against prompts. One interface: `judge.score(images, prompts) -> Scores`.

score_file.py is a short judge to imitate; registry.py has the table of all, where a new one is entered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

SUMMARIES = ("alignment", "looks")  # parts that are means of other parts, where there are others


@dataclass(frozen=True)
class Scores:
    """total: (N,), what the judge says. parts: named components, each (N,); may be empty.

    A judge that can tell them apart reports the parts "alignment" and "looks".
    """

    total: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def joined(cls, some: "Sequence[Scores]") -> "Scores":
        """Batches one after another. They have the same parts."""
        if not some:
            return cls(np.zeros(0))
        parts = {name: np.concatenate([s.parts[name] for s in some]) for name in some[0].parts}
        return cls(np.concatenate([s.total for s in some]), parts)


class Judge(Protocol):
    """name: what is printed. A judge may also have `id`, which names weights, settings and numbers exactly (scores
    are cached under it; default: the name), and `cost(n)`, what n scores will cost, in words."""

    name: str
    tie: float  # totals that differ by less are a tie

    def check(self, prompts: Sequence[str]) -> None:
        """UserError of prompts that this judge cannot judge."""
        ...

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """images: (H, W, 3) uint8 arrays; one prompt each."""
        ...


def judge_id(judge: Judge) -> str:
    return getattr(judge, "id", judge.name)
