"""Figures of the label-noise study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.vision.edits import METHODS, METRICS
from experiments.vision.study import UNEDITED, Sheet, VisionStudy, over_seeds, values
from lirefs.pictures import COLOURS, Picture, canvas_of, picture_of
from lirefs.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "recited": "noised label recited",
    "recovered": "true label recovered",
    "validation": "validation accuracy",
    "test": "test accuracy",
}
MARKERS = "os^D"


def keep_sweep(study: VisionStudy) -> Picture:
    """Every method and metric against keep, for the projections chosen for K-FAC."""
    projections = study.chosen["K-FAC"].projections
    shown = [metric for metric in METRICS if metric != "validation"]
    canvas, axes = canvas_of(len(shown), (4 * len(shown), 3.6))
    for axis, metric in zip(axes, shown, strict=True):
        for index, method in enumerate(METHODS):
            keeps = sorted(k for m, p, k in study.sweep if (m, p) == (method, projections))
            found = [
                over_seeds(values(study.sweep[method, projections, keep], metric)) for keep in keeps
            ]
            _line(axis, keeps, found, method, index)
        axis.axhline(study.mean(UNEDITED, metric).value, color="black", lw=0.8, ls=":")
        axis.set(title=NAMES[metric], ylim=(-0.03, 1.03))
        axis.set_xlabel("keep (of curvature mass; SVD: of singular values)", fontsize=8)
    axes[0].set_ylabel(f"share of images, {len(study.seeds)} seeds")
    axes[0].legend(fontsize=8)
    canvas.suptitle(f"{projections} of blocks {_listed(study.blocks)}; dotted: unedited")
    return picture_of(canvas)


def single_blocks(study: VisionStudy) -> Picture:
    """Edits of one block at a time, at the chosen settings."""
    shown = [metric for metric in METRICS if metric != "validation"]
    blocks = sorted({block for _, block in study.single})
    canvas, axes = canvas_of(len(shown), (3.4 * len(shown), 3.4))
    for axis, metric in zip(axes, shown, strict=True):
        for index, method in enumerate(("K-FAC", "SVD")):
            found = [over_seeds(values(study.single[method, block], metric)) for block in blocks]
            places = [block + 0.36 * (index - 0.5) for block in blocks]
            heights, errors = _parts(found)
            axis.bar(places, heights, 0.34, yerr=errors, color=COLOURS[index], label=method)
        axis.axhline(study.mean(UNEDITED, metric).value, color="black", lw=0.8, ls=":")
        axis.set(title=NAMES[metric], xlabel="edited block", xticks=blocks, ylim=(0, 1.03))
    axes[0].set_ylabel(f"share of images, {len(study.seeds)} seeds")
    axes[1].legend(fontsize=8)
    return picture_of(canvas)


def bands(study: VisionStudy) -> Picture:
    """Ratio of memorized to clean activation in each band of A, by block; mean over seeds."""
    first = study.bands[0]
    canvas, axes = canvas_of(2, (9.6, 3.8))
    for axis, table, title in (
        (axes[0], "ratio", "norm of the projection"),
        (axes[1], "control", "control: each input scaled to norm 1"),
    ):
        tables = np.stack([getattr(one, table)[0] for one in study.bands])
        for band, label in enumerate(first.labels):
            found = [over_seeds(tables[:, place, band]) for place in range(len(first.names))]
            places = [place + 0.08 * (band - 1.5) for place in range(len(first.names))]
            _line(axis, places, found, label, band, joined=False)
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xticks(range(len(first.names)), [_short(name) for name in first.names])
        axis.set_title(title, fontsize=10)
    axes[1].sharey(axes[0])
    axes[0].set_ylabel(f"memorized over clean images, {len(study.seeds)} seeds")
    axes[0].legend(fontsize=8)
    return picture_of(canvas)


def decays(study: VisionStudy) -> Picture:
    """Heat map of the ratio of memorized to clean activation: weight decay by band, per input."""
    rows = [one for one in study.decays if one.bands is not None]
    tables = [one.bands for one in rows if one.bands is not None]
    names = tables[0].names
    canvas, axes = canvas_of(len(names), (2.9 * len(names) + 1.2, 1.4 + 0.55 * len(rows)))
    for place, (axis, name) in enumerate(zip(axes, names, strict=True)):
        table = np.stack([one.ratio[0, place] for one in tables])
        axis.imshow(np.log2(table), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(table.shape[1]), tables[0].labels, fontsize=7, rotation=30)
        axis.set_yticks(range(len(rows)), ["" for _ in rows])
        axis.set_title(_short(name), fontsize=10)
    axes[0].set_yticks(
        range(len(rows)),
        [
            f"decay {one.weight_decay:g}\n"
            f"recited {one.before.recited:.0%} → {one.after.recited:.0%}"
            for one in rows
        ],
        fontsize=8,
    )
    return picture_of(canvas)


def sheet(one: Sheet, limit: int = 24) -> Picture:
    """Noised images with the label shown, the true label, and the answers before and after."""
    count = min(limit, len(one.shown))
    columns = min(8, count)
    rows = -(-count // columns)
    canvas, axes = canvas_of(columns, (1.25 * columns, 1.75 * rows), rows=rows)
    for index, axis in enumerate(axes):
        axis.axis("off")
        if index >= count:
            continue
        picture = one.pixels[index].permute(1, 2, 0).numpy()
        axis.imshow(picture if picture.shape[2] == 3 else picture[:, :, 0], cmap="gray")
        labels = (one.classes[int(part[index])] for part in (one.shown, one.before, one.after))
        truth = one.classes[int(one.truth[index])]
        right = bool(one.after[index] == one.truth[index])
        shown, before, after = labels
        axis.set_title(
            f"shown {shown}, true {truth}\n{before} → {after}",
            fontsize=8,
            color=COLOURS[2] if right else COLOURS[1],
        )
    return picture_of(canvas)


def _line(
    axis: Axes,
    places: Sequence[float],
    found: Sequence[Estimate],
    label: str,
    index: int,
    joined: bool = True,
) -> None:
    heights, errors = _parts(found)
    axis.errorbar(
        places,
        heights,
        yerr=errors,
        label=label,
        color=COLOURS[index],
        marker=MARKERS[index],
        ms=4,
        lw=1.2,
        ls="-" if joined else "none",
    )


def _parts(found: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    heights = [one.value for one in found]
    below = [one.value - one.low for one in found]
    above = [one.high - one.value for one in found]
    return heights, [below, above]


def _short(name: str) -> str:
    """Block and projection of a target: `vit.layers.0.mlp.fc1` is "block 0, up"."""
    block = next(part for part in name.split(".") if part.isdigit())
    return f"block {block}, {'up' if name.endswith('fc1') else 'down'}"


def _listed(blocks: Sequence[int]) -> str:
    return " and ".join(map(str, blocks))
