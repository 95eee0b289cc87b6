"""Figures of probes, each with its controls: arrays in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
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
    legend_below,
    legend_outside,
    literal,
    picture_of,
    whole_layers,
)
from lirefs.statistics.intervals import Estimate, Floats


def per_layer(probe: Probe) -> Picture:
    """AUROC, accuracy and correlations of every layer, with both controls."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.4))
    layers = _layers(probe)
    _band(left, layers, [one.test_auroc for one in probe.scores], COLOURS[0], "test AUROC")
    _band(left, layers, [one.test_accuracy for one in probe.scores], COLOURS[2], "test accuracy")
    _controls(left, probe)
    left.axvline(probe.best_layer, color="black", lw=0.8, ls=":", label="chosen on validation")
    left.set(xlabel="layer", ylabel="test items", ylim=(0, 1.02))
    legend_below(left, columns=2)
    _band(right, layers, [one.spearman for one in probe.scores], COLOURS[1], "Spearman")
    _band(right, layers, [one.pearson for one in probe.scores], COLOURS[3], "Pearson")
    # With two classes, the rank correlation of a control is what its AUROC says of it.
    for name, colour in (("random_auroc", COLOURS[5]), ("shuffled_auroc", COLOURS[6])):
        found = [getattr(one, name) for one in probe.scores]
        low, high = (np.array([2 * getattr(one, end) - 1 for one in found]) for end in _ENDS)
        right.fill_between(layers, low, high, color=colour, alpha=0.3, lw=0, label=_NAMES[name])
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer", ylabel="correlation with the grade\n(controls: 2 AUROC - 1)")
    legend_below(right, columns=2)
    whole_layers(left, right)
    return picture_of(canvas)


def best_layer(probes: Mapping[str, Probe]) -> Picture:
    """Test AUROC of the best layer beside the best layer under shuffled labels, by estimator."""
    canvas, (axis,) = canvas_of(1, (WIDE, 0.8 + 0.5 * len(probes)))
    for row, probe in enumerate(probes.values()):
        found, random = probe.best_scores.test_auroc, probe.best_scores.random_auroc
        if probe.null:
            shape = axis.violinplot(
                [list(probe.null)], [row], orientation="horizontal", widths=0.8, showextrema=False
            )
            shape["bodies"][0].set_color(COLOURS[6])
        axis.plot([random.low, random.high], [row - 0.25] * 2, color=COLOURS[5], lw=3)
        ends = [[found.value - found.low], [found.high - found.value]]
        axis.errorbar(found.value, row, xerr=ends, fmt="o", color=COLOURS[0], capsize=3)
        axis.text(
            1.02,
            row,
            f"layer {probe.best_layer}, p = {probe.p_value:.3f}",
            fontsize=SMALL,
            va="center",
        )
    axis.axvline(0.5, color="black", lw=0.6)
    axis.set_yticks(range(len(probes)), list(probes))
    axis.set(xlim=(0, 1.2), xlabel="test AUROC of the layer chosen on validation items")
    axis.set_title(
        "dot: fitted, 95 %; grey: shuffled labels, layer chosen anew; blue bar: random directions",
        fontsize=8,
    )
    return picture_of(canvas)


def cosine_maps(maps: Mapping[str, Floats]) -> Picture:
    """Cosines between layers, and between question sets or models; random ones in the title."""
    canvas, axes = canvas_of(len(maps), (min(WIDE, 3.9 * len(maps)), 0.6 + 5.6 / max(2, len(maps))))
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        picture = axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1, origin="lower")
        axis.set(xlabel="layer", ylabel="layer")
        whole_layers(axis)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(literal(name), fontsize=8)
    colour_bar(canvas, picture, list(axes), "cosine")
    return picture_of(canvas)


def scatter(found: Components, probe: Probe) -> Picture:
    """Test states on two principal components with the boundary; cosine with each component."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.2))
    for label, name, colour in ((0, "memory", COLOURS[3]), (1, "reasoning", COLOURS[2])):
        points = found.points[found.labels == label]
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
        f"{best.shuffled_auroc:.2f}; random {best.random_auroc:.2f}",
        fontsize=8,
    )
    legend_below(left, columns=2)
    places = np.arange(1, len(found.cosines) + 1)
    right.bar(places - 0.2, found.cosines, 0.4, color=COLOURS[0], label="|cosine| with direction")
    right.bar(places + 0.2, found.explained, 0.4, color=COLOURS[4], label="variance explained")
    right.axhline(found.random, color=COLOURS[5], ls="--", label="random directions, 97.5 %")
    right.set(xlabel="principal component of train states", ylim=(0, 1))
    legend_below(right, columns=2)
    return picture_of(canvas)


def side_by_side(probes: Mapping[str, Probe]) -> Picture:
    """Two models (base against instruct): separation per layer, and their directions' cosines."""
    canvas, axes = canvas_of(3, (WIDE, 2.9))
    for axis, (name, probe) in zip(axes, probes.items(), strict=False):
        _band(
            axis, _layers(probe), [one.test_auroc for one in probe.scores], COLOURS[0], "test AUROC"
        )
        _controls(axis, probe)
        axis.set(xlabel="layer", ylim=(0, 1.02))
        axis.set_title(literal(f"{name}\nbest layer {probe.best_layer}"), fontsize=8)
    first, second = list(probes.values())[:2]
    values = np.diag(cosines(first.directions, second.directions))
    axes[2].plot(_layers(first)[: len(values)], values, color=COLOURS[1], marker="o", ms=3)
    chance = 1.96 / np.sqrt(first.best.vector.numel())
    axes[2].axhspan(-chance, chance, color=COLOURS[5], alpha=0.3, lw=0)
    axes[2].set(xlabel="layer", ylim=(-1, 1.05))
    axes[2].set_title("cosine between the two", fontsize=8)
    whole_layers(*axes)
    legend_outside(canvas, axes[0], 3, "lower")
    return picture_of(canvas)


def transfers(probe: Probe, found: Mapping[str, Transfer]) -> Picture:
    """AUROC on other question sets beside the own test items and the controls."""
    canvas, (axis,) = canvas_of(1, (WIDE, 3.6))
    tests = [one.test_auroc for one in probe.scores]
    _band(axis, _layers(probe), tests, COLOURS[0], "own test items")
    for index, (name, one) in enumerate(found.items(), start=1):
        _band(axis, np.array(one.layers), list(one.auroc), COLOURS[index], name)
        low, high = (np.array([getattr(each, end) for each in one.random]) for end in _ENDS)
        axis.fill_between(
            one.layers,
            low,
            high,
            color=COLOURS[5],
            alpha=0.25,
            lw=0,
            label="random directions, better sign",
        )
    null = probe.shuffled
    axis.axhspan(null.low, null.high, color=COLOURS[6], alpha=0.25, lw=0, label="shuffled labels")
    axis.axhline(0.5, color="black", lw=0.6)
    axis.set(xlabel="layer", ylabel="AUROC", ylim=(0, 1.02))
    legend_below(axis, columns=2)
    whole_layers(axis)
    return picture_of(canvas)


_ENDS = ("low", "high")
_NAMES = {"random_auroc": "random directions, 95 %", "shuffled_auroc": "shuffled labels, 95 %"}


def _layers(probe: Probe) -> Any:
    return np.array([one.layer for one in probe.scores])


def _band(axis: Any, layers: Any, found: list[Estimate], colour: str, name: str) -> None:
    low, high = (np.array([getattr(one, end) for one in found]) for end in _ENDS)
    axis.fill_between(layers, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(
        layers, [one.value for one in found], color=colour, marker="o", ms=3, label=literal(name)
    )


def _controls(axis: Any, probe: Probe) -> None:
    for name, colour in (("random_auroc", COLOURS[5]), ("shuffled_auroc", COLOURS[6])):
        found = [getattr(one, name) for one in probe.scores]
        low, high = (np.array([getattr(one, end) for one in found]) for end in _ENDS)
        axis.fill_between(
            _layers(probe), low, high, color=colour, alpha=0.3, lw=0, label=_NAMES[name]
        )


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
