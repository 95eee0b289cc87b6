"""Figures: from arrays to pictures, at most as wide as a page's text, with no text under 7 pt."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
"""The Okabe-Ito set, which colour-blind readers can distinguish, with grey for its yellow."""
WIDE = 7.0
"""Width in inches of a figure that spans both columns of a paper."""
SMALL = 7.0
"""Size in points of the smallest text."""


@dataclass(frozen=True)
class Picture:
    """A figure in two formats: the same data give the same bytes."""

    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)

    def save(self, folder: Path, name: str) -> None:
        """Write `name.png` and `name.svg`."""
        atomic_write_bytes(folder / f"{name}.png", self.png)
        atomic_write_bytes(folder / f"{name}.svg", self.svg)


def canvas_of(
    panels: int, size: tuple[float, float], *, rows: int = 1, sharey: bool = False
) -> tuple[Canvas, Any]:
    """Make a figure of `rows` times `panels` axes without pyplot; `size` is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = np.atleast_1d(canvas.subplots(rows, panels, sharey=sharey)).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=SMALL)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    return canvas, axes


def integer_layer_ticks(*axes: Any) -> None:
    """Put ticks at whole numbers only, as layers are."""
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def legend_below(axis: Any, columns: int) -> None:
    """Put the legend under an axis and its label, where it covers no data."""
    from matplotlib.transforms import ScaledTranslation

    below = axis.transAxes + ScaledTranslation(0, -30 / 72, axis.figure.dpi_scale_trans)
    axis.legend(
        fontsize=SMALL,
        ncols=columns,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        borderaxespad=0,
        columnspacing=1.2,
        frameon=False,
    )


def literal_text(name: str) -> str:
    """A name to show as it is: without mathematics between dollar signs or control characters."""
    shown = "".join(one if one.isprintable() or one == "\n" else " " for one in name)
    return shown.replace("$", r"\$")


def legend_outside(canvas: Canvas, axis: Any, columns: int, side: str) -> None:
    """Put one panel's legend above (`upper`) or below (`lower`) all panels."""
    handles, names = axis.get_legend_handles_labels()
    place: Any = f"outside {side} center"
    canvas.legend(handles, names, fontsize=SMALL, ncols=columns, loc=place, frameon=False)


def colour_bar(canvas: Canvas, picture: Any, axes: Any, label: str) -> None:
    """Put a colour bar next to axes."""
    bar = canvas.colorbar(picture, ax=axes)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=SMALL)


def picture_of(canvas: Canvas) -> Picture:
    """Render as PNG (220 dpi) and SVG, with text as text and neither date nor random ids."""
    import matplotlib

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lirefs"}):
        canvas.savefig(png, format="png", dpi=220)
        canvas.set_layout_engine("none")  # the first call laid it out for both
        canvas.savefig(svg, format="svg", dpi=220, metadata={"Date": None})
    return Picture(png.getvalue(), svg.getvalue())
