"""Paired win-rates with intervals: wins plus half the ties, 95 % over prompts.

An interval is the percentile bootstrap's (Efron 1979). Where fewer than FEWEST prompts differ from the commonest result
(all won but two, all ties) there is nothing to draw from, and of equal values it has no width at all, for any N. Then
it is made no narrower than what the prompts can rule out: a kind of prompt that none of N prompts was may be a share q
of all, where (1 - q)^N = 2.5 %; were those all lost, the mean would be mean (1 - q), were all won, mean + q (1 - mean).
Where all prompts were won this is Clopper and Pearson's exact bound (Biometrika 26, 1934), 0.025^(1/N); with 5 % in
place of 2.5 % and large N it is the "rule of three" (Hanley and Lippman-Hand, JAMA 249, 1983).

With fewer than FEWEST prompts there is no interval: not even a win of all would tell anything from 1/2 at 95 % (sign
test: 2 / 2^5 > 0.05 > 2 / 2^6).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BOOTSTRAPS = 2000
FEWEST = 6  # prompts of an interval, and prompts unlike the others for a bootstrap alone
MISSED = 0.025  # chance, on each side


class Rate(NamedTuple):
    """Of 0..1; rate: None where nothing could be judged. low, high: None where there are too few prompts for an
    interval. prompts: that could be judged."""

    rate: float | None
    low: float | None
    high: float | None
    prompts: int

    @property
    def above(self) -> bool:
        """Whether it can be told from 1/2, and is more."""
        return self.low is not None and self.low > 0.5

    @property
    def below(self) -> bool:
        return self.high is not None and self.high < 0.5


def points(ours: np.ndarray, base: np.ndarray, tie: float, seeds: int) -> np.ndarray:
    """(prompts,): the mean over a prompt's pictures of 1 for a win, 1/2 for a tie. Scores (prompts * seeds,).

    A picture without a score (NaN) leaves its comparison out; NaN for a prompt of which none is left.
    """
    difference = (ours - base).reshape(-1, seeds)
    judged = ~np.isnan(difference)
    won = np.where(np.abs(difference) < tie, 0.5, (difference > 0).astype(float)) * judged
    if judged.all():
        return won.mean(1)
    return np.where(judged.any(1), won.sum(1) / np.maximum(judged.sum(1), 1), np.nan)


def win_rate(ours: np.ndarray, base: np.ndarray, tie: float, seeds: int) -> Rate:
    """Of ours against base. Both (prompts * seeds,), prompt-major; the interval is over prompts."""
    return interval(points(ours, base, tie, seeds))


def interval(values: np.ndarray) -> Rate:
    """The mean of (N,) values from 0 to 1, NaN left out, with its 95 % interval."""
    values = values[~np.isnan(values)]
    count = len(values)
    if count == 0:
        return Rate(None, None, None, 0)
    mean = float(values.mean())
    if count < FEWEST:
        return Rate(mean, None, None, count)
    resampled = np.random.default_rng(0).integers(count, size=(BOOTSTRAPS, count))
    low, high = np.quantile(values[resampled].mean(1), [0.025, 0.975])
    return Rate(mean, *widened(values, float(low), float(high)), count)


def widened(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """A bootstrap's low and high of (N,) prompts' values from 0 to 1; where nearly all are equal, no narrower than what
    N prompts can rule out."""
    if len(values) - np.unique(values, return_counts=True)[1].max() >= FEWEST:
        return low, high
    mean, unseen = float(values.mean()), 1 - MISSED ** (1 / len(values))
    return min(low, mean * (1 - unseen)), max(high, mean + unseen * (1 - mean))


def disagreement(differences: Sequence[np.ndarray]) -> np.ndarray:
    """(N,): how far judges differ about N comparisons. differences: of each judge, score of ours minus theirs (N,).

    Each judge's are divided by their root mean square, so that a judge of large numbers counts no more; then the
    standard deviation over judges. NaN where one of them gave no score.
    """
    sizes = [np.sqrt((d[~np.isnan(d)] ** 2).mean()) if not np.isnan(d).all() else 1.0 for d in differences]
    scaled = [d / max(float(size), 1e-12) for d, size in zip(differences, sizes, strict=True)]
    return np.std(scaled, axis=0)
