"""Figures of swept settings: score against damage, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lirefs.comparison.comparison import Comparison
from lirefs.comparison.sweeps import Curves, damage_of, matched, pareto_front
from lirefs.pictures import (
    COLOURS,
    Picture,
    canvas_of,
    legend_outside,
    literal_text,
    picture_of,
    shortened,
    styled,
)
from lirefs.statistics.intervals import Estimate, Floats

MARKERS = "osD^vPX*<>"
_LONGEST = 34
"""Characters in the name of a method."""


@styled
def pareto_fronts(
    comparison: Comparison,
    curves: Curves,
    task: str,
    by: str,
    labels: tuple[str, str],
    larger_is_better: bool = True,
) -> Picture:
    """Score against damage, a line with its 95 % band for each method, for one column of a page.

    Lines and bands are those of `matched`; filled markers are settings that no setting of any
    method dominates, hollow ones the others. Less damage is better.

    Args:
        comparison: Holds every variant.
        curves: The sweeps.
        task: Vertical axis.
        by: Horizontal axis, the measure of damage.
        labels: Labels of the two axes, horizontal first.
        larger_is_better: Whether a larger score on the task is better.
    """
    canvas, (axis,) = canvas_of(1, (3.4, 3.0))
    names = [name for curve in curves.values() for _, name in curve]
    damage = {name: damage_of(comparison, name, by) for name in names}
    score = {name: comparison.score(name, task) for name in names}
    sign = 1 if larger_is_better else -1
    points = [(-damage[name], sign * score[name]) for name in damage]
    front = dict(zip(damage, pareto_front(points), strict=True))
    base = comparison.variants[0]
    start = damage_of(comparison, base, by)
    for index, (method, curve) in enumerate(curves.items()):
        colour, marker, style = sweep_curve_style(index)
        # The settings themselves are among the goals, so that the line has all its corners.
        own = [start, *(damage[name] for _, name in curve)]
        own = [one for one in own if math.isfinite(one)] or [1.0]
        goals = np.unique([*np.linspace(min(own), max(own), 40), *own])
        line = sweep_table(matched(comparison, {method: curve}, task, by, goals.tolist())[method])
        axis.fill_between(goals, line[:, 1], line[:, 2], color=colour, alpha=0.18, lw=0)
        axis.plot(goals, line[:, 0], color=colour, lw=1.2, ls=style)
        label = literal_text(shortened(method, _LONGEST))
        axis.plot([], [], color=colour, lw=1.2, ls=style, marker=marker, ms=4.5, label=label)
        for _, name in curve:
            face = colour if front[name] else "white"
            axis.plot(damage[name], score[name], marker, color=colour, mfc=face, ms=4.5, mew=1)
    end = comparison.score(base, task)
    axis.plot(start, end, "*", color="black", ms=9, ls="none", label="unchanged", zorder=3)
    axis.set_xlabel(labels[0], fontsize=8)
    axis.set_ylabel(labels[1], fontsize=8)
    legend_outside(canvas, axis, 2, "upper")
    return picture_of(canvas)


def sweep_table(estimates: Sequence[Estimate]) -> Floats:
    """Values and the limits of their intervals, shape (n, 3)."""
    return np.array([(one.value, one.low, one.high) for one in estimates])


def sweep_curve_style(index: int) -> tuple[str, str, str]:
    """Colour, marker and line style of a curve; from the ninth on, curves are dashed."""
    style = "-" if index < len(COLOURS) else "--"
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], style
