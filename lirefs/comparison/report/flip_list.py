"""The flipped items that a page lists."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.item_changes import flips
from lirefs.comparison.report.words_diff import words_diff

MOST_FLIPS = 5000
"""Most flipped items on a page: the first ones of each task and variant."""
MOST_CHARACTERS = 4000
"""Longest text of a flipped item; of a longer one the middle is left out."""
_SHORTEST_SHARED = 80


@dataclass(frozen=True)
class FlipList:
    """Flipped items for the script of a page, as JSON values: `shown` of `total`.

    Of each task and variant there are at most `each`.
    """

    total: int
    shown: int
    each: int
    data: dict[str, Any]


def flip_list(comparison: Comparison) -> FlipList:
    """The flipped items of a comparison; each prompt stands once, not once for every variant.

    The answers stand word by word, see `words_diff`.
    """
    tasks, variants = list(comparison.tasks), comparison.variants[1:]
    listed, sizes = {}, []
    for task, variant in itertools.product(tasks, variants):
        some = flips(comparison, task, variant)
        listed[task, variant] = some[:MOST_FLIPS]
        sizes.append(len(some))
    # The largest number of each with which all fit on the page.
    numbers = range(1, max(sizes, default=0) + 1)
    each = bisect_right(numbers, MOST_FLIPS, key=lambda most: sum(min(n, most) for n in sizes))
    asked = comparison.results[BASELINE]
    shared = {task: shared_beginning([item.prompt for item in asked[task]]) for task in tasks}
    items: dict[tuple[str, ...], int] = {}
    rows = []
    for (task, variant), some in listed.items():
        for one in some[:each]:
            rest = one.prompt[len(shared[task]) :]
            item = items.setdefault((task, one.id, rest, one.expected, one.before), len(items))
            parts = words_diff(_cut(one.before), _cut(one.after))
            rows.append([item, variants.index(variant), int(one.gained), parts])
    data = {
        "tasks": tasks,
        "variants": variants,
        "shared": [_cut(shared[task]) for task in tasks],
        "items": [[tasks.index(task), name, *map(_cut, texts)] for task, name, *texts in items],
        "flips": rows,
    }
    return FlipList(sum(sizes), len(rows), each, data)


def shared_beginning(prompts: Sequence[str]) -> str:
    """The lines that all prompts begin with (few-shot examples); empty where they are short."""
    if len(prompts) < 2:
        return ""
    first, last = (one.split("\n")[:-1] for one in (min(prompts), max(prompts)))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = "".join(f"{line}\n" for line, _ in same)  # what first and last share, all share
    return shared if len(shared) >= _SHORTEST_SHARED else ""


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters left out ...] {text[-half:]}"
