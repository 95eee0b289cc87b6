"""Figures of retained performance: dots with intervals, one panel beside the other."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.report.tables import clear
from lirefs.pictures import COLOURS, SMALL, WIDE, Picture, canvas_of, literal, picture_of
from lirefs.statistics.intervals import Estimate

_ROW = 0.165
"""Height of a row in inches; a letter of 7 pt has 0.1."""
_LETTER = 0.057
"""Mean width in inches of a letter of 7 pt."""
_LONGEST = 34
"""Letters of a row's name."""
_TURNED = 18
"""Letters of a line of a turned heading."""


@dataclass(frozen=True)
class _Mark:
    """One retained share: filled, or hollow where it does not tell itself from no change."""

    share: Estimate
    colour: str
    filled: bool = True


def by_group(comparison: Comparison) -> Picture:
    """Retained share of the unchanged model's performance: a row a variant, a panel a group.

    Groups and their means follow the K-FAC paper (Merullo et al. 2025, Figure 3).
    """
    variants, groups = comparison.variants[1:], comparison.groups
    marks = [
        [_Mark(comparison.retained(variant, group), _colour(groups, group)) for group in groups]
        for variant in variants
    ]
    heads = [f"{group}\nn = {comparison.retained(BASELINE, group).n}" for group in groups]
    return _grid(variants, marks, heads, empty="n/a")


def by_task(comparison: Comparison) -> Picture:
    """The same task by task: a row a task, a panel a variant (K-FAC paper, Figure 3).

    A dot is filled where the difference from the unchanged model is clear, see `tables.clear`.
    """
    variants, groups = comparison.variants[1:], comparison.groups
    rows: list[str] = []
    marks: list[Sequence[_Mark | None]] = []
    for group in groups:
        if not comparison.counted(group):
            continue
        rows.append(group)
        marks.append([])
        for task in comparison.counted(group):
            cells = [comparison.cell(variant, task) for variant in variants]
            name = textwrap.shorten(task, _LONGEST, placeholder="…")
            rows.append(f"{name} ({cells[0].value.n})")
            marks.append(
                [
                    _Mark(cell.retained, _colour(groups, group), clear(cell))
                    if cell.retained
                    else None
                    for cell in cells
                ]
            )
    return _grid(rows, marks, variants)


def _colour(groups: Sequence[str], group: str) -> str:
    return COLOURS[groups.index(group) % len(COLOURS)]


def _grid(
    rows: Sequence[str],
    marks: Sequence[Sequence[_Mark | None]],
    columns: Sequence[str],
    empty: str = "",
) -> Picture:
    """Panels side by side with the same rows; a row without marks is a heading."""
    names = max(map(len, rows), default=1) * _LETTER
    heads, turned = _headings(columns, (WIDE - names - 0.3) / len(columns) - 0.08)
    lines = [one.split("\n") for one in heads]
    above = max(len(line) for one in lines for line in one) if turned else 2 * max(map(len, lines))
    height = 0.65 + _ROW * len(rows) + _LETTER * above
    canvas, axes = canvas_of(len(columns), (WIDE, height))
    highest = [one.share.high for row in marks for one in row if one is not None]
    top = min(1.6, max(1.1, 1.05 * max(filter(math.isfinite, highest), default=1.0)))
    for panel, (axis, head) in enumerate(zip(axes, heads, strict=True)):
        axis.axvline(1, color="black", lw=0.7, zorder=0)
        axis.hlines(range(len(rows)), -0.05, top, color="#e6e6e6", lw=0.5, zorder=-1)
        _draw(axis, {place: row[panel] for place, row in enumerate(marks) if row}, top, empty)
        for place, row in enumerate(marks):
            if not row:
                axis.axhspan(place - 0.5, place + 0.5, color="#f0f0f0", lw=0, zorder=1)
        axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.05, top))
        axis.set_xticks([0, 0.5, 1] if len(columns) <= 6 else [0, 1])
        axis.set_xticklabels(["0", "0.5", "1"] if len(columns) <= 6 else ["0", "1"])
        axis.set_yticks([])
        turn = {"rotation": 90, "multialignment": "left"} if turned else {}
        axis.set_title(literal(head), fontsize=SMALL, **turn)
    axes[0].set_yticks(range(len(rows)), map(literal, rows))
    axes[0].tick_params(axis="y", length=0)
    for label, row in zip(axes[0].get_yticklabels(), marks, strict=True):
        label.set_fontweight("normal" if row else "bold")
    canvas.supxlabel("share of the unchanged model's score", fontsize=8)
    return picture_of(canvas)


def _draw(axis: Any, marks: Mapping[int, _Mark | None], top: float, empty: str) -> None:
    """Marks of a panel by their row: intervals, and dots or, beyond the axis, arrows."""
    shown = {place: one for place, one in marks.items() if one and math.isfinite(one.share.value)}
    for place in marks.keys() - shown.keys():
        axis.text(0.03, place, empty, fontsize=SMALL, va="center", color="#555555")
    values = np.array([one.share.value for one in shown.values()])
    ends = np.array([(one.share.low, one.share.high) for one in shown.values()]).reshape(-1, 2)
    places, colours = np.array(list(shown)), np.array([one.colour for one in shown.values()])
    inner = np.where([one.filled for one in shown.values()], colours, "white")
    low, high = np.nan_to_num(np.clip(ends, 0, top), nan=0.0).T
    axis.hlines(places, low, high, color=colours, lw=1.1, zorder=2)
    for shape, chosen in (
        ("o", (values >= 0) & (values <= top)),
        (">", values > top),
        ("<", values < 0),
    ):
        axis.scatter(
            np.clip(values[chosen], 0, top),
            places[chosen],
            s=13,
            marker=shape,
            c=inner[chosen],
            edgecolors=colours[chosen],
            linewidths=0.9,
            clip_on=False,
            zorder=3,
        )


def _headings(columns: Sequence[str], inches: float) -> tuple[list[str], bool]:
    """Headings wrapped to the width of a panel, or turned where a word is longer than that."""
    letters = int(inches / _LETTER)
    words = [word for column in columns for word in column.split()]
    turned = max(map(len, words), default=0) > letters
    letters = _TURNED if turned else letters
    return [
        "\n".join(textwrap.fill(line, letters) for line in one.split("\n")) for one in columns
    ], turned
