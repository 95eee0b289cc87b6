"""One variant on one task: value, paired difference, retained share and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lirefs.statistics.intervals import (
    Estimate,
    exponential_of_estimate,
    interval,
    weighted_mean_resampled,
    wilson,
)
from lirefs.statistics.paired import difference_resampled, ratio_resampled
from lirefs.statistics.resamples import Floats, Resampled
from lirefs.statistics.significance import is_binary, paired_detectable
from lirefs.tasks.task import ItemResult

LEVEL = 0.05
"""A difference is clear where its adjusted p-value is below this."""


@dataclass(frozen=True)
class TaskInfo:
    """What a comparison keeps of a task: see `Task` for the fields."""

    group: str
    metric: str
    chance: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One variant on one task. All intervals are 95 % intervals.

    Where an item has no finite score, under the variant or unchanged, because the model overflowed,
    what needs that item is NaN, and shown as n/a.

    Attributes:
        value: The task's metric, a mean over items weighted by `ItemResult.weight`, or perplexity.
            Wilson interval where scores are 0 or 1, bootstrap over items otherwise.
        difference: Value minus the baseline's on the same items (`lirefs.statistics.paired`);
            None for the baseline itself.
        retained: Value over the baseline's, for perplexity the inverse, so that less than 1 is
            always worse; None for the baseline, not finite where the baseline is 0.
        unparsable: Number of items whose output held no answer.
        not_finite: Number of items whose score is NaN or infinite, or whose weight is not a
            positive number.
        extra: The task's other metrics.
        p: p-value of no difference from the baseline, on the same items: McNemar's test where
            every score is 0 or 1, a paired sign-flip test otherwise; None for the baseline.
        p_holm: `p` after Holm's adjustment over all cells of the comparison.
        detectable: Smallest true difference that this many items detect with 80 % power, if as
            many of them change, or by as much, as observed; None for the baseline.
    """

    variant: str
    task: str
    group: str
    metric: str
    value: Estimate
    difference: Estimate | None
    retained: Estimate | None
    unparsable: int
    not_finite: int
    extra: dict[str, float]
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None

    def __repr__(self) -> str:
        text = f"{self.variant} on {self.task}: {self.metric} {self.value:.4g}, n={self.value.n}"
        if self.difference is not None:
            text += f"; difference {self.difference:+.4g}"
        if self.p_holm is not None:
            text += f", p_holm {self.p_holm:.2g}"
        return f"Cell({text})"

    @property
    def clear(self) -> bool:
        """Whether the variant differs from the baseline after Holm's adjustment."""
        return self.p_holm is not None and self.p_holm < LEVEL


@dataclass(frozen=True, eq=False)
class Scores:
    """A variant's scores on a task, and the weights of the items: float64, shape (n,) both.

    For perplexity the scores are nats per token, and the value is the exponential of their mean.
    An item whose score is not finite has NaN and the weight 1.
    """

    values: Floats
    weights: Floats
    perplexity: bool

    @classmethod
    def of(cls, items: Sequence[ItemResult], metric: str) -> Scores:
        """The scores of some items under one metric, which may be `perplexity`."""
        weights = np.array([item.weight for item in items], dtype=np.float64)
        perplexity = metric == "perplexity"
        name = "nll" if perplexity else metric
        values = np.array([item.scores[name] for item in items], dtype=np.float64)
        known = np.isfinite(values) & np.isfinite(weights) & (weights > 0)
        if not known.all():
            values, weights = np.where(known, values, np.nan), np.where(known, weights, 1.0)
        return cls(values / weights if perplexity else values, weights, perplexity)

    @property
    def not_finite(self) -> int:
        """Number of items without a finite score: an overflow in the model leaves them."""
        return int(np.isnan(self.values).sum())

    @property
    def unknown(self) -> Estimate:
        """What stands for a number that these scores do not give: NaN, shown as n/a."""
        return Estimate(math.nan, math.nan, math.nan, len(self.values))

    def value(self) -> float:
        """The task's value: the mean, or the perplexity; NaN where an item has no score."""
        ones = np.ones((1, len(self.values)))
        return float(self._means(*(ones @ row for row in self._rows))[0])

    def resampled_values(self) -> Resampled[Floats]:
        """The task's value, then that of each resample: (1 + resamples,)."""
        sums = yield self._rows
        return self._values(sums)

    def estimate(self) -> Resampled[Estimate]:
        """The task's value with its interval."""
        if self.not_finite:
            return self.unknown
        if self.perplexity:
            log = yield from weighted_mean_resampled(self.values, self.weights)
            return exponential_of_estimate(log)
        if is_binary(self.values, self.values, self.weights):
            return wilson(int(self.values.sum()), len(self.values))
        values = yield from self.resampled_values()
        return self._percentiles(values)

    def difference(self, base: Scores) -> Resampled[Estimate]:
        """Difference from the baseline."""
        if self.not_finite or base.not_finite:
            return self.unknown
        if not self.perplexity:
            return (yield from difference_resampled(self.values, base.values, self.weights))
        sums = yield [*self._rows, *base._rows]
        return self._percentiles(self._values(sums[:2]) - base._values(sums[2:]))

    def retained(self, base: Scores) -> Resampled[Estimate]:
        """Share of the baseline's score that is retained; see `Cell`."""
        if self.not_finite or base.not_finite:
            return self.unknown
        if not self.perplexity:
            return (yield from ratio_resampled(self.values, base.values, self.weights))
        log = yield from weighted_mean_resampled(base.values - self.values, self.weights)
        return exponential_of_estimate(log)

    def detectable(self, base: Scores) -> float:
        """Detectable difference from the baseline; see `Cell`."""
        if self.not_finite or base.not_finite:
            return math.nan
        found = paired_detectable(self.values, base.values, self.weights)
        if not self.perplexity:
            return found
        with np.errstate(over="ignore"):
            return float(base.value() * np.expm1(found))

    @property
    def _rows(self) -> tuple[Floats, Floats]:
        """What is summed over the items: weighted scores, and weights."""
        return self.weights * self.values, self.weights

    def _means(self, top: Floats, bottom: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return np.exp(top / bottom) if self.perplexity else top / bottom

    def _values(self, sums: Floats) -> Floats:
        """The task's value, and those of resamples from their sums, shape (2, resamples)."""
        ones = np.ones(
            (8, len(self.values))
        )  # not one row alone, whose product is rounded otherwise
        tops, bottoms = (
            np.append((ones @ row)[:1], part) for row, part in zip(self._rows, sums, strict=True)
        )
        return self._means(tops, bottoms)

    def _percentiles(self, values: Floats) -> Estimate:
        n = len(self.values)
        return Estimate(float(values[0]), *interval(values[1:], n), n)
