"""Figures of retained performance: dots with intervals."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.comparison.cell import LEVEL
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.summary import Summary
from lirefs.pictures import (
    COLOURS,
    SMALL,
    WIDE,
    Picture,
    canvas_of,
    literal_text,
    picture_of,
    shortened,
    styled,
)
from lirefs.statistics.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_DOT = 0.075
"""Height in inches between the dots of one variant."""
_ROW = 0.165
"""Height of a row in inches; characters of 7 pt are 0.1 high."""
_CHARACTER = 0.057
"""Mean width in inches of a character of 7 pt."""
_LONGEST = 34
"""Characters in the name of a row."""
_LONGEST_VARIANT = 48
"""Characters in the name of a variant."""
_MOST_ROWS, _MOST_PANELS = 120, 24
"""Most rows, and panels side by side, that are drawn; captions say what is left out."""
_TURNED = 18
"""Characters in a line of a turned heading."""
_ACROSS = 6
"""Most panels side by side that are wide enough to be read."""
_PAGE = 9.9
"""Height of a page in inches."""


@dataclass(frozen=True)
class _Mark:
    """One retained share: solid for a method, hollow for a control, faint if it is not clear."""

    share: Estimate
    colour: str
    hollow: bool = False
    faint: bool = False


def retained_figures(summary: Summary) -> list[Figure]:
    """The figures of every report: retained performance by task group and by task."""
    if len(summary.variants) < 2 or not any(summary.groups.values()):
        return []  # nothing was changed, or there is nothing to retain
    tasks = [task for some in summary.groups.values() for task in some]
    by_group = [summary.means[v, g] for v in summary.variants[1:] for g in summary.groups]
    cells = [summary.cells[v, task] for v in summary.variants[1:] for task in tasks]
    by_task = [one.retained for one in cells if one.retained is not None]
    arrows = " Arrows point to values beyond the axis."
    drawn = (
        "Share of the unchanged model's score, which is the line at 100 %; for language, the "
        "unchanged perplexity over the variant's. Solid: methods; hollow: controls. Bars: 95 % "
        "intervals, paired over items. Tasks on which the unchanged model is not above chance are "
        "left out"
    )
    missing = summary.not_finite()
    missing = f" {missing}" if missing else ""
    n = len(summary.variants) - 1
    left_out = _first(_MOST_ROWS, n, "variants")
    left_out_of_tasks = _first(_MOST_PANELS, n, "variants") + _first(
        _MOST_ROWS, len(tasks), "tasks"
    )
    return [
        Figure(
            "retained",
            "Retained performance by task group",
            f"Mean over the tasks of a group. {drawn}; n counts the items of the others."
            f"{arrows if _beyond(by_group) else ''}{left_out}{missing}",
            retained_by_group(summary),
            retained_by_group(summary, dark=True),
        ),
        Figure(
            "retained_tasks",
            "Retained performance by task",
            f"{drawn}. Faint: the difference from the unchanged model is not clear, p >= "
            f"{LEVEL:g} after Holm's adjustment. In brackets: number of items."
            f"{arrows if _beyond(by_task) else ''}{left_out_of_tasks}{missing}",
            retained_by_task(summary),
        ),
    ]


def _first(most: int, n: int, what: str) -> str:
    """For a caption, if not all fit into the figure."""
    return f" Shown are the first {most} of {n} {what}; the tables have all." if n > most else ""


def retained_by_group(summary: Summary, *, dark: bool = False) -> Picture:
    """`draw_retained` as a picture."""
    return picture_of(draw_retained(summary), dark=dark)


@styled
def draw_retained(summary: Summary) -> Canvas:
    """Retained share of the unchanged model's performance: a row per variant, a dot per group.

    As the K-FAC paper's Figure 3 (Merullo et al. 2025): task groups are colours, and the unchanged
    model is a line. Controls stand below the methods, and their dots are hollow.
    """
    rows = _methods_first(summary)[:_MOST_ROWS]
    groups = dict(zip(summary.groups, itertools.cycle(COLOURS), strict=False))
    height = max(0.2, min(_DOT * (len(groups) + 1), 7 / len(rows)))
    canvas, (axis,) = canvas_of(1, (WIDE, 1.0 + height * len(rows)))
    shares = {(v, g): summary.means[v, g] for v in rows for g in groups}
    top = _end_of_axis(shares.values())
    for row, variant in enumerate(rows):
        if row % 2 == 0:
            axis.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", lw=0, zorder=-2)
        hollow = variant in summary.controls
        shift = np.linspace(-0.5, 0.5, len(groups) + 2)[1:-1]
        marks = {
            row + at: _Mark(shares[variant, group], colour, hollow)
            for at, (group, colour) in zip(shift, groups.items(), strict=True)
        }
        _draw(axis, marks, top)
    axis.axvline(1, color="black", lw=1, zorder=0)
    methods = sum(row not in summary.controls for row in rows)
    if 0 < methods < len(rows):
        axis.axhline(methods - 0.5, color="black", lw=0.6, ls=":", zorder=0)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.02, top))
    names = (literal_text(shortened(row, _LONGEST_VARIANT)) for row in rows)
    axis.set_yticks(range(len(rows)), names)
    axis.tick_params(axis="y", length=0)
    ticks = np.arange(0, top, 0.2)
    axis.set_xticks(ticks, [f"{100 * one:.0f} %" for one in ticks])
    axis.set_xlabel("share of the unchanged model's score")
    base, style = summary.variants[0], {"marker": "o", "ls": "none", "ms": 4.5}
    for group, colour in groups.items():
        name = shortened(group, _LONGEST)
        label = literal_text(f"{name}, n = {summary.means[base, group].n}")
        axis.plot([], [], color=colour, label=label, **style)
    if summary.controls:
        axis.plot([], [], color="black", label="method", **style)
        axis.plot([], [], color="black", mfc="white", label="control", **style)
    axis.plot([], [], color="black", lw=1, label="unchanged model")
    canvas.legend(loc="outside upper center", ncols=3)
    return canvas


def _methods_first(summary: Summary) -> list[str]:
    """Every variant but the unchanged model, controls after the others."""
    return summary.methods_first[1:]


def _beyond(shares: Sequence[Estimate]) -> bool:
    """Whether a share lies outside the axis, and is drawn as an arrow."""
    return any(one.value < 0 or one.value > _end_of_axis(shares) for one in shares)


def _end_of_axis(shares: Iterable[Estimate]) -> float:
    highest = [one.high for one in shares if math.isfinite(one.high)]
    return min(1.6, max(1.1, 1.05 * max(highest, default=1.0)))


@styled
def retained_by_task(summary: Summary) -> Picture:
    """The same by task: a row per task, a panel per variant.

    A dot is faint where the difference from the unchanged model is not clear, see `Cell.clear`.
    """
    rows: list[str] = []
    marks: list[list[_Mark]] = []
    variants = _methods_first(summary)[:_MOST_PANELS]
    spare = _MOST_ROWS
    for (group, tasks), colour in zip(
        summary.groups.items(), itertools.cycle(COLOURS), strict=False
    ):
        tasks, spare = tasks[:spare], max(0, spare - len(tasks))
        if tasks:
            rows.append(shortened(group, _LONGEST))
            marks.append([])
        for task in tasks:
            cells = [summary.cells[variant, task] for variant in variants]
            rows.append(f"{shortened(task, _LONGEST)} ({cells[0].value.n})")
            marks.append(
                [
                    _Mark(one.retained, colour, one.variant in summary.controls, not one.clear)
                    for one in cells
                    if one.retained
                ]
            )
    return _grid(rows, marks, [shortened(one, _LONGEST_VARIANT) for one in variants])


def _grid(rows: Sequence[str], marks: Sequence[Sequence[_Mark]], columns: Sequence[str]) -> Picture:
    """Panels with the same rows, in two lines if many; a row without marks is a heading."""
    names = max(map(len, rows), default=1) * _CHARACTER
    lines, across = 1, len(columns)
    heads, turned, height = _heights(rows, columns, names, across)
    if across > _ACROSS:
        half = -(-across // 2)
        wider = _heights(rows, columns, names, half)
        if 2 * wider[2] <= _PAGE:
            (heads, turned, height), lines, across = wider, 2, half
    canvas, axes = canvas_of(across, (WIDE, lines * height), rows=lines)
    for spare in axes[len(columns) :]:
        spare.remove()
    top = _end_of_axis(one.share for row in marks for one in row)
    ticks = [0, 0.5, 1] if across <= _ACROSS else [0, 1] if across <= 3 * _ACROSS else [1]
    for panel, (axis, head) in enumerate(zip(axes, heads, strict=False)):
        axis.axvline(1, color="black", lw=0.7, zorder=0)
        axis.hlines(range(len(rows)), -0.05, top, color="#e6e6e6", lw=0.5, zorder=-1)
        _draw(axis, {place: row[panel] for place, row in enumerate(marks) if row}, top)
        for place, row in enumerate(marks):
            if not row:
                axis.axhspan(place - 0.5, place + 0.5, color="#f0f0f0", lw=0, zorder=-1)
        axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.05, top))
        axis.set_xticks(ticks, [f"{100 * one:g}" for one in ticks])
        axis.set_yticks([])
        turn = {"rotation": 90, "multialignment": "left"} if turned else {}
        axis.set_title(literal_text(head), fontsize=SMALL, **turn)
        if panel % across == 0:
            axis.set_yticks(range(len(rows)), map(literal_text, rows))
            axis.tick_params(axis="y", length=0)
            for label, row in zip(axis.get_yticklabels(), marks, strict=True):
                label.set_fontweight("normal" if row else "bold")
    canvas.supxlabel("share of the unchanged model's score, %", fontsize=8)
    return picture_of(canvas)


def _heights(
    rows: Sequence[str], columns: Sequence[str], names: float, across: int
) -> tuple[list[str], bool, float]:
    """Headings of panels of which `across` are side by side, whether turned, and their height."""
    heads, turned = _headings(columns, (WIDE - names - 0.3) / across - 0.08)
    lines = [one.split("\n") for one in heads]
    above = max(len(line) for one in lines for line in one) if turned else 2 * max(map(len, lines))
    return heads, turned, 0.65 + _ROW * len(rows) + _CHARACTER * above


def _draw(axis: Any, marks: Mapping[float, _Mark], top: float) -> None:
    """Marks of a panel by their row: intervals, and dots or, beyond the axis, arrows."""
    from matplotlib.colors import to_rgba_array

    shown = {place: one for place, one in marks.items() if math.isfinite(one.share.value)}
    values = np.array([one.share.value for one in shown.values()])
    ends = np.array([(one.share.low, one.share.high) for one in shown.values()]).reshape(-1, 2)
    places = np.array(list(shown))
    colours = to_rgba_array([one.colour for one in shown.values()])
    faint = np.array([one.faint for one in shown.values()], dtype=bool)
    # Paler, not transparent, so that the line behind does not show through.
    colours[faint, :3] = 1 - 0.4 * (1 - colours[faint, :3])
    hollow = np.array([one.hollow for one in shown.values()], dtype=bool)
    inner = np.where(hollow[:, None], 1.0, colours)
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
