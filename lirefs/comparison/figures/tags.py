"""Changes by tag as a figure."""

from __future__ import annotations

import math

import numpy as np

from lirefs.comparison.item_changes import TagChanges
from lirefs.pictures import COLOURS, Picture, canvas_of, literal_text, picture_of, shortened, styled

MOST = 120
"""Most tags in a figure."""
_LONGEST = 40
"""Characters in a name."""
HIGHEST = 100.0
"""Relative changes are cut at this percentage: a tag with a low score before can double."""


@styled
def tag_bars(found: TagChanges) -> Picture:
    """Relative change of each tag in their order, with intervals (K-FAC paper, figure 5).

    Of more than `MOST` tags the first and the last are shown.
    """
    half, n = MOST // 2, len(found.tags)
    tags = found.tags if n <= MOST else (*found.tags[:half], *found.tags[-half:])
    canvas, (axis,) = canvas_of(1, (7.5, 1.3 + 0.3 * len(tags)))
    rows = np.arange(len(tags))[::-1]
    finite = [one for one in tags if math.isfinite(one.relative.value)]
    ends = [100 * end for one in finite for end in (one.relative.low, one.relative.high, 0.0)]
    low, high = min(ends, default=-1.0), min(max(ends, default=1.0), HIGHEST)
    margin = 0.05 * max(high - low, 1.0)
    for row, one in zip(rows, tags, strict=True):
        note = f"{one.before:.2f}, n = {one.change.n}"
        axis.text(high + margin, row, note, fontsize=7, va="center")
        if not math.isfinite(one.relative.value):
            axis.text(0, row, " n/a", fontsize=7, va="center")
            continue
        found_ends = (one.relative.low, one.relative.value, one.relative.high)
        left, value, right = (min(100 * end, high) for end in found_ends)
        errors = np.maximum([[value - left], [right - value]], 0)
        axis.barh(row, value, 0.7, color=COLOURS[1] if value < 0 else COLOURS[2])
        axis.errorbar(value, row, xerr=errors, fmt="none", ecolor="black", lw=0.9, capsize=2)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(rows, [literal_text(shortened(one.tag, _LONGEST)) for one in tags])
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set(xlabel="change of the score, % of the unchanged model's")
    axis.set_xlim(low - margin, high + 5.5 * margin)
    task, variant = (shortened(one, _LONGEST) for one in (found.task, found.variant))
    title = f"{task} under {variant}; right: unchanged score"
    title += f"\nthe first and the last {half} of {n} tags" if n > MOST else ""
    if found.spearman is not None:
        title += f"\nSpearman of change and order {found.spearman:.2f}, p = {found.p_value:.3f}"
    axis.set_title(literal_text(title), fontsize=9)
    return picture_of(canvas)
