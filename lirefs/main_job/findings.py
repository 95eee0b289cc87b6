"""Findings and figures that every main job shares."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import kfac
import lirefs
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.item_changes import changes_by_tag
from lirefs.comparison.wording import as_number, as_p, as_percent, as_points
from lirefs.directions.probe import Probe
from lirefs.main_job.grid import KEEPS
from lirefs.main_job.matching import AFFORDABLE
from lirefs.pictures import picture_of


def probe_lines(probe: Probe) -> list[str]:
    """What a probe found, and its controls: a finding each."""
    best, words = probe.best_scores, probe.bag_of_words
    return [
        f"The direction separates the classes best at layer {probe.best_layer}. Test AUROC: "
        f"{best.test_auroc} (n = {best.test_auroc.n}); accuracy: {as_percent(best.test_accuracy)}. "
        f"Layer chosen by validation AUROC; site {probe.best.site}.",
        f"Its controls show how much separation chance and words alone give. Test AUROC: "
        f"{probe.shuffled} with shuffled labels, {words} with a bag of words (n = {words.n}). "
        "Shuffled: mean and 95 % range over shuffles, the layer chosen for each.",
    ]


def edit_line(lm: lirefs.LanguageModel, edit: kfac.CurvatureEdit, keep: float, given: bool) -> str:
    """How much of each matrix an edit keeps, as a finding, and whether `keep` was given."""
    chosen = (
        f"of {KEEPS[0]:g} to {KEEPS[-1]:g} the smallest that costs at most "
        f"{as_number(100 * (AFFORDABLE - 1))} % of validation perplexity, or the largest"
    )
    rows = edit.report(lm.model)
    pairs, total = sum(row.pairs for row in rows), sum(row.total_pairs for row in rows)
    changes = ", ".join(f"{row.name} {row.relative_change:.2f}" for row in rows)
    return (
        f"The K-FAC edit keeps {as_number(100 * pairs / total)} % of the curvature pairs. Kept: "
        f"{pairs:,} of {total:,} in {len(rows)} matrices. Relative weight change: {changes}. "
        f"Keep {keep:g}, {'as it was given' if given else chosen}."
    )


def largest_changes(comparison: Comparison) -> list[str]:
    """The task outside memorization that each method changes most in points, a finding each.

    All tasks whose scores are shares are looked at, those with two competing answers too.
    """
    summary = comparison.summary()
    base, lines = summary.variants[0], []
    tasks = [
        task
        for task, info in summary.tasks.items()
        if info.group != "memorization" and info.metric != "perplexity"
    ]
    for variant in summary.methods:
        changes = {
            task: change
            for task in tasks
            if (change := summary.cells[variant, task].difference) and math.isfinite(change.value)
        }
        if not changes:
            continue
        task, change = max(changes.items(), key=lambda pair: abs(pair[1].value))
        cell, before = summary.cells[variant, task], summary.cells[base, task].value
        claim = f"{variant} changes {task} most."
        if not cell.clear:
            claim = f"The largest change under {variant}, in {task}, is not clear."
        lines.append(
            f"{claim} From {as_percent(before)} to {as_percent(cell.value)} of {before.n}: "
            f"{as_points(change)}, p (Holm) {as_p(cell)}. Largest change among "
            f"{len(tasks)} tasks."
        )
    return lines


def spectrum_figure(factors: kfac.Factors, names: Sequence[str], keep: float) -> Figure:
    """The curvature mass of some targets, and the part of it that an edit keeps."""
    return Figure(
        "spectrum",
        "Curvature spectrum and what the edit keeps",
        f"Left: share of the curvature mass held by the largest pairs, one line per matrix "
        f"({factors.tokens:,} tokens, sampled labels). Right: mass of one matrix; pairs to the "
        f"left of the line are kept at keep = {keep:g}.",
        picture_of(factors.plot(names, keep)),
    )


def separation_figure(probe: Probe, questions: str = "") -> Figure:
    """AUROC and cosines of a probe's directions, layer by layer."""
    return Figure(
        "separation",
        f"Direction separation per layer{questions}",
        "Left: AUROC of the mean-difference direction on test questions with 95 % bootstrap "
        "intervals, and its controls. Right: mean cosine of the test questions' states, "
        "measured from the midpoint of the train class means, with each layer's direction.",
        picture_of(probe.plot()),
    )


def tag_figures(comparison: lirefs.Comparison, variants: Sequence[str]) -> list[Figure]:
    """Change of each relation, or other class of items, for every task that has such classes."""
    figures = []
    for task, info in comparison.tasks.items():
        tags = {one.id.rpartition("/")[0] for one in comparison.results[BASELINE][task]}
        if len(tags) < 2 or "" in tags or info.metric == "perplexity":
            continue
        figures += [
            Figure(
                re.sub("[ /]", "_", f"{task}-{variant}"),
                f"{task} by class under {variant}",
                "Change of the score relative to the unchanged model, with 95 % intervals; at "
                "the right the unchanged score and the number of items.",
                tag_bars(changes_by_tag(comparison, task, variant)),
            )
            for variant in variants
        ]
    return figures
