"""Behind a score: which items changed, and which kinds of items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isnan, nan

import numpy as np

from lirefs.comparison.cell import Scores
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.errors import TaskError, must_be
from lirefs.statistics.intervals import Estimate, correlation, permutation_p
from lirefs.statistics.resamples import Resamples, finished
from lirefs.tasks.task import ItemResult


@dataclass(frozen=True)
class Flip:
    """An item that either the unchanged model or the variant gets right, but not both.

    Attributes:
        before: Answer of the unchanged model.
        after: Answer of the variant.
        gained: Whether the variant is right.
    """

    id: str
    prompt: str
    expected: str
    before: str
    after: str
    gained: bool


def flips(comparison: Comparison, task: str, variant: str) -> list[Flip]:
    """Items of a task that a variant makes right or wrong, in their order.

    A task whose metric is not 0 or 1 for each item has none. Items whose score is not finite,
    because the model overflowed, are left out.

    Raises:
        TaskError: If the task or variant does not exist.
    """
    pairs = _pairs(comparison, task, variant)
    metric = comparison.tasks[task].metric
    pairs = [pair for pair in pairs if all(isfinite(one.scores.get(metric, 0.5)) for one in pair)]
    if not {one.scores.get(metric) for pair in pairs for one in pair} <= {0.0, 1.0}:
        return []
    return [
        Flip(a.id, a.prompt, a.expected, a.output, b.output, b.scores[metric] == 1.0)
        for a, b in pairs
        if a.scores[metric] != b.scores[metric]
    ]


@dataclass(frozen=True)
class TagChange:
    """Change of the items of one tag under a variant.

    Attributes:
        tag: The part of their ids before the last slash.
        before: Mean score of the unchanged model.
        change: Mean score under the variant minus `before`, paired over items.
        relative: `change` over `before`, as in figure 5 of the K-FAC paper; not finite where
            `before` is 0.
    """

    tag: str
    before: float
    change: Estimate
    relative: Estimate


@dataclass(frozen=True)
class TagChanges:
    """Changes by tag, and their rank correlation with a number given for each tag.

    Attributes:
        tags: In ascending order of the numbers given, or of the changes where none are (those that
            are not finite come last).
        spearman: Rank correlation of the change with the number, n = tags; None without numbers.
            Tags whose change is not finite, because the model overflowed, are left out.
        p_value: Share of orders of the tags with a correlation at least as far from 0; None
            without numbers. With few tags, trust it rather than the interval, an approximation.
    """

    task: str
    variant: str
    tags: tuple[TagChange, ...]
    spearman: Estimate | None = None
    p_value: float | None = None

    def __repr__(self) -> str:
        return f"TagChanges({self.task!r} under {self.variant!r}, {len(self.tags)} tags)"


def changes_by_tag(
    comparison: Comparison,
    task: str,
    variant: str,
    numbers: Mapping[str, float] | None = None,
) -> TagChanges:
    """Change of each tag of a task's items under a variant (Merullo et al. 2025, figure 5).

    An item's tag is the part of its id before the last slash: `company_ceo/12` has `company_ceo`.

    Args:
        comparison: Holds the variant.
        task: Any task but a perplexity.
        variant: Name of the variant.
        numbers: A number for each tag, such as its frequency in training, or the rank of that.

    Raises:
        TaskError: If the task or variant does not exist, it is a perplexity, an id has no slash,
            or a tag has no number.
    """
    groups: dict[str, list[tuple[ItemResult, ItemResult]]] = {}
    for pair in _pairs(comparison, task, variant):
        tag, slash, _ = pair[0].id.rpartition("/")
        if not slash:
            raise TaskError(
                f"task {task!r}: item {pair[0].id!r} has no tag; its id must read 'tag/rest'"
            )
        groups.setdefault(tag, []).append(pair)
    metric = comparison.tasks[task].metric
    if metric == "perplexity":
        raise TaskError(f"task {task!r} is a perplexity; changes by tag are for means of scores")
    missing = [tag for tag in groups if numbers is not None and tag not in numbers]
    if missing:
        raise TaskError(f"task {task!r}: no number is given for tag {missing[0]!r}")
    tags = [_change(comparison, tag, pairs, metric) for tag, pairs in groups.items()]
    if numbers is None:
        tags.sort(key=lambda one: (isnan(one.change.value), one.change.value))
        return TagChanges(task, variant, tuple(tags))
    tags.sort(key=lambda one: numbers[one.tag])
    known = [one for one in tags if not isnan(one.change.value)]
    if not known:
        nothing = Estimate(nan, nan, nan, 0)
        return TagChanges(task, variant, tuple(tags), nothing, nan)
    changes = np.array([one.change.value for one in known])
    given = np.array([numbers[one.tag] for one in known], np.float64)
    spearman = correlation(changes, given, ranks=True)
    p_value = permutation_p(changes, given, seed=comparison.seed)
    return TagChanges(task, variant, tuple(tags), spearman, p_value)


def _change(
    comparison: Comparison, tag: str, pairs: list[tuple[ItemResult, ItemResult]], metric: str
) -> TagChange:
    before, after = (Scores.of(side, metric) for side in zip(*pairs, strict=True))
    draws = Resamples(len(pairs), comparison.resamples, comparison.seed)
    change, ratio = finished(draws, [after.difference(before), after.retained(before)])
    return TagChange(
        tag=tag,
        before=float(before.weights @ before.values / before.weights.sum()),
        change=change,
        relative=Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n),
    )


def _pairs(comparison: Comparison, task: str, variant: str) -> list[tuple[ItemResult, ItemResult]]:
    """Each item under the unchanged model and under a variant."""
    must_be(comparison, Comparison, "comparison", TaskError)
    names = (("task", task, comparison.tasks), ("variant", variant, comparison.results))
    for what, name, known in names:
        if not isinstance(name, str) or name not in known:
            raise TaskError(f"the comparison has no {what} {name!r}; it has {', '.join(known)}")
    before, after = (comparison.results[name][task] for name in (BASELINE, variant))
    return list(zip(before, after, strict=True))
