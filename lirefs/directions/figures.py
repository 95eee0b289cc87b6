"""Figures of probes, each with its controls: arrays in, pictures out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lirefs.directions.geometry import Components, Transfer, cosines
from lirefs.directions.probe import Probe
from lirefs.pictures import (
    COLOURS,
    SMALL,
    WIDE,
    Picture,
    canvas_of,
    colour_bar,
    integer_layer_ticks,
    legend_below,
    legend_outside,
    literal_text,
    picture_of,
    styled,
)
from lirefs.statistics.intervals import Estimate, Floats

_RANDOM = COLOURS[4]
"""Colour of random directions."""
_MOST_NUMBERS = 12
"""Most layers of a map of cosines whose numbers fit into its cells."""
_CONTROLS = (
    ("random_auroc", _RANDOM, "random directions, 95 %"),
    ("shuffled_auroc", COLOURS[6], "shuffled labels, 95 %"),
)


@styled
def probe_by_layer(probe: Probe) -> Picture:
    """AUROC, accuracy and correlations of every layer, with both controls."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.4))
    _line(left, probe, "test_auroc", COLOURS[0], "test AUROC")
    _line(left, probe, "test_accuracy", COLOURS[2], "test accuracy")
    _controls(left, probe)
    left.axvline(probe.best_layer, color="black", lw=0.8, ls=":", label="chosen on validation")
    left.set(xlabel="layer", ylabel="test items", ylim=(0, 1.02))
    legend_below(left, columns=2)
    _line(right, probe, "spearman", COLOURS[1], "Spearman")
    _line(right, probe, "pearson", COLOURS[3], "Pearson")
    # With two classes, the rank correlation of a control follows from its AUROC.
    _controls(right, probe, as_correlation=True)
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer", ylabel="correlation with the grade\n(controls: 2 AUROC - 1)")
    legend_below(right, columns=2)
    integer_layer_ticks(left, right)
    return picture_of(canvas)


@styled
def best_layer_figure(probes: Mapping[str, Probe]) -> Picture:
    """Test AUROC of the best layer, and of the best layer under shuffled labels, by estimator."""
    canvas, (axis,) = canvas_of(1, (WIDE, 1.2 + 0.5 * len(probes)))
    for row, probe in enumerate(probes.values()):
        found, random = probe.best_scores.test_auroc, probe.best_scores.random_auroc
        if probe.null:
            style: Any = {"orientation": "horizontal", "widths": 0.8, "showextrema": False}
            axis.violinplot([list(probe.null)], [row], **style)["bodies"][0].set_color(COLOURS[6])
        axis.plot([random.low, random.high], [row - 0.25] * 2, color=_RANDOM, lw=3)
        ends = [[found.value - found.low], [found.high - found.value]]
        axis.errorbar(found.value, row, xerr=ends, fmt="o", color=COLOURS[0], capsize=3)
    axis.axvline(0.5, color="black", lw=0.6, ls=":")
    notes = [
        f"{literal_text(name)}\nlayer {probe.best_layer}, p = {probe.p_value:.3f}"
        for name, probe in probes.items()
    ]
    axis.set_yticks(range(len(probes)), notes)
    axis.set(xlim=(0, 1.02), xlabel="test AUROC of the layer chosen on validation items")
    axis.plot([], [], "o-", color=COLOURS[0], label="fitted, 95 % interval")
    axis.plot(
        [], [], color=COLOURS[6], lw=6, alpha=0.5, label="shuffled labels, layer chosen again"
    )
    axis.plot([], [], color=_RANDOM, lw=3, label="random directions, 95 % range")
    axis.plot([], [], color="black", lw=0.6, ls=":", label="chance")
    legend_below(axis, columns=2)
    return picture_of(canvas)


@styled
def cosine_maps(maps: Mapping[str, Floats]) -> Picture:
    """Cosines between layers, one map for each pair of question sets or models."""
    canvas, axes = canvas_of(len(maps), (WIDE, 3.4))
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        look: Any = {"cmap": "RdBu", "vmin": -1, "vmax": 1, "origin": "lower", "aspect": "auto"}
        picture = axis.imshow(values, interpolation="nearest", **look)
        for (row, column), one in np.ndenumerate(values):
            if max(values.shape) <= _MOST_NUMBERS:
                ink = "white" if abs(one) > 0.6 else "black"
                text = f"{one:.2f}" if one else "n/a"  # a direction without length
                style: Any = {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink}
                axis.text(column, row, text, **style)
        axis.set(xlabel="layer", ylabel="layer")
        integer_layer_ticks(axis)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(literal_text(name), fontsize=8)
    colour_bar(canvas, picture, list(axes), "cosine")
    return picture_of(canvas)


@styled
def projection_scatter(found: Components, probe: Probe) -> Picture:
    """Test states on two principal components with the boundary; cosine with each component."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.2))
    for label, colour in ((0, COLOURS[3]), (1, COLOURS[2])):
        points, name = found.points[found.labels == label], literal_text(probe.names[1 - label])
        left.scatter(points[:, 0], points[:, 1], s=10, color=colour, alpha=0.7, label=name)
    limits = left.get_xlim(), left.get_ylim()
    length = float(np.linalg.norm(found.axis))
    if length > 0:
        # The boundary in this plane: through the middle, across the direction.
        across = np.array([-found.axis[1], found.axis[0]]) / length
        far = np.abs(found.points).max() * 4
        ends = np.stack([found.middle - far * across, found.middle + far * across])
        left.plot(ends[:, 0], ends[:, 1], color="black", lw=1, label="boundary")
    left.set(xlim=limits[0], ylim=limits[1], xlabel="component 1", ylabel="component 2")
    best = probe.best_scores
    left.set_title(
        f"layer {found.direction.layer}: test AUROC {best.test_auroc:.2f}\nshuffled "
        f"{probe.shuffled:.2f}; random {best.random_auroc:.2f}",
        fontsize=8,
    )
    legend_below(left, columns=2)
    numbers = np.arange(1, len(found.cosines) + 1)
    right.bar(numbers - 0.2, found.cosines, 0.4, color=COLOURS[0], label="|cosine| with direction")
    right.bar(numbers + 0.2, found.explained, 0.4, color=COLOURS[5], label="variance explained")
    right.axhline(found.random, color=_RANDOM, ls="--", label="random directions, 97.5 %")
    right.set(xlabel="principal component of train states", ylim=(0, 1))
    legend_below(right, columns=2)
    return picture_of(canvas)


@styled
def probes_side_by_side(probes: Mapping[str, Probe]) -> Picture:
    """Two models (base against instruct): separation per layer, and their directions' cosines."""
    canvas, axes = canvas_of(3, (WIDE, 2.9))
    for axis, (name, probe) in zip(axes, probes.items(), strict=False):
        _line(axis, probe, "test_auroc", COLOURS[0], "test AUROC")
        _controls(axis, probe)
        axis.set(xlabel="layer", ylim=(0, 1.02))
        axis.set_title(literal_text(f"{name}\nbest layer {probe.best_layer}"), fontsize=8)
    first, second = list(probes.values())[:2]
    values = np.diag(cosines(first.directions, second.directions))
    axes[2].plot(_layers(first)[: len(values)], values, color=COLOURS[1], marker="o", ms=3)
    chance = 1.96 / np.sqrt(first.best.vector.numel())
    axes[2].axhspan(-chance, chance, color=_RANDOM, alpha=0.3, lw=0)
    axes[2].set(xlabel="layer", ylim=(-1, 1.05))
    axes[2].set_title("cosine between the two", fontsize=8)
    integer_layer_ticks(*axes)
    legend_outside(canvas, axes[0], 3, "lower")
    return picture_of(canvas)


@styled
def transfer_bars(probe: Probe, found: Mapping[str, Transfer]) -> Picture:
    """AUROC on other question sets, on the probe's own test items, and of the controls."""
    canvas, (axis,) = canvas_of(1, (WIDE, 3.6))
    _line(axis, probe, "test_auroc", COLOURS[0], "own test items")
    random = {"color": _RANDOM, "alpha": 0.25, "label": "random directions, better sign"}
    for index, (name, one) in enumerate(found.items(), start=1):
        _with_band(axis, one.layers, one.auroc, COLOURS[index], name)
        axis.fill_between(one.layers, *_ends(one.random), lw=0, **random)
    null = probe.shuffled
    axis.axhspan(null.low, null.high, color=COLOURS[6], alpha=0.25, lw=0, label="shuffled labels")
    axis.axhline(0.5, color="black", lw=0.6)
    axis.set(xlabel="layer", ylabel="AUROC", ylim=(0, 1.02))
    legend_below(axis, columns=2)
    integer_layer_ticks(axis)
    return picture_of(canvas)


def direction_separation(probe: Probe) -> Picture:
    """`Probe.plot` as a picture."""
    return picture_of(probe.plot())


def _layers(probe: Probe) -> Any:
    return np.array([one.layer for one in probe.scores])


def _ends(found: Iterable[Estimate]) -> Floats:
    """Lower and upper limits, shape (2, n)."""
    return np.array([(one.low, one.high) for one in found]).T


def _with_band(axis: Any, layers: Any, found: Iterable[Estimate], colour: str, name: str) -> None:
    """A line with its intervals as a band; nothing where a value is undefined."""
    shown = list(found)
    values = np.array([one.value for one in shown])
    ends = np.where(np.isfinite(values), _ends(shown), np.nan)
    axis.fill_between(layers, *ends, color=colour, alpha=0.2, lw=0)
    axis.plot(layers, values, color=colour, marker="o", ms=3, label=literal_text(name))


def _line(axis: Any, probe: Probe, score: str, colour: str, name: str) -> None:
    _with_band(axis, _layers(probe), [getattr(one, score) for one in probe.scores], colour, name)


def _controls(axis: Any, probe: Probe, as_correlation: bool = False) -> None:
    for score, colour, name in _CONTROLS:
        ends = _ends(getattr(one, score) for one in probe.scores)
        ends = 2 * ends - 1 if as_correlation else ends
        axis.fill_between(_layers(probe), *ends, color=colour, alpha=0.3, lw=0, label=name)
