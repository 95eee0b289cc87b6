"""One command line for both packages."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs import (
    commands_curvature,
    commands_organism,
    commands_report,
    commands_steering,
    study,
    study_report,
)
from lirefs.builtin import language_seed
from lirefs.errors import SettingError
from lirefs.files import cache_dir
from lirefs.harness import plots, report, suite
from lirefs.organism import suite as organism
from lirefs.organism.language import Language
from lirefs.probe import Probe

DEFAULT_MODEL = "organism"
DEFAULT_FOR_OWN_DATA = "smollm2-135m"  # the organism reads its own language only
KEEP, STRENGTH = 0.8, 1.0
BATCH_TOKENS = 1024

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(commands_organism.app, name="organism")
commands_steering.register(app)
commands_report.register(app)
app.add_typer(commands_curvature.app, name="curvature")
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line; errors of ours end in one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (lirefs.LirefsError, kfac.KfacError) as error:
        message = " ".join(str(error).split())
        console.print(f"{type(error).__name__}: {message}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; finished activations and factors are kept in the cache")
        sys.exit(130)


@app.callback()
def _root() -> None:
    """Reasoning against recitation in language models."""


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, hub id, folder or .gguf file. Default: organism; with questions, "
            "memorized texts or factors of your own, smollm2-135m."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="Labelled questions (JSON Lines) to fit on.")
    ] = None,
    memorized: Annotated[
        Path | None, typer.Option(help="Memorized texts (JSON Lines) to recite.")
    ] = None,
    factors: Annotated[
        Path | None, typer.Option(help="Factors to use; written there if the file is missing.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose MLPs are edited, e.g. 20,21,22.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Curvature mass that K-FAC keeps. Default: 0.8; organism: chosen."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="a of h + a d, d the class difference. Default: 1; organism: chosen."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    seed: Annotated[int, typer.Option(help="Seed of splits, labels and controls.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="14 items a task: a trial, no result.")
    ] = False,
) -> None:
    """Compare LiReF steering and the K-FAC edit on one model, and write a report.

    On the organism, settings that are not given are chosen on validation items.
    """
    # Everything that can be wrong is looked at before the model is loaded.
    if out.exists() and not out.is_dir():
        raise SettingError(f"--out {out}: exists and is not a folder")
    if keep is not None and not 0 < keep <= 1:
        raise kfac.KeepError(f"--keep {keep}: must be in (0, 1]")
    wanted = _indices(layers)
    own_data = any(one is not None for one in (questions, memorized, factors))
    model = model or (DEFAULT_FOR_OWN_DATA if own_data else DEFAULT_MODEL)
    taught = language_seed(model)
    if taught is not None and own_data:
        raise SettingError("an organism reads its own language only; give another --model")
    if taught is not None:
        _study(model, Language(taught), out, device, wanted, keep, strength, seed, quick)
        return
    keep, strength = keep or KEEP, STRENGTH if strength is None else strength
    question_set = lirefs.load_questions("default" if questions is None else questions)
    split = question_set.split(seed=seed)
    if memorized is not None:
        lirefs.files.read_jsonl(memorized)
    cache = cache_dir()

    console.rule(f"1/4  model: {model}")
    lm = lirefs.load(model, device=device)
    console.print(lm.layout.describe(), markup=False)
    tasks = lirefs.default_tasks(lm, split.test, memorized, limit=14 if quick else None)
    edited = _edited_layers(lm, wanted)

    console.rule(f"2/4  direction: {len(question_set)} questions")
    probe = lirefs.fit(lm, split, seed=seed, cache=cache / "activations")
    for line in _probe_lines(probe):
        console.print(line, markup=False)

    console.rule(f"3/4  curvature: MLPs of layers {', '.join(map(str, edited))}")
    texts = suite.calibration_texts()[: 30 if quick else None]
    collected = _factors(lm, edited, factors, cache, seed, texts)
    edit = kfac.CurvatureEdit(collected, keep)
    validation = suite.heldout_texts("validation")[: 6 if quick else None]
    with console.status("matching SVD to the perplexity of K-FAC"):
        svd, matched = study.matched_svd(
            lm, edit, [text for _, text in validation], collected.names
        )
    console.print(matched, markup=False)

    console.rule("4/4  comparison")
    steer = probe.best.steer("add", strength)
    interventions: dict[str, Any] = {
        "LiReF": steer,
        "K-FAC": edit,
        "LiReF + K-FAC": steer + edit,
        "random direction": probe.best.random_like(seed).steer("add", strength),
        "SVD": svd,
        "random pairs": kfac.RandomPairsEdit(collected, keep, seed=seed),
    }
    settings = {
        "findings": [*_probe_lines(probe), *_edit_lines(lm, edit), matched],
        "probe": probe.to_dict(),
        "factors": collected.digest,
        "settings": {"seed": seed, "keep": keep, "strength": strength, "layers": edited},
    }
    comparison = lirefs.compare(lm, interventions, tasks, seed=seed, provenance=settings)
    page = comparison.save(
        out,
        [
            *report.default_figures(comparison),
            _separation_figure(probe),
            _spectrum_figure(collected, collected.names, keep),
        ],
    )
    probe.directions.save(out / "directions.safetensors")
    _print_overview(comparison)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def _study(
    model: str,
    language: Language,
    out: Path,
    device: str | None,
    layers: list[int] | None,
    keep: float | None,
    strength: float | None,
    seed: int,
    quick: bool,
) -> None:
    """An organism's main job: all settings that are not given are chosen on validation items."""
    cache = cache_dir()
    console.rule(f"1/3  model: {model}")
    lm = lirefs.load(model, device=device)
    console.print(lm.layout.describe(), markup=False)
    layers = None if layers is None else _edited_layers(lm, layers)

    console.rule("2/3  curvature: every MLP")
    texts = organism.training_texts(language, 300 if quick else 1500, seed)
    collected = _factors(lm, list(range(lm.n_layers)), None, cache, seed, texts)

    console.rule("3/3  comparison")
    found = study.run(
        lm,
        collected,
        language,
        layers=layers,
        keep=keep,
        strength=strength,
        limit=14 if quick else 80,
        seed=seed,
        cache=cache / "activations",
        say=lambda line: console.print(line, markup=False),
    )
    chosen = dict(found.edit.intervention.keep)
    shown = study_report.figures(found)
    shown.append(_spectrum_figure(collected, list(chosen), next(iter(chosen.values()))))
    comparison = found.comparison
    comparison.provenance.update(study_report.provenance(found))
    comparison.provenance["factors"] = collected.digest
    comparison.provenance["settings"] = {
        "seed": seed,
        "quick": quick,
        "language": language.seed,
        "given": {"layers": layers, "keep": keep, "strength": strength},
    }
    page = comparison.save(out, shown)
    for form, probe in found.probes.items():
        probe.directions.save(out / f"directions-{form}.safetensors")
    _print_overview(comparison)
    for line in comparison.provenance["findings"]:
        console.print(line, markup=False)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def _indices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise SettingError(f"--layers {text!r}: expected indices such as 20,21,22") from None


def _edited_layers(lm: lirefs.LanguageModel, wanted: list[int] | None) -> list[int]:
    """Three layers from two thirds of the depth on, near the paper's 23-25 of 32."""
    if wanted is None:
        start = round(lm.n_layers * 2 / 3)
        return list(range(start, min(start + 3, lm.n_layers)))
    wrong = [layer for layer in wanted if not 0 <= layer < lm.n_layers]
    if wrong:
        raise SettingError(f"--layers: {wrong[0]} does not exist; the model has {lm.n_layers}")
    return wanted


def _factors(
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
            console.print(f"{path}: damaged, made again", markup=False)
    batches = [
        lm.pad([ids[row] for row in rows], side="right")
        for rows in lirefs.batching.batches_by_tokens([len(row) for row in ids], BATCH_TOKENS)
    ]
    provenance = {"data": hashlib.sha256(repr(ids).encode()).hexdigest(), "model": lm.fingerprint}
    collected = kfac.collect(lm.model, batches, targets, seed=seed, provenance=provenance)
    collected.save(path)
    return collected


def _probe_lines(probe: Probe) -> list[str]:
    best = probe.best_scores
    return [
        f"Direction: layer {probe.best_layer} ({probe.best.site}) has the highest validation "
        f"AUROC; its test AUROC is {best.test_auroc}, n = {best.test_auroc.n}; accuracy "
        f"{best.test_accuracy}.",
        f"Controls: test AUROC with shuffled labels {probe.shuffled} (mean and 95 % range over "
        f"shuffles, layer chosen anew); bag of words {probe.bag_of_words}, "
        f"n = {probe.bag_of_words.n}.",
    ]


def _edit_lines(lm: lirefs.LanguageModel, edit: kfac.CurvatureEdit) -> list[str]:
    rows = edit.report(lm.model)
    pairs = sum(row.pairs for row in rows)
    total = sum(row.total_pairs for row in rows)
    return [
        f"K-FAC edit: {len(rows)} matrices, {pairs:,} of {total:,} pairs kept "
        f"({pairs / total:.1%}); relative weight change "
        + ", ".join(f"{row.name} {row.relative_change:.2f}" for row in rows)
        + "."
    ]


def _spectrum_figure(factors: kfac.Factors, names: Sequence[str], keep: float) -> report.Figure:
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


def _separation_figure(probe: Probe) -> report.Figure:
    return report.Figure(
        "separation",
        "Direction separation per layer",
        "Left: AUROC of the mean-difference direction on test questions with 95 % bootstrap "
        "intervals, beside its controls. Right: mean cosine of the test questions' states, "
        "measured from the middle of the train class means, with each layer's direction.",
        plots.direction_separation(probe),
    )


def _print_overview(comparison: lirefs.Comparison) -> None:
    table = Table(title="retained share of the unchanged model, mean over tasks")
    table.add_column("variant")
    for group in comparison.groups:
        table.add_column(group)
    for variant in comparison.variants[1:]:
        kept = [comparison.retained(variant, group) for group in comparison.groups]
        table.add_row(variant, *(f"{one:.2f}" for one in kept))
    Console().print(table)
