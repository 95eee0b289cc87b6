"""Intervals for reported numbers: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isnan, nan
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from lirefs.errors import SettingError, checked_seed
from lirefs.statistics.resamples import (
    CHUNK,
    Draws,
    Resampled,
    Resamples,
    finished,
    resample_counts,
)
from lirefs.statistics.resamples import Floats as Floats

Ints = npt.NDArray[np.int64]

RESAMPLES = 2000
Z = 1.959964
"""Normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and its number of items; NaN is shown as n/a."""

    value: float
    low: float
    high: float
    n: int

    def __repr__(self) -> str:
        return f"Estimate({self:.4g}, n={self.n})"

    def __format__(self, spec: str) -> str:
        if isnan(self.value):
            return "n/a"
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_dict(self) -> dict[str, float]:
        """As a JSON object."""
        return asdict(self)


def wilson(successes: int, n: int) -> Estimate:
    """Share of successes in n >= 1 trials; the Wilson score interval holds at 0 and 100 % too."""
    share = successes / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # Rounding must not put a limit on the wrong side of the share, or beyond 0 and 1.
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return Estimate(share, min(low, share), max(high, share), n)


def interval(values: Floats, n: int | None = None) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles of the finite values; NaN if no value is finite.

    Args:
        values: Resampled values, shape (resamples,).
        n: Number of items that were resampled. If given, the percentiles are widened as much as a
            t interval with the unbiased variance is wider than a normal one with the bootstrap's
            (Hesterberg 2015, section 5.1), which matters below about 40 items.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return nan, nan
    tail = 2.5
    if n is not None:
        tail = 100 * norm.cdf(-np.sqrt(n / (n - 1)) * student.ppf(0.975, n - 1)) if n > 1 else 0.0
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


def auroc(
    scores: npt.ArrayLike, labels: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Area under the ROC curve with a bootstrap interval, resampled within each class.

    Args:
        scores: Shape (n,); larger means class 1. Ties count half.
        labels: Shape (n,); 0 or 1, both present.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        SettingError: If the shapes differ, a score is NaN, or one class is missing.
    """
    try:
        scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    except (TypeError, ValueError):
        raise SettingError("AUROC needs one number and one label for each item") from None
    if scores.ndim != 1 or scores.shape != labels.shape or np.isnan(scores).any():
        raise SettingError("AUROC needs one number and one label for each item")
    if set(np.unique(labels)) != {0, 1}:
        raise SettingError("AUROC needs items of both classes, labelled 0 and 1")
    # Ranks, because scikit-learn refuses infinite scores.
    value = float(roc_auc_score(labels, np.unique(scores, return_inverse=True)[1]))
    positive, negative = scores[labels == 1], scores[labels == 0]
    # AUROC = mean over pairs of [p > n] + [p = n] / 2, so a resample only reweights the pairs: a
    # positive wins the weight of the negatives below it, and half the weight of those equal to it.
    order = np.argsort(negative)
    below = np.searchsorted(negative, positive, "left", sorter=order)
    up_to = np.searchsorted(negative, positive, "right", sorter=order)
    seed = checked_seed(seed)
    first, second = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    resampled = np.empty(resamples)
    step = max(1, CHUNK // len(scores))
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        rows = resample_counts(len(positive), size, first)
        columns = resample_counts(len(negative), size, second)[:, order]
        weight = np.pad(columns.cumsum(axis=1), ((0, 0), (1, 0)))
        wins = np.einsum("rn,rn->r", rows, weight[:, below] + weight[:, up_to])
        resampled[begin : begin + size] = wins / (2 * len(positive) * len(negative))
    return Estimate(value, *interval(resampled), len(scores))


def roc_areas(scores: npt.NDArray[np.floating[Any]], labels: Ints) -> Floats:
    """Areas, shape (...), under the ROC curves of scores, shape (n, ...); larger means class 1.

    Labels are 0 and 1, both present, of shape (n,) or one that broadcasts to that of the scores.
    """
    ranks = rankdata(scores, axis=0)
    positive = labels.reshape(labels.shape + (1,) * (scores.ndim - labels.ndim))
    ones = positive.sum(axis=0)
    zeros = len(scores) - ones
    return np.asarray(((ranks * positive).sum(axis=0) - ones * (ones + 1) / 2) / (ones * zeros))


def correlation(one: Floats, other: Floats, ranks: bool = False) -> Estimate:
    """Pearson correlation, or Spearman's of the ranks, with an interval by Fisher's z.

    Both arrays have shape (n,). The value is NaN where one is constant; for n < 4 the interval is
    [-1, 1]. The variance of Spearman's z follows Bonett and Wright (2000).
    """
    n = len(one)
    if ranks:
        one, other = rankdata(one), rankdata(other)
    first, second = one - one.mean(), other - other.mean()
    product = float(np.linalg.norm(first) * np.linalg.norm(second))
    value = float(first @ second) / product if product > 0 else nan
    if n < 4 or not np.isfinite(value):
        return Estimate(value, -1.0, 1.0, n)
    half = Z * np.sqrt((1 + value**2 / 2 if ranks else 1.0) / (n - 3))
    z = np.arctanh(np.clip(value, -1 + 1e-15, 1 - 1e-15))
    return Estimate(value, float(np.tanh(z - half)), float(np.tanh(z + half)), n)


def permutation_p(one: Floats, other: Floats, shuffles: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of Spearman's correlation: the share of random orders that reach it.

    Unlike the interval of `correlation`, it holds for a handful of values. Both arrays have shape
    (n,); the result is NaN where one is constant. The observed order counts as one more.
    """
    first, second = (rankdata(values) - (len(values) + 1) / 2 for values in (one, other))
    if not (first.any() and second.any()):
        return nan
    generator = np.random.default_rng(checked_seed(seed))
    reached, step = 0, max(1, CHUNK // len(second))
    for begin in range(0, shuffles, step):
        rows = np.tile(second, (min(step, shuffles - begin), 1))
        orders = generator.permuted(rows, axis=1)
        reached += int((np.abs(orders @ first) >= abs(second @ first) - 1e-9).sum())
    return float((1 + reached) / (1 + shuffles))


def mean_estimate(values: npt.ArrayLike) -> Estimate:
    """The mean of items, shape (n,), with a bootstrap interval."""
    items = np.asarray(values, dtype=np.float64)
    means = Resamples(len(items), RESAMPLES, 0) @ items / len(items)
    return Estimate(float(items.mean()), *interval(means), len(items))


def weighted_mean(scores: Floats, weights: Floats, draws: Draws) -> Estimate:
    """Weighted mean with a studentized bootstrap interval (Efron and Tibshirani 1993, chapter 12).

    For log perplexities and their differences, per token and weighted by tokens. Where a few of
    20 texts are much longer or change much more than the others, percentiles cover 86 %, this
    interval 93 %. Items should seldom tie: for mostly equal scores it is far too wide. Arguments
    are as in `paired_difference`; weights are positive.
    """
    (found,) = finished(draws, [weighted_mean_resampled(scores, weights)])
    return found


def weighted_mean_resampled(scores: Floats, weights: Floats) -> Resampled[Estimate]:
    """`weighted_mean` in the making."""
    n = len(scores)
    value = float(scores @ weights / weights.sum())
    part = weights * (scores - value)
    error = np.sqrt(part @ part) / weights.sum()
    if error == 0:
        return Estimate(value, value, value, n)
    total, shift, square, cross, weight = yield [
        weights,
        part,
        part**2,
        part * weights,
        weights**2,
    ]
    shift = shift / total
    # The sum over drawn items of (weight * (score - resampled mean)) ** 2, multiplied out.
    squares = square - 2 * shift * cross
    squares += shift**2 * weight
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = shift / (np.sqrt(np.maximum(squares, 0)) / total)
    ratios = ratios[~np.isnan(ratios)]  # 0 / 0: a resample of one item alone
    if ratios.size == 0:
        return Estimate(value, -inf, inf, n)
    # Some ratios may be infinite, and interpolating between them would give NaN.
    low, high = np.percentile(ratios, [2.5, 97.5], method="inverted_cdf")
    return Estimate(value, float(value - high * error), float(value - low * error), n)


def exponential_of_estimate(log: Estimate) -> Estimate:
    """A perplexity from its logarithm, or the ratio of two from the difference of their logs."""
    with np.errstate(over="ignore"):
        value, low, high = np.exp([log.value, log.low, log.high]).tolist()
    return Estimate(value, low, high, log.n)


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, on different items, its interval combined from theirs.

    By the square-and-add rule (Zou and Donner 2008, MOVER).
    """
    if not estimates:
        return Estimate(nan, nan, nan, 0)
    table = np.array([(one.value, one.low, one.high) for one in estimates])
    value = float(table[:, 0].mean())
    below, above = np.linalg.norm(table[:, 1:] - table[:, :1], axis=0) / len(table)
    return Estimate(value, value - float(below), value + float(above), sum(e.n for e in estimates))
