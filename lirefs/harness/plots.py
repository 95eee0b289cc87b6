"""Figures: arrays in, PNG bytes out. Colours are the Okabe-Ito set, told apart without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.statistics import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from lirefs.harness.comparison import Comparison
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
HATCHES = ("", "", "", "///", "...", "xxx", "\\\\\\", "+++")


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


def direction_separation(probe: Probe) -> bytes:
    """AUROC per layer with its controls, and mean cosine with the direction per class."""
    canvas, (left, right) = canvas_of(2, (10, 3.8))
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
    left.set(xlabel="layer", ylabel="AUROC, reasoning against memory", ylim=(None, 1.02))
    left.set_title(f"separation, n = {probe.best_scores.test_auroc.n} test questions", fontsize=10)
    left.legend(fontsize=7, loc="lower right", framealpha=0.9)
    cosines = np.array([one.cosines for one in probe.scores])
    right.plot(layers, cosines[:, 1], color=COLOURS[2], marker="o", ms=3, label="reasoning")
    right.plot(layers, cosines[:, 0], color=COLOURS[3], marker="s", ms=3, label="memory")
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer", ylabel="mean cosine with the direction")
    right.set_title("test states along each layer's direction", fontsize=10)
    right.legend(fontsize=8)
    return png_of(canvas)


def curvature_spectrum(spectra: Sequence[Spectrum]) -> bytes:
    """Mass against share of pairs for every target, and one target's mass with its staircase."""
    canvas, (left, right) = canvas_of(2, (10, 3.9))
    for index, one in enumerate(spectra):
        colour = COLOURS[index % len(COLOURS)]
        style = "-" if index < len(COLOURS) else "--"
        left.plot(one.curve[:, 0], one.curve[:, 1], color=colour, ls=style, lw=1.2, label=one.name)
        share = one.counts.sum() / (len(one.counts) * len(one.input_values))
        left.plot([share], [one.keep], "o", color=colour, ms=4)
    left.axhline(spectra[0].keep, color="black", lw=0.6, ls=":")
    left.set(xscale="log", xlabel="share of pairs kept", ylabel="share of curvature mass kept")
    left.set_title(f"dots: keep = {spectra[0].keep:g}", fontsize=10)
    left.legend(fontsize=6, loc="lower right")

    shown = spectra[len(spectra) // 2]
    rows = np.unique(np.geomspace(1, len(shown.output_values), 300).astype(int)) - 1
    columns = np.unique(np.geomspace(1, len(shown.input_values), 300).astype(int)) - 1
    mass = np.outer(shown.output_values[rows], shown.input_values[columns])
    total = shown.output_values.sum() * shown.input_values.sum()
    tiny = np.finfo(float).tiny
    picture = right.pcolormesh(
        columns + 1, rows + 1, np.log10(np.maximum(mass / total, tiny)), cmap="cividis", vmin=-12
    )
    kept = np.maximum(shown.counts[rows], 0.5)
    right.plot(kept, rows + 1, color=COLOURS[1], lw=1.6, label="kept: left of the line")
    right.set(xscale="log", yscale="log", xlim=(1, None), ylim=(len(shown.output_values), 1))
    right.set(xlabel="input eigenvector j", ylabel="output eigenvector i")
    right.set_title(shown.name, fontsize=9)
    right.legend(fontsize=7, loc="lower left")
    canvas.colorbar(picture, ax=right, label="log10 share of mass")
    return png_of(canvas)


def retained_performance(comparison: Comparison) -> bytes:
    """Retained share of the unchanged model's performance by task group (K-FAC paper, Fig. 3)."""
    variants, groups = comparison.variants[1:], comparison.groups
    canvas, (axis,) = canvas_of(1, (10, 4.2))
    width = 0.84 / len(variants)
    shares = [comparison.retained(variant, group) for variant in variants for group in groups]
    highest = max((one.high for one in shares if math.isfinite(one.high)), default=1.0)
    top = min(1.6, max(1.1, 1.05 * highest))
    for index, variant in enumerate(variants):
        kept = [comparison.retained(variant, group) for group in groups]
        x = np.arange(len(groups)) + (index - (len(variants) - 1) / 2) * width
        values = np.array([one.value for one in kept])
        low = np.array([one.value - one.low for one in kept])
        high = np.array([one.high - one.value for one in kept])
        axis.bar(
            x,
            np.nan_to_num(values),
            width * 0.92,
            label=variant,
            color=COLOURS[index % len(COLOURS)],
            # One round of colours later every hatch is another one: no two bars look alike.
            hatch=HATCHES[(index + 3 * (index // len(COLOURS))) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.4,
        )
        errors = np.nan_to_num(np.maximum([low, high], 0))
        axis.errorbar(
            x, np.nan_to_num(values), errors, fmt="none", ecolor="black", elinewidth=0.9, capsize=2
        )
        for place, value in zip(x, values, strict=True):
            if not math.isfinite(value):
                axis.text(place, 0.02, "n/a", rotation=90, ha="center", fontsize=7)
            elif value > top:
                axis.text(place, top * 0.97, f"{value:.1f}", ha="center", va="top", fontsize=7)
    axis.axhline(1, color="black", lw=0.8)
    counts = [
        sum(len(comparison.results[variants[0]][task]) for task in comparison.counted(group))
        for group in groups
    ]
    axis.set_xticks(
        range(len(groups)), [f"{g}\nn = {n}" for g, n in zip(groups, counts, strict=True)]
    )
    axis.set(ylabel="share of the unchanged model", ylim=(0, top))
    axis.legend(fontsize=7.5, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    return png_of(canvas)


def canvas_of(panels: int, size: tuple[float, float], rows: int = 1) -> tuple[Canvas, Any]:
    """A figure of rows of panels side by side, and their axes, row by row.

    Made without pyplot: no global state, no window, no change of the user's backend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = np.atleast_1d(canvas.subplots(rows, panels)).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return canvas, axes


def png_of(canvas: Canvas) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
