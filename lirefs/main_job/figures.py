"""Figures of the main job: sweeps with their controls, layers, and transfer between forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lirefs.comparison.figures.sweeps import sweep_curve_style, sweep_table
from lirefs.comparison.summary import Summary
from lirefs.pictures import (
    COLOURS,
    SMALL,
    WIDE,
    Picture,
    canvas_of,
    legend_below,
    legend_outside,
    literal_text,
    picture_of,
    styled,
)
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import GROUPS


@styled
def keep_spectrum(
    summary: Summary, keeps: Mapping[str, float], tasks: Sequence[str], language: str
) -> Picture:
    """Scores on tasks, a line each, and perplexity below, as an edit keeps less and less.

    Colours are task groups, as in the figure of retained performance; tasks of one group differ
    in line and marker.

    Args:
        summary: Holds every variant; the unchanged model stands at keep = 1.
        keeps: Variant to the share of the curvature mass that it keeps.
        tasks: Their names.
        language: The task whose metric is perplexity.
    """
    canvas, (upper, lower) = canvas_of(1, (WIDE, 5.2), rows=2)
    upper.get_gridspec().set_height_ratios([4, 1])
    settings = {summary.variants[0]: 1.0, **keeps}
    order = sorted(settings, key=lambda name: -settings[name])
    removed = np.array([1 - settings[name] for name in order])
    used: Counter[str] = Counter()
    for task in tasks:
        group = summary.tasks[task].group
        colour = COLOURS[GROUPS.index(group) if group in GROUPS else 6]
        style = ("o-", "s--", "^:", "D-.")[used[group] % 4]
        face = "white" if used[group] % 2 else colour
        used[group] += 1
        values = _scores(summary, order, task)
        upper.vlines(removed, values[:, 1], values[:, 2], color=colour, lw=0.8, alpha=0.3)
        label = literal_text(f"{task} ({group})")
        upper.plot(removed, values[:, 0], style, color=colour, mfc=face, ms=4.5, label=label)
    costs = _scores(summary, order, language)[:, 0]
    lower.plot(removed, costs / costs[0], "o-", color="black", ms=3.5)
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter("{x:g}")
    for axis in (upper, lower):
        axis.set_xscale("symlog", linthresh=removed[removed > 0].min(), linscale=0.5)
        shown = [removed[0]]
        for value in removed[1:]:
            if shown[-1] == 0 or value >= 1.4 * shown[-1]:  # or the labels would touch
                shown.append(value)
        axis.set_xticks(shown, [f"{1 - value:g}" for value in shown])
        axis.set_xticks([], minor=True)
        axis.set_xlim(removed[0], 1.15 * removed[-1])
    upper.set(ylabel="share of items", ylim=(-0.03, 1.03))
    lower.set(ylabel="perplexity\nover unchanged", xlabel="share of the curvature mass kept")
    legend_outside(canvas, upper, 3, "upper")
    return picture_of(canvas)


@styled
def strength_effect(
    summary: Summary,
    steered: Mapping[float, str],
    controls: Sequence[Mapping[float, str]],
    tasks: Sequence[str],
) -> Picture:
    """Scores against steering strength, compared with random directions of the same norm.

    Strength to variant is given in `steered`, and in `controls` for each random direction; each
    task has a panel.
    """
    canvas, axes = canvas_of(len(tasks), (WIDE, 2.9))
    base = summary.variants[0]
    x = np.array([*steered, 0.0])  # strength 0 is the unchanged model
    order = np.argsort(x)
    for axis, task in zip(axes, tasks, strict=True):
        for number, control in enumerate(controls):
            shares = _scores(summary, [*control.values(), base], task)[order, 0]
            label = "random directions of the same norm" if number == 0 else None
            axis.plot(x[order], shares, color=COLOURS[6], lw=1, alpha=0.8, label=label)
        values = _scores(summary, [*steered.values(), base], task)[order]
        _line(axis, x[order], values, 0, "LiReF, 95 % interval")
        axis.axvline(0, color="black", lw=0.6, ls=":")
        axis.set(xlabel="strength a of h + a d", ylim=(-0.03, 1.03))
        n = summary.cells[base, task].value.n
        axis.set_title(literal_text(f"{task}, n = {n}"), fontsize=8)
    axes[0].set_ylabel("share of items")
    legend_outside(canvas, axes[0], 2, "lower")
    return picture_of(canvas)


@styled
def layer_effect(
    separation: Sequence[Estimate], effects: Mapping[str, Sequence[Estimate]]
) -> Picture:
    """Test AUROC at each layer, and named effects there as differences from random directions."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.0))
    layers = np.arange(len(separation))
    _line(left, layers, sweep_table(separation), 0, "test AUROC, 95 % interval")
    left.axhline(0.5, color="black", lw=0.6, ls=":")
    left.set(xlabel="layer", ylabel="AUROC", ylim=(0.4, 1.02), xticks=layers)
    legend_below(left, columns=1)
    for index, (name, values) in enumerate(effects.items()):
        _line(right, layers + 0.05 * index, sweep_table(values), index + 1, name)
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer steered", ylabel="LiReF minus random directions", xticks=layers)
    legend_below(right, columns=1)
    return picture_of(canvas)


@styled
def transfer_matrix(
    forms: Sequence[str],
    areas: Mapping[tuple[str, str], Estimate],
    cosines: Mapping[tuple[str, str], float],
) -> Picture:
    """AUROC of every form's direction on every form's questions, and cosines of the directions."""
    canvas, axes = canvas_of(2, (WIDE, 3.5))
    values = {pair: one.value for pair, one in areas.items()}
    panels = [
        (values, areas, "test AUROC: direction (row) on questions (column)", 0.0),
        (cosines, {}, "cosine between directions", -1.0),
    ]
    for axis, (cells, intervals, title, low) in zip(axes, panels, strict=True):
        numbers = np.array([[cells[row, column] for column in forms] for row in forms])
        axis.imshow(numbers, vmin=low, vmax=1.0, cmap="RdBu_r" if low < 0 else "PuOr")
        for i, row in enumerate(forms):
            for j, column in enumerate(forms):
                text = f"{numbers[i, j]:.2f}"
                if one := intervals.get((row, column)):
                    text += f"\n[{one.low:.2f}, {one.high:.2f}]"
                share = (numbers[i, j] - low) / (1.0 - low)
                colour = "white" if share > 0.78 or share < 0.22 else "black"
                axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour)
        axis.set_xticks(range(len(forms)), forms, fontsize=SMALL)
        axis.set_yticks(range(len(forms)), forms, fontsize=SMALL)
        axis.set_title(title, fontsize=8)
    return picture_of(canvas)


def _scores(summary: Summary, variants: Iterable[str], task: str) -> np.ndarray[Any, Any]:
    return sweep_table([summary.cells[variant, task].value for variant in variants])


def _line(axis: Any, x: Any, values: Any, index: int, label: str) -> None:
    colour, marker, style = sweep_curve_style(index)
    axis.vlines(x, values[:, 1], values[:, 2], color=colour, lw=1, alpha=0.45)
    axis.plot(
        x, values[:, 0], marker + style, color=colour, ms=3.5, lw=1.2, label=literal_text(label)
    )
