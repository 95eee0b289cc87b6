"""Steps that commands share: batches, factors, sentences, figures."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import kfac
import lirefs
from lirefs.batching import batches_by_tokens
from lirefs.errors import SettingError
from lirefs.files import read_jsonl
from lirefs.harness import plots, report
from lirefs.harness.analyses import by_tag
from lirefs.harness.analysis_plots import tag_bars
from lirefs.harness.arithmetic import arithmetic_errors, steps
from lirefs.harness.comparison import BASELINE
from lirefs.probe import Probe

BATCH_TOKENS = 1024

_log = logging.getLogger(__name__)


def edited_layers(lm: lirefs.LanguageModel, wanted: list[int] | None) -> list[int]:
    """Three layers from two thirds of the depth on, near the paper's 23-25 of 32."""
    if wanted is None:
        start = round(lm.n_layers * 2 / 3)
        return list(range(start, min(start + 3, lm.n_layers)))
    wrong = [layer for layer in wanted if not 0 <= layer < lm.n_layers]
    if wrong:
        raise SettingError(f"--layers: {wrong[0]} does not exist; the model has {lm.n_layers}")
    return wanted


def batches_of(
    lm: lirefs.LanguageModel, ids: Sequence[Sequence[int]]
) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """Return the order in which texts come, and right-padded batches of their token ids."""
    groups = batches_by_tokens([len(row) for row in ids], BATCH_TOKENS)
    batches = [lm.pad([ids[row] for row in rows], side="right") for rows in groups]
    return [row for rows in groups for row in rows], batches


def factors_of(
    lm: lirefs.LanguageModel,
    layers: Sequence[int],
    given: Path | None,
    cache: Path,
    seed: int,
    texts: Sequence[str],
) -> kfac.Factors:
    """Factors from the file given, from the cache, or collected now and kept."""
    if given is not None and given.exists():
        return kfac.Factors.load(given, model=lm.model)
    targets = kfac.find_targets(lm.model, layers=layers)
    ids = lm.encode(texts)
    made_of = repr((lm.fingerprint, ids, [one.name for one in targets], seed, lirefs.__version__))
    key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    path = cache / "factors" / f"{key}.safetensors" if given is None else given
    if path.exists():
        try:
            return kfac.Factors.load(path, model=lm.model)
        except kfac.FactorsFileError:
            _log.warning("%s: damaged, made again", path)
    _, batches = batches_of(lm, ids)
    provenance = {"data": hashlib.sha256(repr(ids).encode()).hexdigest(), "model": lm.fingerprint}
    collected = kfac.collect(lm.model, batches, targets, seed=seed, provenance=provenance)
    try:
        collected.save(path)
    except kfac.WriteError as error:
        if given is not None:
            raise
        _log.warning("%s; going on, but they are collected again next time", error)
    return collected


def load_with_factors(
    model: str, device: str | None, factors: Path
) -> tuple[lirefs.LanguageModel, kfac.Factors]:
    """Read the factors before the model, which takes longer, and check that they fit."""
    known = kfac.Factors.load(factors)
    lm = lirefs.load(model, device=device)
    known.check(lm.model)
    return lm, known


def texts_of(path: Path) -> list[str]:
    """Texts of a JSON Lines file, each row with a `text`."""
    rows = read_jsonl(path)
    for line, row in rows:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise SettingError(f"{path}, line {line}: needs a `text` that is not empty")
    return [str(row["text"]) for _, row in rows]


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


def spectrum_figure(factors: kfac.Factors, names: Sequence[str], keep: float) -> report.Figure:
    """The curvature mass of some targets, and what of it an edit keeps."""
    spectra = []
    for name in names:
        eigen = factors.eigen(name)
        lam, mu = eigen.lam.numpy(), eigen.mu.numpy()
        size = len(lam) * len(mu)
        grid = [*np.linspace(0.05, 0.95, 19), 0.99, 0.999]
        curve = [(kfac.staircase(lam, mu, level).pairs / size, level) for level in grid]
        counts = kfac.staircase(lam, mu, keep).counts
        spectra.append(plots.Spectrum(name, lam, mu, np.asarray(counts), np.array(curve), keep))
    return report.Figure(
        "spectrum",
        "Curvature spectrum and what the edit keeps",
        f"Left: share of the curvature mass held by the largest pairs, one line per matrix "
        f"({factors.tokens:,} tokens, sampled labels). Right: mass of one matrix; pairs to the "
        f"left of the line are kept at keep = {keep:g}.",
        plots.curvature_spectrum(spectra),
    )


def separation_figure(probe: Probe) -> report.Figure:
    """AUROC and cosines of a probe's directions, layer by layer."""
    return report.Figure(
        "separation",
        "Direction separation per layer",
        "Left: AUROC of the mean-difference direction on test questions with 95 % bootstrap "
        "intervals, beside its controls. Right: mean cosine of the test questions' states, "
        "measured from the middle of the train class means, with each layer's direction.",
        plots.direction_separation(probe),
    )


def arithmetic_lines(comparison: lirefs.Comparison, variants: Sequence[str]) -> list[str]:
    """What happened to the calculations of worked answers that a variant made wrong."""
    lines = []
    for task, info in comparison.tasks.items():
        outputs = [one.output for one in comparison.results[BASELINE][task]]
        if info.group != "arithmetic" or not any(map(steps, outputs)):
            continue
        for variant in variants:
            found = arithmetic_errors(comparison, task, variant)
            if found.lost:
                counts = "; ".join(f"{verdict} {n}" for verdict, n in found.counts.items() if n)
                lines.append(
                    f"Worked answers of {task} that are right unchanged and wrong under {variant}, "
                    f"n = {found.lost}: {counts}."
                )
    return lines


def tag_figures(comparison: lirefs.Comparison, variants: Sequence[str]) -> list[report.Figure]:
    """Change of each relation, or other class of items, for every task whose items have some."""
    figures = []
    for task, info in comparison.tasks.items():
        tags = {one.id.rpartition("/")[0] for one in comparison.results[BASELINE][task]}
        if len(tags) < 2 or "" in tags or info.metric == "perplexity":
            continue
        for variant in variants:
            found = by_tag(comparison, task, variant)
            figures.append(
                report.Figure(
                    re.sub("[ /]", "_", f"{task}-{variant}"),
                    f"{task} by class under {variant}",
                    "Change of the score relative to the unchanged model, with 95 % intervals; at "
                    "the right the unchanged score and the number of items.",
                    tag_bars(found),
                )
            )
    return figures
