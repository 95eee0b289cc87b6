"""Items whose answer turned right or wrong under a variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lirefs.harness.comparison import Comparison


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
    """
    metric = comparison.tasks[task].metric
    before, after = (comparison.results[name][task] for name in (comparison.variants[0], variant))
    pairs = [
        (one, other, one.scores.get(metric), other.scores.get(metric))
        for one, other in zip(before, after, strict=True)
    ]
    if not {score for *_, first, second in pairs for score in (first, second)} <= {0.0, 1.0}:
        return []
    return [
        Flip(one.id, one.prompt, one.expected, one.output, other.output, second == 1.0)
        for one, other, first, second in pairs
        if first != second
    ]
