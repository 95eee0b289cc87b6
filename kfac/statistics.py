"""Intervals over texts: arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfac.errors import SpectrumError

Floats = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval and the number of items.

    Attributes:
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of items.
    """

    value: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def resample_counts(n: int, resamples: int, seed: int) -> Floats:
    """Return how often each of n texts is drawn in each bootstrap resample, (resamples, n)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def mean_estimate(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Return the mean of some items with a bootstrap interval."""
    items = np.asarray(values, dtype=np.float64)
    means = resample_counts(len(items), resamples, seed) @ items / len(items)
    return Estimate(float(items.mean()), *_interval(means), len(items))


def auroc(
    scores: ArrayLike, labels: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return the area under the ROC curve, resampled within each class.

    Args:
        scores: Shape (n,); larger means class 1. Ties count half.
        labels: Shape (n,); 0 or 1, both present.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        The area with its interval; n counts both classes.

    Raises:
        SpectrumError: The shapes differ, a score is NaN, or one class is missing.
    """
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if values.ndim != 1 or values.shape != classes.shape or np.isnan(values).any():
        raise SpectrumError("AUROC needs one number and one label for each item")
    if not 0 < classes.sum() < len(classes):
        raise SpectrumError("AUROC needs items of both classes")
    positive, negative = values[classes], values[~classes]
    # The mean over pairs of [p > n] + [p = n] / 2, so a resample only reweights the pairs.
    wins = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    rows = resample_counts(len(positive), resamples, seed)
    columns = resample_counts(len(negative), resamples, seed + 1)
    areas = np.einsum("rn,rn->r", rows @ wins, columns) / wins.size
    return Estimate(float(wins.mean()), *_interval(areas), len(values))


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
