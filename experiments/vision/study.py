"""Edits of networks that memorized wrong labels, with settings chosen on validation images.

Every number is measured for several seeds, each with its own weights, noise and split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from torch import Tensor
from transformers import ViTForImageClassification

import kfac
from experiments.vision.data import Images, NoisySplit, noisy_split
from experiments.vision.edits import (
    METHODS,
    PROJECTIONS,
    Setting,
    Trained,
    VisionScores,
    answers,
    score,
)
from experiments.vision.training import VisionRecipe, train
from lirefs.errors import SettingError
from lirefs.statistics import Estimate
from lirefs.statistics.intervals import Floats

PAPER_KEEP = 0.75
KEEPS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999)
RANKS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)
"""Shares of the singular values to keep, for SVD."""
TOLERANCE = 0.005
"""Validation accuracy that a chosen setting may cost, on average over seeds."""


@dataclass(frozen=True, eq=False)
class Decay:
    """A network trained with another weight decay."""

    weight_decay: float
    before: VisionScores
    after: VisionScores
    bands: kfac.BandRatios | None


@dataclass(frozen=True, eq=False)
class Sheet:
    """Noised images: pixels (N, channels, side, side) in [0, 1] and four labels of each, (N,)."""

    pixels: Tensor
    shown: Tensor
    before: Tensor
    after: Tensor
    truth: Tensor
    classes: list[str]


@dataclass(frozen=True, eq=False)
class VisionStudy:
    """All results of the study.

    Attributes:
        seeds: Seeds, one network for each.
        blocks: Edited blocks.
        chosen: Setting of each method, chosen on validation images.
        shares: Share of pairs that the settings of K-FAC and EK-FAC keep.
        variants: Scores of each seed by variant.
        sweep: Scores of each seed by (method, projections, keep).
        single: Scores of each seed by (method, block), at the chosen settings.
        bands: Band ratios of each seed.
        decays: One network for each weight decay, first seed.
        sheet: Noised images of the first seed.
    """

    seeds: list[int]
    blocks: list[int]
    chosen: dict[str, Setting]
    shares: dict[str, float]
    variants: dict[str, list[VisionScores]]
    sweep: dict[tuple[str, str, float], list[VisionScores]]
    single: dict[tuple[str, int], list[VisionScores]]
    bands: list[kfac.BandRatios]
    decays: list[Decay]
    sheet: Sheet

    def mean(self, variant: str, metric: str) -> Estimate:
        """Mean over seeds."""
        return over_seeds(values(self.variants[variant], metric))

    def difference(self, one: str, other: str, metric: str) -> Estimate:
        """Mean over seeds of the difference of two variants, paired by seed."""
        return over_seeds(values(self.variants[one], metric) - values(self.variants[other], metric))


PAPERS = "K-FAC, the paper's setting"
UNEDITED, ORACLE = "unedited", "oracle (no noise)"


def run(
    images: Images,
    recipe: VisionRecipe,
    folder: Path,
    *,
    seeds: int = 5,
    tokens: str = "cls",
    blocks: Sequence[int] | None = None,
    fixed: Setting | None = None,
    decays: Sequence[float] = (),
    shipped: Path | None = None,
    progress: bool = True,
) -> VisionStudy:
    """Train, edit and score networks; trained ones are kept in a folder and reused.

    Args:
        images: All images; each seed splits them differently.
        recipe: Recipe of the training.
        folder: Folder for `NAME-SEED.safetensors` of every network.
        seeds: Number of networks, at least 2.
        tokens: Positions that the factors count, "cls" or "all".
        blocks: Blocks to edit; default: the first and the last, as in the paper.
        fixed: A setting to report without choosing; default: the paper's (up and down, keep 0.75).
        decays: Further weight decays for the heat map, one network each.
        shipped: A folder with networks, used if they match.
        progress: Show progress bars.

    Raises:
        SettingError: A setting is out of range.
        ProvenanceError: The folder has networks of another recipe or of other images.
    """
    if seeds < 2:
        raise SettingError(f"seeds={seeds}: intervals over seeds need at least 2 seeds")
    edited = sorted({0, recipe.blocks - 1} if blocks is None else set(blocks))
    fixed = fixed or Setting("up and down", PAPER_KEEP)
    if fixed.projections not in PROJECTIONS:
        raise SettingError(f"projections={fixed.projections!r}: use {', '.join(PROJECTIONS)}")

    def trained(
        name: str, one: VisionRecipe, seed: int
    ) -> tuple[NoisySplit, ViTForImageClassification]:
        split = noisy_split(images, one.noise, seed)
        path = folder / f"{name}-{seed}.safetensors"
        given = None if shipped is None else shipped / path.name
        model = train(split, one, seed, path, title=path.stem, shipped=given, progress=progress)
        return split, model

    numbers = list(range(seeds))
    nets = [Trained(*trained("noised", recipe, seed), tokens, seed) for seed in numbers]
    variants = {UNEDITED: [net.score() for net in nets]}
    sweep = {
        (method, projections, keep): [
            net.score(net.edit(method, Setting(projections, keep), edited)) for net in nets
        ]
        for method in METHODS
        for projections in PROJECTIONS
        for keep in (RANKS if method == "SVD" else KEEPS)
    }
    variants[PAPERS] = [net.score(net.edit("K-FAC", fixed, edited)) for net in nets]
    chosen = {
        method: choose(variants[UNEDITED], sweep, method)
        for method in METHODS
        if method != "random pairs"
    }
    chosen["random pairs"] = chosen["K-FAC"]
    for method, setting in chosen.items():
        variants[method] = sweep[method, setting.projections, setting.keep]
    variants[ORACLE] = []
    for seed, net in zip(numbers, nets, strict=True):
        split, model = trained("oracle", replace(recipe, noise=0.0), seed)
        variants[ORACLE].append(score(model, split, net.split))
    single = {
        (method, block): [net.score(net.edit(method, chosen[method], [block])) for net in nets]
        for method in ("K-FAC", "SVD")
        for block in range(recipe.blocks)
    }
    others = []
    for decay in sorted({*decays, recipe.weight_decay}):
        net = nets[0]
        if decay != recipe.weight_decay:
            one = replace(recipe, weight_decay=decay)
            net = Trained(*trained(f"decay{decay:g}", one, 0), tokens, 0)
        before = net.score()
        after = net.score(net.edit("K-FAC", chosen["K-FAC"], edited))
        others.append(Decay(decay, before, after, net.bands() if before.recited > 0 else None))
    return VisionStudy(
        numbers,
        edited,
        chosen,
        {m: _kept_pairs(nets, m, chosen[m], edited) for m in ("K-FAC", "EK-FAC")},
        variants,
        sweep,
        single,
        [net.bands() for net in nets],
        others,
        _sheet(nets[0], chosen["K-FAC"], edited),
    )


def choose(
    before: Sequence[VisionScores],
    sweep: dict[tuple[str, str, float], list[VisionScores]],
    method: str,
    tolerance: float = TOLERANCE,
) -> Setting:
    """Return the smallest keep at which validation accuracy does not fall, on average over seeds.

    Only accuracy on validation images counts. Among several projections at the same keep, the one
    with the best validation accuracy is chosen. If every setting costs more than the tolerance, the
    setting that costs least is chosen.

    Args:
        before: Scores of the unedited networks.
        sweep: Scores by (method, projections, keep), as in `VisionStudy`.
        method: Method whose settings are compared.
        tolerance: Accuracy that may be lost.
    """
    base = float(values(before, "validation").mean())
    options = {
        Setting(projections, keep): float(values(found, "validation").mean())
        for (one, projections, keep), found in sweep.items()
        if one == method
    }
    allowed = {s: v for s, v in options.items() if v >= base - tolerance}
    if not allowed:
        return max(options, key=lambda setting: options[setting])
    return min(allowed, key=lambda setting: (setting.keep, -allowed[setting]))


def values(scores: Sequence[VisionScores], metric: str) -> Floats:
    """Return one metric of each seed, shape (seeds,)."""
    return np.array([getattr(one, metric) for one in scores], dtype=np.float64)


def over_seeds(numbers: Floats) -> Estimate:
    """Mean with Student's 95 % interval; n counts seeds, at least 2."""
    count = len(numbers)
    half = float(student.ppf(0.975, count - 1) * numbers.std(ddof=1) / np.sqrt(count))
    mean = float(numbers.mean())
    return Estimate(mean, mean - half, mean + half, count)


def _kept_pairs(
    nets: Sequence[Trained], method: str, setting: Setting, blocks: Sequence[int]
) -> float:
    shares = []
    for net in nets:
        edit = net.edit(method, setting, blocks)
        assert isinstance(edit, kfac.SpectralEdit)
        rows = edit.report()
        shares.append(sum(row.pairs for row in rows) / sum(row.total_pairs for row in rows))
    return float(np.mean(shares))


def _sheet(net: Trained, setting: Setting, blocks: Sequence[int]) -> Sheet:
    split = net.split
    images, shown = split.train.take(split.noised), split.shown[split.noised]
    inputs = split.inputs(images)
    before = answers(net.model, inputs)
    with net.edit("K-FAC", setting, blocks).apply(net.model):
        after = answers(net.model, inputs)
    return Sheet(images.pixels, shown, before, after, images.labels, images.classes)
