"""Findings and figures that every main job shares."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

import kfac
import lirefs
from kfac.figures import Spectrum, curvature_spectrum
from lirefs.comparison.comparison import BASELINE
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.item_changes import by_tag
from lirefs.directions.figures import direction_separation
from lirefs.directions.probe import Probe


def probe_lines(probe: Probe) -> list[str]:
    """What a probe found, with its controls, in sentences."""
    best = probe.best_scores
    return [
        f"Direction: layer {probe.best_layer} ({probe.best.site}) has the highest validation "
        f"AUROC; its test AUROC is {best.test_auroc}, n = {best.test_auroc.n}; accuracy "
        f"{best.test_accuracy}.",
        f"Controls: test AUROC with shuffled labels {probe.shuffled} (mean and 95 % range over "
        f"shuffles, layer chosen anew); bag of words {probe.bag_of_words}, "
        f"n = {probe.bag_of_words.n}.",
    ]


def edit_lines(lm: lirefs.LanguageModel, edit: kfac.CurvatureEdit) -> list[str]:
    """How much of each matrix an edit keeps, in a sentence."""
    rows = edit.report(lm.model)
    pairs = sum(row.pairs for row in rows)
    total = sum(row.total_pairs for row in rows)
    return [
        f"K-FAC edit: {len(rows)} matrices, {pairs:,} of {total:,} pairs kept "
        f"({pairs / total:.1%}); relative weight change "
        + ", ".join(f"{row.name} {row.relative_change:.2f}" for row in rows)
        + "."
    ]


def spectrum_figure(factors: kfac.Factors, names: Sequence[str], keep: float) -> Figure:
    """The curvature mass of some targets, and what of it an edit keeps."""
    spectra = []
    for name in names:
        eigen = factors.eigen(name)
        lam, mu = eigen.lam.numpy(), eigen.mu.numpy()
        size = len(lam) * len(mu)
        grid = [*np.linspace(0.05, 0.95, 19), 0.99, 0.999]
        curve = [(kfac.staircase(lam, mu, level).pairs / size, level) for level in grid]
        counts = kfac.staircase(lam, mu, keep).counts
        spectra.append(Spectrum(name, lam, mu, np.asarray(counts), np.array(curve), keep))
    return Figure(
        "spectrum",
        "Curvature spectrum and what the edit keeps",
        f"Left: share of the curvature mass held by the largest pairs, one line per matrix "
        f"({factors.tokens:,} tokens, sampled labels). Right: mass of one matrix; pairs to the "
        f"left of the line are kept at keep = {keep:g}.",
        curvature_spectrum(spectra),
    )


def separation_figure(probe: Probe) -> Figure:
    """AUROC and cosines of a probe's directions, layer by layer."""
    return Figure(
        "separation",
        "Direction separation per layer",
        "Left: AUROC of the mean-difference direction on test questions with 95 % bootstrap "
        "intervals, beside its controls. Right: mean cosine of the test questions' states, "
        "measured from the middle of the train class means, with each layer's direction.",
        direction_separation(probe),
    )


def tag_figures(comparison: lirefs.Comparison, variants: Sequence[str]) -> list[Figure]:
    """Change of each relation, or other class of items, for every task whose items have some."""
    figures = []
    for task, info in comparison.tasks.items():
        tags = {one.id.rpartition("/")[0] for one in comparison.results[BASELINE][task]}
        if len(tags) < 2 or "" in tags or info.metric == "perplexity":
            continue
        for variant in variants:
            found = by_tag(comparison, task, variant)
            figures.append(
                Figure(
                    re.sub("[ /]", "_", f"{task}-{variant}"),
                    f"{task} by class under {variant}",
                    "Change of the score relative to the unchanged model, with 95 % intervals; at "
                    "the right the unchanged score and the number of items.",
                    tag_bars(found),
                )
            )
    return figures
