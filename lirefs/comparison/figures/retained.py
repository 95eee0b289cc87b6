"""Figures of retained performance: dots with intervals, panels side by side."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lirefs.comparison.cell import LEVEL
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.summary import Summary
from lirefs.pictures import COLOURS, SMALL, WIDE, Picture, canvas_of, literal_text, picture_of
from lirefs.statistics.intervals import Estimate

_ROW = 0.165
"""Height of a row in inches; characters of 7 pt are 0.1 high."""
_CHARACTER = 0.057
"""Mean width in inches of a character of 7 pt."""
_LONGEST = 34
"""Characters in the name of a row."""
_TURNED = 18
"""Characters in a line of a turned heading."""


@dataclass(frozen=True)
class _Mark:
    """One retained share: a filled dot, or a hollow one where the change is not clear."""

    share: Estimate
    colour: str
    filled: bool = True


def retained_figures(summary: Summary) -> list[Figure]:
    """The figures of every report: retained performance by task group and by task."""
    if len(summary.variants) < 2 or not any(summary.groups.values()):
        return []  # nothing was changed, or there is nothing to retain
    drawn = (
        "Share of the unchanged model's score (line at 1: no change); for language, the unchanged "
        "perplexity over the variant's. Bars: 95 % intervals, paired over items. Arrows lie beyond "
        "the axis. Tasks on which the unchanged model is not above chance are left out"
    )
    return [
        Figure(
            "retained",
            "Retained performance by task group",
            f"Mean over the tasks of a group. {drawn}; n counts the items of the others.",
            retained_by_group(summary),
        ),
        Figure(
            "retained_tasks",
            "Retained performance by task",
            "Filled dots: the difference from the unchanged model is clear, p < "
            f"{LEVEL:g} after Holm's adjustment; hollow dots: it is not. In brackets: "
            f"number of items. {drawn}.",
            retained_by_task(summary),
        ),
    ]


def retained_by_group(summary: Summary) -> Picture:
    """Retained share of the unchanged model's performance: a row per variant, a panel per group.

    Groups and their means follow the K-FAC paper (Merullo et al. 2025, Figure 3).
    """
    base, *variants = summary.variants
    colours = dict(zip(summary.groups, itertools.cycle(COLOURS), strict=False))
    marks = [
        [_Mark(summary.means[variant, group], colour) for group, colour in colours.items()]
        for variant in variants
    ]
    heads = [f"{group}\nn = {summary.means[base, group].n}" for group in summary.groups]
    return _grid(variants, marks, heads, empty="n/a")


def retained_by_task(summary: Summary) -> Picture:
    """The same by task: a row per task, a panel per variant (K-FAC paper, Figure 3).

    A dot is filled where the difference from the unchanged model is clear, see `Cell.clear`.
    """
    rows: list[str] = []
    marks: list[list[_Mark]] = []
    for (group, tasks), colour in zip(
        summary.groups.items(), itertools.cycle(COLOURS), strict=False
    ):
        if tasks:
            rows.append(group)
            marks.append([])
        for task in tasks:
            _, *cells = summary.of_task(task)
            name = textwrap.shorten(task, _LONGEST, placeholder="…")
            rows.append(f"{name} ({cells[0].value.n})")
            marks.append([_Mark(one.retained, colour, one.clear) for one in cells if one.retained])
    return _grid(rows, marks, summary.variants[1:])


def _grid(
    rows: Sequence[str], marks: Sequence[Sequence[_Mark]], columns: Sequence[str], empty: str = ""
) -> Picture:
    """Panels side by side with the same rows; a row without marks is a heading."""
    names = max(map(len, rows), default=1) * _CHARACTER
    heads, turned = _headings(columns, (WIDE - names - 0.3) / len(columns) - 0.08)
    lines = [one.split("\n") for one in heads]
    above = max(len(line) for one in lines for line in one) if turned else 2 * max(map(len, lines))
    height = 0.65 + _ROW * len(rows) + _CHARACTER * above
    canvas, axes = canvas_of(len(columns), (WIDE, height))
    highest = [one.share.high for row in marks for one in row]
    top = min(1.6, max(1.1, 1.05 * max(filter(math.isfinite, highest), default=1.0)))
    ticks = [0, 0.5, 1] if len(columns) <= 6 else [0, 1]
    for panel, (axis, head) in enumerate(zip(axes, heads, strict=True)):
        axis.axvline(1, color="black", lw=0.7, zorder=0)
        axis.hlines(range(len(rows)), -0.05, top, color="#e6e6e6", lw=0.5, zorder=-1)
        _draw(axis, {place: row[panel] for place, row in enumerate(marks) if row}, top, empty)
        for place, row in enumerate(marks):
            if not row:
                axis.axhspan(place - 0.5, place + 0.5, color="#f0f0f0", lw=0, zorder=1)
        axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.05, top))
        axis.set_xticks(ticks, [f"{one:g}" for one in ticks])
        axis.set_yticks([])
        turn = {"rotation": 90, "multialignment": "left"} if turned else {}
        axis.set_title(literal_text(head), fontsize=SMALL, **turn)
    axes[0].set_yticks(range(len(rows)), map(literal_text, rows))
    axes[0].tick_params(axis="y", length=0)
    for label, row in zip(axes[0].get_yticklabels(), marks, strict=True):
        label.set_fontweight("normal" if row else "bold")
    canvas.supxlabel("share of the unchanged model's score", fontsize=8)
    return picture_of(canvas)


def _draw(axis: Any, marks: Mapping[int, _Mark], top: float, empty: str) -> None:
    """Marks of a panel by their row: intervals, and dots or, beyond the axis, arrows."""
    shown = {place: one for place, one in marks.items() if math.isfinite(one.share.value)}
    for place in marks.keys() - shown.keys():
        axis.text(0.03, place, empty, fontsize=SMALL, va="center", color="#555555")
    values = np.array([one.share.value for one in shown.values()])
    ends = np.array([(one.share.low, one.share.high) for one in shown.values()]).reshape(-1, 2)
    places, colours = np.array(list(shown)), np.array([one.colour for one in shown.values()])
    inner = np.where([one.filled for one in shown.values()], colours, "white")
    low, high = np.nan_to_num(np.clip(ends, 0, top), nan=0.0).T
    axis.hlines(places, low, high, color=colours, lw=1.1, zorder=2)
    beyond, below = values > top, values < 0
    style = {"s": 13, "linewidths": 0.9, "clip_on": False, "zorder": 3}
    for shape, chosen in (("o", ~(beyond | below)), (">", beyond), ("<", below)):
        x, y = np.clip(values[chosen], 0, top), places[chosen]
        paint = {"c": inner[chosen], "edgecolors": colours[chosen]}
        axis.scatter(x, y, marker=shape, **paint, **style)


def _headings(columns: Sequence[str], inches: float) -> tuple[list[str], bool]:
    """Headings wrapped to the width of a panel, or turned where a word is longer than that."""
    words = [word for column in columns for word in column.split()]
    width = int(inches / _CHARACTER)
    turned = max(map(len, words), default=0) > width
    width = _TURNED if turned else width
    heads = ["\n".join(textwrap.fill(line, width) for line in one.split("\n")) for one in columns]
    return heads, turned
