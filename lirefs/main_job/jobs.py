"""The main job in one call: both methods and their controls on a model, and a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.retained import default_figures
from lirefs.comparison.journal import Journal
from lirefs.comparison.summary import Summary
from lirefs.errors import KeepError, SettingError
from lirefs.files import cache_dir, read_jsonl
from lirefs.main_job import organism, organism_report
from lirefs.main_job.factors import edited_layers, factors_of
from lirefs.main_job.findings import (
    edit_lines,
    probe_lines,
    separation_figure,
    spectrum_figure,
    tag_figures,
)
from lirefs.organism.language import Language, language_seed
from lirefs.organism.suite import training_texts
from lirefs.tasks.papers.suite import Suite, suite_tasks
from lirefs.tasks.suite import calibration_texts, heldout_texts
from lirefs.tasks.task import Task

DEFAULT = "organism"
DEFAULT_FOR_OWN_DATA = "smollm2-135m"
"""The organism reads its own language only."""
QUICK = 14
"""Items of a task in a quick trial."""
KEEP, STRENGTH = 0.8, 1.0


@dataclass(frozen=True)
class Asked:
    """What was asked for, checked before anything is loaded."""

    model: str | lirefs.LanguageModel
    device: str | None
    layers: Sequence[int] | None
    keep: float | None
    strength: float | None
    suite: Suite | None
    data: Path | None
    memorized: Path | None
    factors: Path | None
    lm_eval: Sequence[str]
    out: Path
    seed: int
    limit: int | None
    quick: bool
    console: Console

    @property
    def journal(self) -> Path:
        """Where finished items are kept until the report is written."""
        return self.out / "unfinished"

    def load(self) -> lirefs.LanguageModel:
        """The model, described on the console."""
        name = self.model if isinstance(self.model, str) else self.model.name
        self.console.rule(f"model: {name}")
        lm = self.model
        if isinstance(lm, str):
            lm = lirefs.load(lm, device=self.device)
        self.console.print(lm.layout.describe(), markup=False)
        return lm


def run(
    model: str | lirefs.LanguageModel | None = None,
    *,
    device: str | None = None,
    questions: str | Path | None = None,
    memorized: str | Path | None = None,
    factors: str | Path | None = None,
    layers: Sequence[int] | None = None,
    keep: float | None = None,
    strength: float | None = None,
    suite: Suite | str | None = None,
    data: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    limit: int | None = None,
    out: str | Path = "report",
    seed: int = 0,
    quick: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> lirefs.Comparison:
    """Compare LiReF steering, the K-FAC edit and their controls on one model; write a report.

    Args:
        model: Built-in name, hub id, folder, `.gguf` file or a loaded model. None: the organism,
            or SmolLM2-135M with data of your own or lm-eval tasks. On an organism, settings that
            are not given are chosen on validation items.
        device: Where to load the model; None: CUDA where there is one.
        questions: Labelled questions (JSON Lines) to fit the direction on.
        memorized: Memorized texts (JSON Lines) to recite.
        factors: Curvature factors to use; written there if the file is missing.
        layers: Layers whose MLPs are edited; None: three, from two thirds of the depth on.
        keep: Share of the curvature mass that the edit keeps, in (0, 1].
        strength: a of h + a d, where d is the difference of the class means.
        suite: Tasks to run, see `Suite`; None: those that the project ships.
        data: Folder of JSON Lines for a suite, or of lm-eval tasks (YAML).
        lm_eval: Tasks of lm-evaluation-harness to add.
        limit: At most this many items a task.
        out: Folder of the report.
        seed: Seed of splits, labels and controls.
        quick: A trial with few items, which is not a result.
        resume: Continue an interrupted run in `out` instead of starting again.
        console: Where progress is shown; None: the standard error. Nothing is written by a
            process whose console is quiet.

    Returns:
        The comparison; the report is in `out`.

    Raises:
        KeepError: `keep` is outside (0, 1].
        SettingError: Another setting cannot be used, or settings do not go together.
        LirefsError: A file cannot be read, or the model cannot be loaded.
    """
    console = Console(stderr=True, highlight=False) if console is None else console
    data, memorized, factors = (
        None if one is None else Path(one) for one in (data, memorized, factors)
    )
    if keep is not None and not 0 < keep <= 1:
        raise KeepError(f"keep {keep}: must be in (0, 1]")
    if strength is not None and not math.isfinite(strength):
        raise SettingError(f"strength {strength}: must be finite")
    if data is not None and not data.is_dir():
        raise SettingError(f"data {data}: is not a folder")
    if data is not None and suite is None and not lm_eval:
        raise SettingError("data is read by a suite or by lm-eval tasks; name one")
    own_data = bool(lm_eval) or any(
        one is not None for one in (questions, memorized, factors, data)
    )
    if model is None:
        model = DEFAULT_FOR_OWN_DATA if own_data else DEFAULT
    if isinstance(model, str):
        taught = language_seed(model)
    else:
        taught = getattr(model.model.config, "language_seed", None)
    suite = None if suite is None else Suite(suite)
    if taught is not None and (own_data or suite is Suite.SKILLS):
        raise SettingError("an organism reads its own language only; give another model")
    if memorized is not None:
        read_jsonl(memorized)
    question_set = lirefs.load_questions("default" if questions is None else questions)
    asked = Asked(
        model=model,
        device=device,
        layers=layers,
        keep=keep,
        strength=strength,
        suite=suite,
        data=data,
        memorized=memorized,
        factors=factors,
        lm_eval=lm_eval,
        out=Path(out),
        seed=seed,
        limit=min(limit or QUICK, QUICK) if quick else limit,
        quick=quick,
        console=console,
    )
    if asked.journal.exists() and not resume:
        console.print("starting again; --resume would continue the interrupted run", markup=False)
        Journal(asked.journal).clear()
    if taught is None:
        return _on_language_model(asked, question_set)
    return _on_organism(asked, Language(taught))


def _on_language_model(asked: Asked, question_set: lirefs.Questions) -> lirefs.Comparison:
    """The main job on a model of ordinary language."""
    console = asked.console
    seed = asked.seed
    keep = asked.keep or KEEP
    strength = STRENGTH if asked.strength is None else asked.strength
    split = question_set.split(seed=seed)
    cache = cache_dir()

    lm = asked.load()
    tasks, left_out = _tasks(asked, lm, split)
    edited = edited_layers(lm, asked.layers)

    console.rule(f"direction: {len(question_set)} questions")
    probe = lirefs.fit(lm, split, seed=seed, cache=cache / "activations")
    for line in probe_lines(probe):
        console.print(line, markup=False)

    console.rule(f"curvature: MLPs of layers {', '.join(map(str, edited))}")
    texts = calibration_texts()[: 30 if asked.quick else None]
    collected = factors_of(lm, edited, asked.factors, cache, seed, texts)
    edit = kfac.CurvatureEdit(collected, keep)
    validation = heldout_texts("validation")[: 6 if asked.quick else None]
    with console.status("matching SVD to the perplexity of K-FAC"):
        svd, matched = organism.matched_svd(
            lm, edit, [text for _, text in validation], collected.names
        )
    console.print(matched, markup=False)

    console.rule("comparison")
    steer = lirefs.Steer(probe.best, "add", strength)
    interventions: dict[str, Any] = {
        "LiReF": steer,
        "K-FAC": edit,
        "LiReF + K-FAC": steer + edit,
        "random direction": lirefs.Steer(probe.best.random_like(seed), "add", strength),
        "SVD": svd,
        "random pairs": kfac.RandomPairsEdit(collected, keep, seed=seed),
    }
    settings = {
        "findings": [*probe_lines(probe), *edit_lines(lm, edit), matched],
        "probe": probe.to_dict(),
        "factors": collected.digest,
        "left out": left_out,
        "settings": {
            "seed": seed, "keep": keep, "strength": strength, "layers": edited,
            "suite": asked.suite, "limit": asked.limit,
        },
    }  # fmt: skip
    comparison = lirefs.compare(
        lm,
        interventions,
        tasks,
        seed=seed,
        provenance=settings,
        journal=asked.journal,
        progress=not console.quiet,
    )
    figures = [
        *tag_figures(comparison, ["K-FAC", "LiReF"]),
        separation_figure(probe),
        spectrum_figure(collected, collected.names, keep),
    ]
    _save(asked, comparison, figures, {"directions": probe.directions})
    return comparison


def _on_organism(asked: Asked, language: Language) -> lirefs.Comparison:
    """An organism's main job: all settings that are not given are chosen on validation items."""
    console, cache, seed = asked.console, cache_dir(), asked.seed
    lm = asked.load()
    layers = None if asked.layers is None else edited_layers(lm, asked.layers)

    console.rule("curvature: every MLP")
    texts = training_texts(language, 300 if asked.quick else 1500, seed)
    collected = factors_of(lm, list(range(lm.n_layers)), None, cache, seed, texts)

    console.rule("comparison")
    found = organism.run(
        lm,
        collected,
        language,
        layers=layers,
        keep=asked.keep,
        strength=asked.strength,
        measures=asked.suite is not None,
        limit=asked.limit or 80,
        seed=seed,
        cache=cache / "activations",
        journal=asked.journal,
        say=lambda line: console.print(line, markup=False),
        progress=not console.quiet,
    )
    chosen = dict(found.edit.intervention.keep)
    shown = organism_report.figures(found)
    shown.append(spectrum_figure(collected, list(chosen), next(iter(chosen.values()))))
    comparison = found.comparison
    comparison.provenance.update(organism_report.provenance(found))
    comparison.provenance["factors"] = collected.digest
    comparison.provenance["settings"] = {
        "seed": seed,
        "quick": asked.quick,
        "language": language.seed,
        "given": {"layers": layers, "keep": asked.keep, "strength": asked.strength},
    }
    directions = {f"directions-{form}": probe.directions for form, probe in found.probes.items()}
    _save(asked, comparison, shown, directions)
    for line in comparison.provenance["findings"]:
        console.print(line, markup=False)
    return comparison


def _tasks(
    asked: Asked, lm: lirefs.LanguageModel, split: lirefs.Split
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of the comparison, and why others were left out."""
    left_out: dict[str, str] = {}
    if asked.suite is None:
        tasks = lirefs.default_tasks(lm, split.test, asked.memorized, limit=asked.limit)
    else:
        tasks, left_out = suite_tasks(
            lm,
            asked.suite,
            split.test,
            fitted_on=[*split.train, *split.validation],
            memorized=asked.memorized,
            data=asked.data,
            limit=asked.limit,
            seed=asked.seed,
        )
    for name, reason in left_out.items():
        asked.console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if asked.lm_eval:
        added = lirefs.lm_eval_tasks(asked.lm_eval, include_path=asked.data, limit=asked.limit)
        tasks = [*tasks, *added]
    return tasks, left_out


def _save(
    asked: Asked,
    comparison: lirefs.Comparison,
    figures: Sequence[Figure],
    directions: Mapping[str, lirefs.Directions],
) -> None:
    """Write the report, once for all processes, and drop what was kept for a resumption."""
    console = asked.console
    if console.quiet:
        return
    with console.status("writing the report"):
        summary = comparison.summary()
        page = lirefs.write_report(comparison, asked.out, [*default_figures(summary), *figures])
    for name, one in directions.items():
        one.save(asked.out / f"{name}.safetensors")
    Journal(asked.journal).clear()
    _print_overview(summary)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def _print_overview(summary: Summary) -> None:
    table = Table(title="retained share of the unchanged model, mean over tasks")
    table.add_column("variant")
    for group in summary.groups:
        table.add_column(group)
    for variant in summary.variants[1:]:
        kept = [summary.means[variant, group] for group in summary.groups]
        table.add_row(variant, *(f"{one:.2f}" for one in kept))
    Console().print(table)
