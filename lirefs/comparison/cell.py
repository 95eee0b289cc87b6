"""One variant on one task: value, paired difference, retained share and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lirefs.statistics.intervals import (
    Estimate,
    Floats,
    exponential_of_estimate,
    interval,
    weighted_mean,
    wilson,
)
from lirefs.statistics.paired import paired_difference, paired_ratio
from lirefs.statistics.significance import is_binary, paired_detectable, paired_p_value
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

    Where the model has overflowed on an item, under the variant or unchanged, what needs that item
    is not finite, and shown as n/a.

    Attributes:
        value: The task's metric, a mean over items weighted by `ItemResult.weight`, or perplexity.
            Wilson interval where scores are 0 or 1, bootstrap over items otherwise.
        difference: Value minus the baseline's on the same items (`lirefs.statistics.paired`);
            None for the baseline itself.
        retained: Value over the baseline's, for perplexity the inverse, so that less than 1 is
            always worse; None for the baseline, not finite where the baseline is 0.
        unparsable: Number of items whose output held no answer.
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
    """

    values: Floats
    weights: Floats
    perplexity: bool

    @property
    def finite(self) -> bool:
        """Whether every item has a score: an overflow in the model leaves NaN or infinity."""
        return bool(np.isfinite(self.values).all())

    @property
    def unknown(self) -> Estimate:
        """What stands for a number that these scores do not give: not finite, shown as n/a."""
        return Estimate(math.nan, math.nan, math.nan, len(self.values))

    @classmethod
    def of(cls, items: Sequence[ItemResult], metric: str) -> Scores:
        """The scores of some items under one metric, which may be `perplexity`."""
        weights = np.array([item.weight for item in items], dtype=np.float64)
        perplexity = metric == "perplexity"
        name = "nll" if perplexity else metric
        values = np.array([item.scores[name] for item in items], dtype=np.float64)
        return cls(values / weights if perplexity else values, weights, perplexity)

    def value(self, draws: Floats | None = None) -> Floats:
        """The task's value, then that of each row of `draws` (resamples, n): (1 + resamples,)."""
        counts = np.ones((1, len(self.values)))
        counts = counts if draws is None else np.concatenate([counts, draws])
        mean = (counts @ (self.weights * self.values)) / (counts @ self.weights)
        with np.errstate(over="ignore"):
            return np.exp(mean) if self.perplexity else mean

    def estimate(self, draws: Floats) -> Estimate:
        """The task's value with its interval."""
        if not self.finite:
            return self.unknown
        if self.perplexity:
            return exponential_of_estimate(weighted_mean(self.values, self.weights, draws))
        if is_binary(self.values, self.values, self.weights):
            return wilson(int(self.values.sum()), len(self.values))
        return self._bootstrapped(self.value(draws))

    def p_value(self, base: Scores) -> float:
        """p-value of no difference from the baseline; NaN where an item has no score."""
        if not (self.finite and base.finite):
            return math.nan
        return paired_p_value(self.values, base.values, self.weights)

    def compared(self, base: Scores, draws: Floats) -> tuple[Estimate, Estimate, float]:
        """Difference from the baseline, retained share and detectable difference; see `Cell`."""
        if not (self.finite and base.finite):
            return self.unknown, self.unknown, math.nan
        detectable = paired_detectable(self.values, base.values, self.weights)
        if not self.perplexity:
            scores = (self.values, base.values, draws, self.weights)
            return paired_difference(*scores), paired_ratio(*scores), detectable
        with np.errstate(over="ignore"):
            detectable = float(base.value()[0] * np.expm1(detectable))
        difference = self._bootstrapped(self.value(draws) - base.value(draws))
        ratio = weighted_mean(base.values - self.values, self.weights, draws)
        return difference, exponential_of_estimate(ratio), detectable

    def _bootstrapped(self, values: Floats) -> Estimate:
        n = len(self.values)
        return Estimate(float(values[0]), *interval(values[1:], n), n)
