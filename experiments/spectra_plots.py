"""The figure of the two spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lirefs.pictures import COLOURS, Picture, canvas_of, literal_text, picture_of
from lirefs.statistics import Estimate
from lirefs.tasks.task import CONFLICT, GROUPS

MARKERS = "osD^vP*"


@dataclass(frozen=True)
class TaskPosition:
    """Where a task lies between recitation and reasoning, by activations and by curvature.

    Attributes:
        task: Name of the task.
        group: Group of the task.
        projection: Mean projection on the LiReF, -0.5 at the mean of memory questions and 0.5 at
            that of reasoning questions.
        flat: Mean share of input energy in flat directions of the curvature.
    """

    task: str
    group: str
    projection: Estimate
    flat: Estimate


def two_sided_spectrum(positions: Sequence[TaskPosition], title: str) -> Picture:
    """Plot each task by its projection on the LiReF and its flat input energy, with intervals."""
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
            xerr=_error_bars(x),
            yerr=_error_bars(y),
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            ms=5,
            lw=0.9,
            label=literal_text(group),
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
    # Recited text lies far above the rest, which a linear scale would squeeze into a line.
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
    axis.set_title(literal_text(title), fontsize=9, pad=24)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _label(canvas, axis, positions)
    return picture_of(canvas)


def _label(canvas: Any, axis: Any, positions: Sequence[TaskPosition]) -> None:
    """Label each point as near to it as possible without covering other labels and points."""
    from matplotlib.text import Text

    canvas.draw_without_rendering()
    renderer = canvas.canvas.get_renderer()
    points = [axis.transData.transform((one.projection.value, one.flat.value)) for one in positions]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    scale = canvas.dpi / 72
    for (x, y), one in zip(points, positions, strict=True):
        text = axis.annotate(
            literal_text(one.task),
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


def _error_bars(found: Sequence[Estimate]) -> Any:
    """Lengths of the bars below and above each value, shape (2, n)."""
    sides = [(one.value - one.low, one.high - one.value) for one in found]
    return np.maximum(np.array(sides).T, 0)
