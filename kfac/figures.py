"""Figures of curvature and of what edits do: arrays in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac.analysis.bands import BandRatios
from kfac.analysis.loss_slices import LossSlices
from kfac.analysis.relearning import Relearning
from kfac.analysis.split_half import SplitHalf
from lirefs.errors import SpectrumError
from lirefs.pictures import (
    COLOURS,
    WIDE,
    Picture,
    canvas_of,
    colour_bar,
    legend_below,
    literal,
    picture_of,
)
from lirefs.statistics.intervals import Estimate, Floats, auroc

MARKERS = "os^DvPX*"


def bands(ratios: BandRatios, positions: Sequence[int] | None = None) -> Picture:
    """Activation ratio of two sets of texts per band, raw and with inputs of norm 1.

    Args:
        ratios: From `band_ratios`, memorized over clean.
        positions: Place of each target on the horizontal axis (its layer); None: 0, 1, ...
    """
    canvas, axes = canvas_of(2, (10, 3.8), sharey=True)
    places = np.arange(len(ratios.names)) if positions is None else np.array(positions)
    for axis, table, title in (
        (axes[0], ratios.ratio, "norm of the projection"),
        (axes[1], ratios.control, "control: each input scaled to norm 1"),
    ):
        for band, label in enumerate(ratios.labels):
            # Beside each other, so that intervals can be told apart.
            x = places + 0.08 * (band - (len(ratios.labels) - 1) / 2)
            value, low, high = table[:, :, band]
            axis.errorbar(x, value, _errors(value, low, high), label=label, **_style(band))
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xticks(places)
        axis.set(xlabel="layer" if positions is not None else "target")
        axis.set_title(title, fontsize=10)
    axes[0].set(ylabel=f"memorized over clean, n = {ratios.n[0]} and {ratios.n[1]} texts")
    axes[0].legend(fontsize=8, title="directions of A", title_fontsize=8)
    return picture_of(canvas)


def task_curvature(
    ratios: Mapping[str, Mapping[str, BandRatios]], positions: Sequence[int] | None = None
) -> Picture:
    """Sharpest and flattest band of references over each task (K-FAC paper, Figure 4).

    Args:
        ratios: From `task_ratios`.
        positions: Place of each target on the horizontal axis (its layer); None: 0, 1, ...
    """
    if not ratios:
        raise SpectrumError("no task to draw")
    canvas, axes = canvas_of(len(ratios), (2.6 * len(ratios) + 1.5, 3.4), sharey=True)
    for axis, (task, references) in zip(axes, ratios.items(), strict=True):
        for place, (reference, one) in enumerate(references.items()):
            x = np.arange(len(one.names)) if positions is None else np.array(positions)
            for band, dashed in ((0, False), (len(one.labels) - 1, True)):
                value, low, high = one.ratio[:, :, band]
                style = _style(place) | {"ls": "--" if dashed else "-"}
                label = f"{reference} / task, {one.labels[band]}"
                axis.errorbar(x, value, _errors(value, low, high), label=label, **style)
            axis.set_xticks(x)
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xlabel="layer" if positions is not None else "target")
        axis.set_title(task, fontsize=10)
    axes[0].set(ylabel="activation ratio")
    axes[0].legend(fontsize=7)
    return picture_of(canvas)


def detector(
    scores: Floats, labels: Floats, names: tuple[str, str] = ("clean", "memorized")
) -> Picture:
    """Scores of both classes and the ROC curve of the detector.

    Args:
        scores: Shape (n,).
        labels: Shape (n,), 1 for memorized.
        names: Names of class 0 and 1.
    """
    canvas, (left, right) = canvas_of(2, (9, 3.6))
    classes = np.asarray(labels).astype(bool)
    area = auroc(scores, classes)
    edges = np.linspace(scores.min(), scores.max() + 1e-12, 31)
    for index, (name, chosen) in enumerate(zip(names, (~classes, classes), strict=True)):
        share = np.full(chosen.sum(), 1 / chosen.sum())
        label = f"{name}, n = {chosen.sum()}"
        left.hist(
            scores[chosen],
            edges,
            weights=share,
            color=COLOURS[index],
            alpha=0.6,
            label=label,
            hatch=("", "///")[index],
            edgecolor="white",
        )
    left.set(xlabel="share of input energy in flat directions", ylabel="share of the class")
    left.legend(fontsize=8)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.diff(scores[order]) != 0, True)  # ties make one step together
    for_one = np.append(0, (np.cumsum(classes[order]) / classes.sum())[ends])
    for_zero = np.append(0, (np.cumsum(~classes[order]) / (~classes).sum())[ends])
    right.plot(for_zero, for_one, color=COLOURS[0], label=f"AUROC {area}")
    right.plot([0, 1], [0, 1], color=COLOURS[6], ls=":", label="chance")
    right.set(xlabel=f"{names[0]} called {names[1]}", ylabel=f"{names[1]} found", aspect="equal")
    right.legend(fontsize=8, loc="lower right")
    return picture_of(canvas)


def slices(one: LossSlices) -> Picture:
    """True loss along eigenvector pairs, and the prediction beside it."""
    columns = min(3, len(one.pairs))
    rows = -(-len(one.pairs) // columns)
    canvas, axes = canvas_of(columns, (3.3 * columns, 2.8 * rows), rows=rows)
    order = np.argsort(one.steps)
    for index, axis in enumerate(axes):
        if index >= len(one.pairs):
            axis.set_visible(False)
            continue
        steps = one.steps[order]
        axis.plot(steps, one.loss[index, order], color=COLOURS[0], marker="o", ms=3, label="loss")
        axis.plot(steps, one.predicted[index, order], color=COLOURS[1], ls="--", label="predicted")
        i, j = one.pairs[index]
        axis.set_title(f"pair ({i}, {j}), mass {one.masses[index]:.2g}", fontsize=9)
        axis.ticklabel_format(axis="y", useOffset=False)
        if index % columns == 0:
            axis.set(ylabel="nats per position")
        if index >= len(one.pairs) - columns:
            axis.set(xlabel="step / norm of the weight")
    axes[0].legend(fontsize=8)
    canvas.suptitle(one.name, fontsize=10)
    return picture_of(canvas)


def reliability(one: SplitHalf) -> Picture:
    """Eigenvalues of one half against the other, and agreement of the flat subspaces."""
    canvas, axes = canvas_of(3, (12, 3.6))
    for axis, side, title in ((axes[0], one.input, "input, A"), (axes[1], one.output, "output, G")):
        ranks = np.arange(1, len(side.own) + 1)
        floor = np.finfo(np.float64).tiny
        own, other = (np.maximum(values, floor) for values in (side.own, side.other))
        axis.loglog(ranks, own, color=COLOURS[0], label="half 1")
        label = "half 2 along the same direction"
        axis.loglog(ranks, other, color=COLOURS[1], lw=0.8, alpha=0.8, label=label)
        shown = side.own[side.own > side.own[0] * 1e-12]
        axis.set(xlabel="rank", ylabel="second moment", ylim=(shown[-1] / 3, side.own[0] * 3))
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, loc="lower left")
    for index, (side, label) in enumerate(((one.input, "input"), (one.output, "output"))):
        axes[2].plot(side.cuts, side.overlap, label=f"{label}, shared", **_style(index))
        axes[2].plot(side.cuts, side.chance, color=COLOURS[index], ls=":", lw=1)
    axes[2].set(xlabel="flat end begins at", ylabel="shared by both halves")
    axes[2].set(ylim=(0, 1.02))
    axes[2].set_title("flat subspaces (dotted: chance)", fontsize=10)
    axes[2].legend(fontsize=8)
    canvas.suptitle(one.name, fontsize=10)
    return picture_of(canvas)


def relearning(result: Relearning) -> Picture:
    """Recitation against fine-tuning steps: the texts trained on, and the rest."""
    canvas, axes = canvas_of(2, (9.5, 3.7), sharey=True)
    places = np.arange(len(result.steps))
    for axis, table, title in (
        (axes[0], result.rest, "texts not trained on"),
        (axes[1], result.known, "texts trained on"),
    ):
        for index, (arm, values) in enumerate(table.items()):
            axis.errorbar(places, *_bars(values), label=arm, **_style(index))
        count = next(iter(table.values()))[0].n
        axis.set_xticks(places, [str(step) for step in result.steps])
        axis.set(xlabel="steps of fine-tuning", ylim=(-0.03, 1.03))
        axis.set_title(f"{title}, n = {count}", fontsize=10)
    axes[0].set(ylabel="share recited")
    axes[1].legend(fontsize=8)
    return picture_of(canvas)


def pareto(
    curves: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    xlabel: str,
    ylabel: str,
    start: tuple[Estimate, Estimate] | None = None,
) -> Picture:
    """One line for each method, a point with intervals for each setting.

    Args:
        curves: Method to its settings, each a pair of estimates (x, y).
        xlabel: What x is.
        ylabel: What y is.
        start: The unchanged model, drawn as a star.
    """
    canvas, (axis,) = canvas_of(1, (6.4, 4.4))
    for index, (method, points) in enumerate(curves.items()):
        ordered = sorted(points, key=lambda point: point[0].value)
        (x, xerr), (y, yerr) = (_bars([one[side] for one in ordered]) for side in (0, 1))
        axis.errorbar(x, y, yerr, xerr, label=method, **_style(index))
    if start is not None:
        axis.plot(start[0].value, start[1].value, "*", color="black", ms=12, label="unchanged")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8)
    return picture_of(canvas)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ms": 4,
        "lw": 1.2,
    }


def _bars(estimates: Sequence[Estimate]) -> tuple[Floats, Floats]:
    """Return values (n,) and the lengths of their bars (2, n), below and above."""
    value, low, high = np.array([(one.value, one.low, one.high) for one in estimates]).T
    return value, _errors(value, low, high)


def _errors(value: Floats, low: Floats, high: Floats) -> Floats:
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


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
