"""Paired win-rates with intervals: wins plus half the ties, 95 % by a bootstrap over prompts."""

from collections.abc import Sequence

import numpy as np

BOOTSTRAPS = 2000


def points(ours: np.ndarray, base: np.ndarray, tie: float, seeds: int) -> np.ndarray:
    """(prompts,): the mean over a prompt's pictures of 1 for a win, 1/2 for a tie. Scores (prompts * seeds,)."""
    difference = ours - base
    return np.where(np.abs(difference) < tie, 0.5, (difference > 0).astype(float)).reshape(-1, seeds).mean(1)


def win_rate(ours: np.ndarray, base: np.ndarray, tie: float, seeds: int) -> tuple[float, float, float]:
    """(rate, low, high) of ours against base. Both (prompts * seeds,), prompt-major; 95 % bootstrap over prompts."""
    return interval(points(ours, base, tie, seeds))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of (N,) values: 95 % of the means of N values drawn with replacement."""
    resampled = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[resampled].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def disagreement(differences: Sequence[np.ndarray]) -> np.ndarray:
    """(N,): how far judges differ about N comparisons. differences: of each judge, score of ours minus theirs (N,).

    Each judge's are divided by their root mean square, so that a judge of large numbers counts no more; then the
    standard deviation over judges.
    """
    scaled = [d / max(float(np.sqrt((d**2).mean())), 1e-12) for d in differences]
    return np.std(scaled, axis=0)
