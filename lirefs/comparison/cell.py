"""One variant on one task: value, paired difference, retained share and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lirefs.statistics.intervals import Estimate, Floats, interval, wilson
from lirefs.statistics.paired import exponential, paired_difference, paired_ratio, weighted_mean
from lirefs.statistics.significance import binary, paired_detectable, paired_p_value

if TYPE_CHECKING:
    from lirefs.tasks.task import ItemResult


@dataclass(frozen=True)
class Cell:
    """One variant on one task. All intervals are of 95 %.

    Attributes:
        value: The task's metric, a mean over items weighted by `ItemResult.weight`, or perplexity.
            Wilson interval where scores are 0 or 1, bootstrap over items otherwise.
        difference: Value minus the baseline's on the same items, see `lirefs.statistics.paired`; None for the
            baseline itself.
        retained: Value over the baseline's, for perplexity the inverse, so that less than 1 is
            always worse; None for the baseline, not finite where the baseline is 0.
        unparsable: Number of items whose output held no answer.
        extra: The task's other metrics.
        p: Of no difference from the baseline, on the same items: McNemar's test where every score
            is 0 or 1, a paired sign-flip test otherwise; None for the baseline.
        p_holm: `p` after Holm's adjustment over all cells of the comparison.
        detectable: Smallest true difference that this many items show with 80 % power, as many of
            them changing, or as much, as did.
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


@dataclass(frozen=True, eq=False)
class Scores:
    """A variant's scores on a task.

    Attributes:
        values: One an item, shape (n,); for perplexity nats per token.
        weights: What each item counts for, shape (n,).
        perplexity: Whether the value is the exponential of the mean.
    """

    values: Floats
    weights: Floats
    perplexity: bool

    @classmethod
    def of(cls, items: Sequence[ItemResult], metric: str) -> Scores:
        """Scores of some items.

        Args:
            items: What they gave.
            metric: Name of the score, or `perplexity`.
        """
        weights = np.array([item.weight for item in items], dtype=np.float64)
        if metric == "perplexity":
            nll = np.array([item.scores["nll"] for item in items], dtype=np.float64)
            return cls(nll / weights, weights, True)
        values = np.array([item.scores[metric] for item in items], dtype=np.float64)
        return cls(values, weights, False)

    def value(self, draws: Floats | None = None) -> Floats:
        """The task's value, then that of each resample, shape (1 + resamples,).

        Args:
            draws: How often each item is drawn, shape (resamples, n).
        """
        counts = np.ones((1, len(self.values)))
        counts = counts if draws is None else np.concatenate([counts, draws])
        mean = (counts @ (self.weights * self.values)) / (counts @ self.weights)
        with np.errstate(over="ignore"):
            return np.exp(mean) if self.perplexity else mean

    def estimate(self, draws: Floats) -> Estimate:
        """The task's value with its interval."""
        n = len(self.values)
        if self.perplexity:
            return exponential(weighted_mean(self.values, self.weights, draws))
        if binary(self.values, self.values, self.weights):
            return wilson(int(self.values.sum()), n)
        value = self.value(draws)
        return Estimate(float(value[0]), *interval(value[1:], n), n)

    def difference(self, base: Scores, draws: Floats) -> Estimate:
        """Value minus the baseline's."""
        if not self.perplexity:
            return paired_difference(self.values, base.values, draws, self.weights)
        gaps = self.value(draws) - base.value(draws)
        return Estimate(float(gaps[0]), *interval(gaps[1:], len(self.values)), len(self.values))

    def retained(self, base: Scores, draws: Floats) -> Estimate:
        """Value over the baseline's, for perplexity the inverse."""
        if self.perplexity:
            return exponential(weighted_mean(base.values - self.values, self.weights, draws))
        return paired_ratio(self.values, base.values, draws, self.weights)

    def p_value(self, base: Scores) -> float:
        """Of no difference from the baseline."""
        return paired_p_value(self.values, base.values, self.weights)

    def detectable(self, base: Scores) -> float:
        """Smallest true difference of the task's value that would be seen; see `Cell`."""
        least = paired_detectable(self.values, base.values, self.weights)
        if not self.perplexity:
            return least
        with np.errstate(over="ignore"):
            return float(base.value()[0] * np.expm1(least))


def cell_of(
    cell_name: tuple[str, str],
    group: str,
    metric: str,
    items: Sequence[ItemResult],
    base: Sequence[ItemResult] | None,
    draws: Floats,
) -> Cell:
    """Cell without its adjusted p-value.

    Args:
        cell_name: Variant and task.
        group: The task's.
        metric: The task's.
        items: What the variant gave.
        base: What the unchanged model gave; None if that is the variant.
        draws: How often each item is drawn, shape (resamples, n); the same for every variant.
    """
    scores = Scores.of(items, metric)
    others = [name for name in items[0].scores if name not in (metric, "nll")]
    cell = Cell(
        *cell_name,
        group=group,
        metric=metric,
        value=scores.estimate(draws),
        difference=None,
        retained=None,
        unparsable=sum(not item.parsed for item in items),
        extra={name: float(Scores.of(items, name).value()[0]) for name in others},
    )
    if base is None:
        return cell
    before = Scores.of(base, metric)
    return replace(
        cell,
        difference=scores.difference(before, draws),
        retained=scores.retained(before, draws),
        detectable=scores.detectable(before),
    )
