"""The figure of one's own sweep: the scores of variants along an axis, such as a strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.comparison.summary import Summary
from lirefs.pictures import COLOURS, WIDE, canvas_of, legend_below, literal_text, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_LONGEST = 40
"""Characters in a name."""


@styled
def draw_strengths(summary: Summary, x: Mapping[str, float], label: str) -> Canvas:
    """Scores of variants at their places `x`: a panel for each metric, a line for each task.

    Bands are 95 % intervals, and a dotted line is the unchanged model's score. Controls have lines
    of their own, dashed and with hollow markers.
    """
    ordered = sorted(x, key=lambda name: x[name])
    kinds = {
        "": [name for name in ordered if name not in summary.controls],
        ", control": [name for name in ordered if name in summary.controls],
    }
    metrics = list(dict.fromkeys(info.metric for info in summary.tasks.values()))
    width = max(WIDE / 2, min(WIDE, 3.4 * len(metrics)))
    longest = max(
        sum(info.metric == metric for info in summary.tasks.values()) for metric in metrics
    )
    height = 2.6 + 0.16 * (longest * sum(map(bool, kinds.values())) + 1)
    canvas, axes = canvas_of(len(metrics), (width, height))
    for axis, metric in zip(axes, metrics, strict=True):
        tasks = [name for name, info in summary.tasks.items() if info.metric == metric]
        for index, task in enumerate(tasks):
            colour = COLOURS[index % len(COLOURS)]
            base = summary.cells[summary.variants[0], task].value
            for kind, names in kinds.items():
                if names:
                    named = literal_text(f"{shortened(task, _LONGEST)}{kind}, n = {base.n}")
                    hollow = {"ls": "--", "mfc": "white"} if kind else {}
                    style = {"color": colour, "label": named, **hollow}
                    _draw_line(axis, summary, task, {name: x[name] for name in names}, style)
            axis.axhline(base.value, color=colour, lw=0.9, ls=":", zorder=0)
        axis.plot([], [], color="black", lw=0.9, ls=":", label="unchanged model")
        shown = [literal_text(shortened(one, _LONGEST)) for one in (label, metric)]
        axis.set(xlabel=shown[0], ylabel=shown[1])
        legend_below(axis, columns=1)
    return canvas


def _draw_line(
    axis: Any, summary: Summary, task: str, x: Mapping[str, float], style: Mapping[str, Any]
) -> None:
    values = [summary.cells[name, task].value for name in x]
    table = np.array([(one.value, one.low, one.high) for one in values])
    places = list(x.values())
    axis.fill_between(places, table[:, 1], table[:, 2], color=style["color"], alpha=0.15, lw=0)
    axis.plot(places, table[:, 0], marker="o", ms=4, lw=1.2, **style)
