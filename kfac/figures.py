"""Figures of curvature and of what edits do: arrays in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_curve

from kfac.analysis.bands import BandRatios
from kfac.analysis.relearning import Relearning
from kfac.factors.spectrum import Spectrum, draw_spectrum
from lirefs.errors import SpectrumError
from lirefs.pictures import (
    COLOURS,
    WIDE,
    Picture,
    canvas_of,
    legend_below,
    legend_outside,
    literal_text,
    picture_of,
    styled,
)
from lirefs.statistics.intervals import Estimate, Floats, auroc

__all__ = [
    "Spectrum",
    "bands_figure",
    "curvature_spectrum_figure",
    "detector_figure",
    "pareto_figure",
    "relearning_figure",
    "task_curvature_figure",
]
MARKERS = "os^DvPX*"


@styled
def bands_figure(ratios: BandRatios, positions: Sequence[int] | None = None) -> Picture:
    """Activation ratio of two sets of texts per band, raw and with inputs of norm 1.

    Args:
        ratios: From `band_ratios`, memorized over clean.
        positions: Position of each target on the horizontal axis (its layer); None: 0, 1, ...
    """
    canvas, axes = canvas_of(2, (WIDE, 3.2), sharey=True)
    titles = ("norm of the projection", "control: each input scaled to norm 1")
    for axis, table, title in zip(axes, (ratios.ratio, ratios.control), titles, strict=True):
        x = _target_axis(axis, ratios.names, positions, title)
        for band, label in enumerate(ratios.labels):
            shift = 0.08 * (band - (len(ratios.labels) - 1) / 2)  # so that intervals do not overlap
            _line(axis, x + shift, table[:, :, band], band, f"{label} of the directions of A")
    n = ratios.n
    axes[0].set_ylabel(f"memorized over clean, n = {n[0]} and {n[1]} texts")
    legend_outside(canvas, axes[0], 2, "lower")
    return picture_of(canvas)


@styled
def task_curvature_figure(
    ratios: Mapping[str, Mapping[str, BandRatios]], positions: Sequence[int] | None = None
) -> Picture:
    """Sharpest and flattest band of references over each task (K-FAC paper, figure 4).

    Args:
        ratios: From `task_ratios`.
        positions: Position of each target on the horizontal axis (its layer); None: 0, 1, ...

    Raises:
        SpectrumError: No task.
    """
    if not ratios:
        raise SpectrumError("no task to draw")
    canvas, axes = canvas_of(len(ratios), (WIDE, 3.4), sharey=True)
    for axis, (task, references) in zip(axes, ratios.items(), strict=True):
        for index, (reference, one) in enumerate(references.items()):
            x = _target_axis(axis, one.names, positions, task)
            for band, style in ((0, "-"), (len(one.labels) - 1, "--")):
                label = f"{reference} / task, {one.labels[band]}"
                _line(axis, x, one.ratio[:, :, band], index, label, ls=style)
    axes[0].set_ylabel("activation ratio")
    legend_outside(canvas, axes[0], 2, "lower")
    return picture_of(canvas)


@styled
def detector_figure(scores: Floats, labels: Floats) -> Picture:
    """Scores of both classes and the ROC curve of the detector.

    Args:
        scores: Shape (n,).
        labels: Shape (n,), 0 for clean and 1 for memorized.
    """
    canvas, (left, right) = canvas_of(2, (WIDE, 3.2))
    classes = np.asarray(labels).astype(int)
    edges = np.linspace(scores.min(), scores.max() + 1e-12, 31)
    for index, name in enumerate(("clean", "memorized")):
        own = scores[classes == index]
        style: dict[str, Any] = {"hatch": ("", "///")[index], "edgecolor": "white", "alpha": 0.6}
        shares = np.full(len(own), 1 / len(own))
        label = f"{name}, n = {len(own)}"
        left.hist(own, edges, weights=shares, color=COLOURS[index], label=label, **style)
    left.set(xlabel="share of input energy in flat directions", ylabel="share of the class")
    false, true, _ = roc_curve(classes, scores, drop_intermediate=False)
    right.plot(false, true, color=COLOURS[0], label=f"AUROC {auroc(scores, classes)}")
    right.plot([0, 1], [0, 1], color=COLOURS[6], ls=":", label="chance")
    right.set(xlabel="clean called memorized", ylabel="memorized found", aspect="equal")
    for axis in (left, right):
        legend_below(axis, columns=1)
    return picture_of(canvas)


@styled
def relearning_figure(result: Relearning) -> Picture:
    """Recitation against fine-tuning steps: the texts trained on, and the rest."""
    canvas, axes = canvas_of(2, (WIDE, 3.2), sharey=True)
    x = np.arange(len(result.steps), dtype=np.float64)
    titles = ("texts not trained on", "texts trained on")
    for axis, table, title in zip(axes, (result.rest, result.known), titles, strict=True):
        for index, (arm, estimates) in enumerate(table.items()):
            _line(axis, x, _table(estimates), index, arm)
        count = next(iter(table.values()))[0].n
        axis.set_xticks(x, [str(step) for step in result.steps])
        axis.set(xlabel="steps of fine-tuning", ylim=(-0.03, 1.03))
        axis.set_title(f"{title}, n = {count}", fontsize=8)
    axes[0].set_ylabel("share recited")
    legend_outside(canvas, axes[0], 3, "lower")
    return picture_of(canvas)


@styled
def pareto_figure(
    curves: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    xlabel: str,
    ylabel: str,
    start: tuple[Estimate, Estimate] | None = None,
) -> Picture:
    """One line for each method, a point with intervals for each setting.

    Args:
        curves: Method to its settings, each a pair of estimates (x, y).
        xlabel: Label of the horizontal axis.
        ylabel: Label of the vertical axis.
        start: The unchanged model, drawn as a star.
    """
    canvas, (axis,) = canvas_of(1, (6.4, 4.4))
    for index, (method, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points, key=lambda point: point[0].value), strict=True)
        across = _table(x)
        _line(axis, across[0], _table(y), index, method, xerr=_errors(across))
    if start is not None:
        axis.plot(start[0].value, start[1].value, "*", color="black", ms=12, label="unchanged")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    legend_below(axis, columns=3)
    return picture_of(canvas)


def _target_axis(
    axis: Any, names: Sequence[str], positions: Sequence[int] | None, title: str
) -> Floats:
    """Ready an axis for ratios by target, and return the position of each target on it."""
    x = np.arange(len(names)) if positions is None else np.array(positions)
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(x)
    axis.set_xlabel("target" if positions is None else "layer")
    axis.set_title(literal_text(title), fontsize=8)
    return x.astype(np.float64)


def _line(axis: Any, x: Floats, table: Floats, index: int, label: str, **style: Any) -> None:
    """Draw values with intervals, both from a table (3, n) of value, lower and upper end."""
    style |= {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    axis.errorbar(x, table[0], _errors(table), label=literal_text(label), ms=4, lw=1.2, **style)


def _table(estimates: Sequence[Estimate]) -> Floats:
    return np.array([(one.value, one.low, one.high) for one in estimates]).T


def _errors(table: Floats) -> Floats:
    """Return the lengths of the bars (2, n), below and above the values of a table (3, n)."""
    return np.nan_to_num(np.maximum([table[0] - table[1], table[2] - table[0]], 0))


def curvature_spectrum_figure(spectra: Sequence[Spectrum]) -> Picture:
    """`draw_spectrum` as a picture: see `Factors.plot`."""
    return picture_of(draw_spectrum(spectra))
