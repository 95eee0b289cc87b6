"""Figures: arrays in, pictures out. Colours are the Okabe-Ito set, told apart without colour.

Every figure is at most as wide as a page's text, with no letter under 7 pt at that width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.files import atomic_write_bytes
from lirefs.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from lirefs.probe import Probe

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C8C8C",
    "#000000",
)
WIDE = 7.0
"""Width in inches of a figure that spans both columns of a paper."""
SMALL = 7.0
"""Size in points of the smallest letters."""


@dataclass(frozen=True)
class Picture:
    """A figure in two formats: the same data give the same bytes."""

    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)

    def save(self, folder: Path, name: str) -> None:
        """Write `name.png` and `name.svg`."""
        atomic_write_bytes(folder / f"{name}.png", self.png)
        atomic_write_bytes(folder / f"{name}.svg", self.svg)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Curvature of one target, for the spectrum figure.

    Attributes:
        name: Name of the target.
        output_values: Eigenvalues of G, descending, shape (m,).
        input_values: Eigenvalues of A, descending, shape (n,).
        counts: Number of pairs kept in each row of the (m, n) mass, shape (m,).
        curve: Share of pairs and share of mass kept, shape (points, 2), ascending.
        keep: Share of the mass that was asked for.
    """

    name: str
    output_values: Floats
    input_values: Floats
    counts: Floats
    curve: Floats
    keep: float


def direction_separation(probe: Probe) -> Picture:
    """AUROC per layer with its controls, and mean cosine with the direction per class."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.2))
    layers = np.array([one.layer for one in probe.scores])
    test = np.array(
        [[s.test_auroc.value, s.test_auroc.low, s.test_auroc.high] for s in probe.scores]
    )
    validation = np.array([one.validation_auroc.value for one in probe.scores])
    left.fill_between(layers, test[:, 1], test[:, 2], color=COLOURS[0], alpha=0.2, lw=0)
    left.plot(layers, test[:, 0], color=COLOURS[0], marker="o", ms=3, label="test, 95 % interval")
    left.plot(layers, validation, color=COLOURS[5], ls="--", label="validation (chooses the layer)")
    left.axvline(
        probe.best_layer, color="black", lw=0.8, ls=":", label=f"chosen: layer {probe.best_layer}"
    )
    null = probe.shuffled
    left.axhspan(null.low, null.high, color=COLOURS[6], alpha=0.25, lw=0)
    left.axhline(null.value, color=COLOURS[6], label="shuffled labels, best layer, 95 % range")
    left.axhline(
        probe.bag_of_words.value, color=COLOURS[1], ls="-.", label="bag of words (no model)"
    )
    left.set(xlabel="layer", ylabel="AUROC", ylim=(None, 1.02))
    left.set_title(
        f"reasoning against memory, n = {probe.best_scores.test_auroc.n} test questions", fontsize=8
    )
    legend_below(left, columns=1)
    cosines = np.array([one.cosines for one in probe.scores])
    right.plot(layers, cosines[:, 1], color=COLOURS[2], marker="o", ms=3, label="reasoning")
    right.plot(layers, cosines[:, 0], color=COLOURS[3], marker="s", ms=3, label="memory")
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer", ylabel="mean cosine with the direction")
    right.set_title("test states along each layer's direction", fontsize=8)
    legend_below(right, columns=2)
    whole_layers(left, right)
    return picture_of(canvas)


def curvature_spectrum(spectra: Sequence[Spectrum]) -> Picture:
    """Mass against share of pairs for every target, and one target's mass with its staircase."""
    names = _apart([one.name for one in spectra])
    columns = 1 if max(map(len, names)) > 20 else 2
    canvas, (left, right) = canvas_of(2, (WIDE, 3.1 + 0.15 * len(names) / columns))
    for index, (one, name) in enumerate(zip(spectra, names, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        style = "-" if index < len(COLOURS) else "--"
        left.plot(
            one.curve[:, 0], one.curve[:, 1], color=colour, ls=style, lw=1.2, label=literal(name)
        )
        share = one.counts.sum() / (len(one.counts) * len(one.input_values))
        left.plot([share], [one.keep], "o", color=colour, ms=4)
    left.axhline(spectra[0].keep, color="black", lw=0.6, ls=":")
    left.set(xscale="log", xlabel="share of pairs kept", ylabel="share of curvature mass kept")
    left.set_title(f"dots: keep = {spectra[0].keep:g}", fontsize=8)
    legend_below(left, columns)

    shown = spectra[len(spectra) // 2]
    rows = np.unique(np.geomspace(1, len(shown.output_values), 300).astype(int)) - 1
    inputs = np.unique(np.geomspace(1, len(shown.input_values), 300).astype(int)) - 1
    mass = np.outer(shown.output_values[rows], shown.input_values[inputs])
    total = shown.output_values.sum() * shown.input_values.sum()
    tiny = np.finfo(float).tiny
    picture = right.pcolormesh(
        inputs + 1,
        rows + 1,
        np.log10(np.maximum(mass / total, tiny)),
        cmap="cividis",
        vmin=-12,
        rasterized=True,
    )
    kept = np.maximum(shown.counts[rows], 0.5)
    right.plot(kept, rows + 1, color=COLOURS[1], lw=1.6, label="kept: left of the line")
    right.set(xscale="log", yscale="log", xlim=(1, None), ylim=(len(shown.output_values), 1))
    right.set(xlabel="input eigenvector j", ylabel="output eigenvector i")
    right.set_title(literal(shown.name), fontsize=8)
    legend_below(right, columns=1)
    colour_bar(canvas, picture, right, "log10 share of mass")
    for each in (left.xaxis, right.xaxis, right.yaxis):
        each.set_major_formatter("{x:g}")  # exponents would be too small to read
        each.set_minor_formatter("")
    return picture_of(canvas)


def _apart(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all of them share."""
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(one) for one in parts}) > 1:
        return list(names)
    differ = [place for place, some in enumerate(zip(*parts, strict=True)) if len(set(some)) > 1]
    return [".".join(one[place] for place in differ) for one in parts]


def canvas_of(panels: int, size: tuple[float, float], rows: int = 1) -> tuple[Canvas, Any]:
    """A figure of rows of panels side by side, and their axes, row by row.

    Made without pyplot: no global state, no window, no change of the user's backend.

    Args:
        panels: How many in a row.
        size: Width and height in inches.
        rows: How many rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = np.atleast_1d(canvas.subplots(rows, panels)).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=SMALL)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    return canvas, axes


def whole_layers(*axes: Any) -> None:
    """No tick between two layers."""
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)


def legend_below(axis: Any, columns: int) -> None:
    """A legend under an axis and its label, where it covers no data."""
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


def literal(name: str) -> str:
    """A name as it is written: no mathematics between dollar signs, nothing unprintable."""
    shown = "".join(one if one.isprintable() or one == "\n" else " " for one in name)
    return shown.replace("$", r"\$")


def legend_outside(canvas: Canvas, axis: Any, columns: int, side: str) -> None:
    """One legend for all panels, of what one of them shows, above (`upper`) or below (`lower`)."""
    handles, names = axis.get_legend_handles_labels()
    place: Any = f"outside {side} center"
    canvas.legend(handles, names, fontsize=SMALL, ncols=columns, loc=place, frameon=False)


def colour_bar(canvas: Canvas, picture: Any, axes: Any, label: str) -> None:
    """A colour bar beside axes."""
    bar = canvas.colorbar(picture, ax=axes)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=SMALL)


def picture_of(canvas: Canvas) -> Picture:
    """A figure as PNG (220 dpi) and as SVG, text kept as text, without date or random names."""
    import matplotlib

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lirefs"}):
        canvas.savefig(png, format="png", dpi=220)
        canvas.set_layout_engine("none")  # laid out above, once for both
        canvas.savefig(svg, format="svg", dpi=220, metadata={"Date": None})
    return Picture(png.getvalue(), svg.getvalue())
