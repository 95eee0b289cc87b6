"""What probes and directions draw of themselves: numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lirefs.directions.direction import Direction
from lirefs.pictures import (
    COLOURS,
    WIDE,
    canvas_of,
    colour_bar,
    integer_layer_ticks,
    legend_below,
    literal_text,
    styled,
)
from lirefs.statistics.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


@styled
def draw_separation(
    layers: Sequence[int],
    test: Sequence[Estimate],
    validation: Sequence[float],
    along: Sequence[tuple[float, float]],
    best_layer: int,
    shuffled: Estimate,
    words: float,
    names: tuple[str, str],
) -> Canvas:
    """AUROC per layer with its controls, and mean cosine with the direction per class.

    Args:
        layers: The layers, in order.
        test: Test AUROC at each.
        validation: Validation AUROC at each.
        along: Mean cosine of each class with the direction: of the second label, of the first.
        best_layer: The layer that was chosen.
        shuffled: Test AUROC of the best layer with shuffled labels.
        words: Test AUROC of a bag of words.
        names: The two labels, first the one that the directions point to.
    """
    canvas, (left, right) = canvas_of(2, (WIDE, 3.2))
    ends = np.array([(one.low, one.high) for one in test]).T
    left.fill_between(layers, *ends, color=COLOURS[0], alpha=0.2, lw=0)
    values = [one.value for one in test]
    left.plot(layers, values, color=COLOURS[0], marker="o", ms=3, label="test, 95 % interval")
    left.plot(layers, validation, color=COLOURS[5], ls="--", label="validation (chooses the layer)")
    left.axvline(best_layer, color="black", lw=0.8, ls=":", label=f"chosen: layer {best_layer}")
    left.axhspan(shuffled.low, shuffled.high, color=COLOURS[6], alpha=0.25, lw=0)
    label = "shuffled labels, best layer, 95 % range"
    left.axhline(shuffled.value, color=COLOURS[6], label=label)
    left.axhline(words, color=COLOURS[1], ls="-.", label="bag of words (no model)")
    left.set(xlabel="layer", ylabel="AUROC", ylim=(None, 1.02))
    first, second = map(literal_text, names)
    left.set_title(f"{first} against {second}, n = {test[0].n} test questions")
    legend_below(left, columns=1)
    cosines = np.array(along)
    right.plot(layers, cosines[:, 1], color=COLOURS[2], marker="o", ms=3, label=first)
    right.plot(layers, cosines[:, 0], color=COLOURS[3], marker="s", ms=3, label=second)
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="layer", ylabel="mean cosine with the direction")
    right.set_title("test states along each layer's direction")
    legend_below(right, columns=2)
    integer_layer_ticks(left, right)
    return canvas


@styled
def draw_directions(directions: Sequence[Direction]) -> Canvas:
    """Norm of each direction by layer, a line for each site, and the cosines between all."""
    canvas, (left, right) = canvas_of(2, (WIDE, 3.0))
    sites = list(dict.fromkeys(one.site for one in directions))
    ordered = sorted(directions, key=lambda one: (sites.index(one.site), one.layer))
    for index, site in enumerate(sites):
        own = [one for one in ordered if one.site == site]
        norms = [one.norm for one in own]
        left.plot([one.layer for one in own], norms, "o-", color=COLOURS[index], ms=3, label=site)
    left.set(xlabel="layer", ylabel="norm, in units of the activations", ylim=(0, None))
    legend_below(left, columns=2)
    integer_layer_ticks(left)
    units = torch.stack([one.unit.detach().float().cpu() for one in ordered])
    cosines = (units @ units.T).numpy()
    picture = right.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1, origin="lower")
    step = -(-len(ordered) // 12)  # at most 12 labels
    places = range(0, len(ordered), step)
    labels = [
        f"{ordered[place].layer}" + (f" {ordered[place].site}" if len(sites) > 1 else "")
        for place in places
    ]
    right.set_xticks(places, labels, rotation=90 if len(sites) > 1 else 0)
    right.set_yticks(places, labels)
    right.set(xlabel="layer", ylabel="layer")
    right.set_title("cosine between directions")
    colour_bar(canvas, picture, right, "cosine")
    return canvas
