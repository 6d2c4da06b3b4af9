"""Why pictures won: the comparisons with the largest gain and the largest loss, and what the judge saw in them."""

from dataclasses import dataclass

import numpy as np

from inpo_fast.comparison.evaluation import Gallery
from inpo_fast.judges import SUMMARIES, Scores
from inpo_fast.report.pictures import Comparison, comparison

CASES = 4  # gains and losses shown, each
CHANGES = 3  # parts named per case


@dataclass(frozen=True)
class Case:
    """One comparison: the judge's total before and after, and the parts that changed most (name, before, after)."""

    comparison: Comparison
    before: float
    after: float
    changes: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Extremes:
    gains: list[Case]
    losses: list[Case]


def extremes(base: Gallery, aligned: Gallery, before: Scores, after: Scores) -> Extremes | None:
    """At most one case a prompt. None if nothing changed."""
    difference = np.asarray(after.total) - np.asarray(before.total)  # (prompts * seeds,), prompt-major
    parts = [name for name in before.parts if name not in SUMMARIES] or list(before.parts)

    def case(number: int) -> Case:
        changed = [(name, float(before.parts[name][number]), float(after.parts[name][number])) for name in parts]
        changed = sorted((c for c in changed if c[1] != c[2]), key=lambda c: -abs(c[2] - c[1]))
        return Case(
            comparison(base, aligned, number),
            float(before.total[number]),
            float(after.total[number]),
            changed[:CHANGES],
        )

    def top(sign: int) -> list[Case]:
        order, prompts, found = np.argsort(-sign * difference, kind="stable"), set(), []
        for number in order:
            prompt = int(number) // base.seeds
            if sign * difference[number] > 0 and prompt not in prompts and len(found) < CASES:
                prompts.add(prompt)
                found.append(case(int(number)))
        return found

    gains, losses = top(1), top(-1)
    return Extremes(gains, losses) if gains or losses else None
