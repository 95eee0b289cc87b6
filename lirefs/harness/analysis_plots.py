"""Figures of analyses: changes by tag, and the spectrum of tasks seen from both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lirefs.harness.analyses import TagChanges
from lirefs.harness.plots import COLOURS, Picture, canvas_of, literal, picture_of
from lirefs.harness.tasks import CONFLICT, GROUPS
from lirefs.statistics import Estimate

MARKERS = "osD^vP*"
HIGHEST = 100.0
"""Per cent at which relative changes are cut: a tag of which little was known can double."""


@dataclass(frozen=True)
class TaskPosition:
    """Where a task lies between recitation and reasoning, seen from activations and curvature.

    Attributes:
        task: The task.
        group: Its group.
        projection: Mean projection on the LiReF, -0.5 at the mean of memory questions and 0.5 at
            that of reasoning questions.
        flat: Mean share of input energy in flat directions of the curvature.
    """

    task: str
    group: str
    projection: Estimate
    flat: Estimate


def tag_bars(found: TagChanges) -> Picture:
    """Relative change of each tag in their order, with intervals (K-FAC paper, figure 5)."""
    canvas, (axis,) = canvas_of(1, (7.5, 1.3 + 0.3 * len(found.tags)))
    rows = np.arange(len(found.tags))[::-1]
    finite = [one for one in found.tags if math.isfinite(one.relative.value)]
    ends = [100 * end for one in finite for end in (one.relative.low, one.relative.high, 0.0)]
    low, high = min(ends, default=-1.0), min(max(ends, default=1.0), HIGHEST)
    margin = 0.05 * max(high - low, 1.0)
    for row, one in zip(rows, found.tags, strict=True):
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
    axis.set_yticks(rows, [literal(one.tag) for one in found.tags])
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set(xlabel="change of the score, % of the unchanged model's")
    axis.set_xlim(low - margin, high + 5.5 * margin)
    title = f"{found.task} under {found.variant}; right: unchanged score"
    if found.spearman is not None:
        title += f"\nSpearman of change and order {found.spearman:.2f}, p = {found.p_value:.3f}"
    axis.set_title(literal(title), fontsize=9)
    return picture_of(canvas)


def two_sided_spectrum(positions: Sequence[TaskPosition], title: str) -> Picture:
    """Each task by its projection on the LiReF and its share of flat input energy, intervals."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    canvas, (axis,) = canvas_of(1, (8.5, 5.6))
    present = list(dict.fromkeys(one.group for one in positions))
    known = [group for group in (*GROUPS, CONFLICT) if group in present]
    groups = known + [group for group in present if group not in known]
    for index, group in enumerate(groups):
        own = [one for one in positions if one.group == group]
        x, y = ([getattr(one, side) for one in own] for side in ("projection", "flat"))
        axis.errorbar(
            [one.value for one in x],
            [one.value for one in y],
            xerr=_errors(x),
            yerr=_errors(y),
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            ms=5,
            lw=0.9,
            label=literal(group),
        )
    for at, word in ((-0.5, "memory"), (0.5, "reasoning")):
        axis.axvline(at, color="black", lw=0.6, ls=":")
        axis.annotate(
            f"{word}\nquestions",
            (at, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=7,
        )
    # Recited text lies far above the rest, which a linear scale would press into a line.
    axis.set_yscale("log")
    axis.yaxis.set(
        major_locator=MaxNLocator(10),
        minor_locator=NullLocator(),
        major_formatter=ScalarFormatter(),
    )
    axis.margins(0.12)
    axis.set(
        xlabel="projection of the last prompt token on the LiReF, in class distances",
        ylabel="share of input energy in flat directions (log scale)",
    )
    axis.set_title(literal(title), fontsize=9, pad=24)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _label(canvas, axis, positions)
    return picture_of(canvas)


def _errors(found: Sequence[Estimate]) -> Any:
    sides = [(one.value - one.low, one.high - one.value) for one in found]
    return np.maximum(np.array(sides).T, 0)


def _label(canvas: Any, axis: Any, positions: Sequence[TaskPosition]) -> None:
    """Name each point where its name covers no other name and no point, as near as there is."""
    from matplotlib.text import Text

    canvas.draw_without_rendering()
    renderer = canvas.canvas.get_renderer()
    points = [axis.transData.transform((one.projection.value, one.flat.value)) for one in positions]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    scale = canvas.dpi / 72
    for (x, y), one in zip(points, positions, strict=True):
        text = axis.annotate(
            literal(one.task),
            (one.projection.value, one.flat.value),
            (0, 0),
            textcoords="offset points",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "shrinkA": 0, "shrinkB": 2},
        )
        extent = Text.get_window_extent(text, renderer)  # without the line to the point
        places = [
            (dx, dy)
            for far in (1, 2, 3, 4, 6, 8)
            for dx, dy in (
                (7, 4 * far),
                (7, -10 * far),
                (-7 - extent.width / scale, 4 * far),
                (-7 - extent.width / scale, -10 * far),
                (-extent.width / scale / 2, 8 * far),
                (-extent.width / scale / 2, -14 * far),
            )
        ]

        def box(place: tuple[float, float], at: Any = (x, y), size: Any = extent) -> Any:
            left, bottom = at[0] + place[0] * scale, at[1] + place[1] * scale
            return left, bottom, left + size.width, bottom + size.height

        best = min(places, key=lambda place: sum(_overlap(box(place), other) for other in boxes))
        text.set_position(best)
        boxes.append(box(best))


def _overlap(one: Any, other: Any) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, float(width)) * max(0.0, float(height))
