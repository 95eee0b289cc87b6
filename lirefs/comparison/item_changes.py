"""What lies behind a score: which items changed, and which kinds of items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.errors import TaskError
from lirefs.statistics.intervals import Estimate, correlation, permutation_p, resample_counts
from lirefs.statistics.paired import paired_difference, paired_ratio
from lirefs.tasks.task import ItemResult


@dataclass(frozen=True)
class Flip:
    """One item that is right on one side and wrong on the other.

    Attributes:
        id: Name of the item.
        prompt: What was asked.
        expected: What counts as right.
        before: What the unchanged model gave.
        after: What the variant gave.
        gained: Whether the variant is the one that is right.
    """

    id: str
    prompt: str
    expected: str
    before: str
    after: str
    gained: bool


def flips(comparison: Comparison, task: str, variant: str) -> list[Flip]:
    """Items of a task on which a variant and the unchanged model differ, in their order.

    Args:
        comparison: What was found.
        task: Name of a task. One whose metric is not 0 or 1 for each item has no flips.
        variant: Name of a variant.

    Raises:
        TaskError: If the task or variant does not exist.
    """
    found = _pairs(comparison, task, variant)
    metric = comparison.tasks[task].metric
    pairs = [(a, b, a.scores.get(metric), b.scores.get(metric)) for a, b in found]
    if not {score for *_, first, second in pairs for score in (first, second)} <= {0.0, 1.0}:
        return []
    return [
        Flip(one.id, one.prompt, one.expected, one.output, other.output, second == 1.0)
        for one, other, first, second in pairs
        if first != second
    ]


@dataclass(frozen=True)
class TagChange:
    """Change of the items of one tag under a variant.

    Attributes:
        tag: The part of their ids before the last slash.
        before: Mean score of the unchanged model.
        change: Mean score under the variant minus `before`, paired over items (`lirefs.statistics.paired`).
        relative: `change` over `before`, as the K-FAC paper's figure 5 has it; not finite where
            `before` is 0.
    """

    tag: str
    before: float
    change: Estimate
    relative: Estimate


@dataclass(frozen=True)
class TagChanges:
    """Changes by tag, and their rank correlation with a number that each tag has.

    Attributes:
        task: The task.
        variant: The variant.
        tags: By the number given for each tag, without numbers by the change; ascending.
        spearman: Rank correlation of the change with the number, n = tags; None without numbers.
        p_value: Share of orders of the tags with a correlation at least as far from 0; None
            without numbers. With few tags it says more than the interval, which is approximate.
    """

    task: str
    variant: str
    tags: tuple[TagChange, ...]
    spearman: Estimate | None = None
    p_value: float | None = None


def by_tag(
    comparison: Comparison,
    task: str,
    variant: str,
    numbers: Mapping[str, float] | None = None,
) -> TagChanges:
    """Change of each tag of a task's items under a variant (Merullo et al. 2025, figure 5).

    An item's tag is the part of its id before the last slash: `company_ceo/12` has `company_ceo`.

    Args:
        comparison: Results of both.
        task: Any task but a perplexity.
        variant: The variant to hold against the unchanged model.
        numbers: A number for each tag, such as how often training shows it or the rank of that.

    Raises:
        TaskError: If the task or variant does not exist, it is a perplexity, an id has no slash,
            or a tag has no number.
    """
    groups: dict[str, list[tuple[ItemResult, ItemResult]]] = {}
    for pair in _pairs(comparison, task, variant):
        tag, slash, _ = pair[0].id.rpartition("/")
        if not slash:
            raise TaskError(
                f"task {task!r}: item {pair[0].id!r} has no tag; ids must be 'tag/rest'"
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
        ordered = sorted(tags, key=lambda one: one.change.value)
        return TagChanges(task, variant, tuple(ordered))
    ordered = sorted(tags, key=lambda one: numbers[one.tag])
    changes = np.array([one.change.value for one in ordered])
    given = np.array([numbers[one.tag] for one in ordered], np.float64)
    return TagChanges(
        task,
        variant,
        tuple(ordered),
        correlation(changes, given, ranks=True),
        permutation_p(changes, given, seed=comparison.seed),
    )


def _change(
    comparison: Comparison, tag: str, pairs: list[tuple[ItemResult, ItemResult]], metric: str
) -> TagChange:
    before, after = (
        np.array([one.scores[metric] for one in side]) for side in zip(*pairs, strict=True)
    )
    weights = np.array([one.weight for one, _ in pairs], np.float64)
    draws = resample_counts(len(pairs), comparison.resamples, comparison.seed)
    ratio = paired_ratio(after, before, draws, weights)
    return TagChange(
        tag=tag,
        before=float(weights @ before / weights.sum()),
        change=paired_difference(after, before, draws, weights),
        relative=Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1, ratio.n),
    )


def _pairs(comparison: Comparison, task: str, variant: str) -> list[tuple[ItemResult, ItemResult]]:
    """Each item under the unchanged model and under a variant."""
    for what, name, known in (
        ("task", task, list(comparison.tasks)),
        ("variant", variant, comparison.variants),
    ):
        if name not in known:
            raise TaskError(f"the comparison has no {what} {name!r}; it has {', '.join(known)}")
    before, after = (comparison.results[name][task] for name in (BASELINE, variant))
    return list(zip(before, after, strict=True))
