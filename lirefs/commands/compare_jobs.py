"""What `lirefs compare` does: the main job on ordinary language, and that of an organism."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.commands.options import console
from lirefs.commands.steps import (
    arithmetic_lines,
    edit_lines,
    edited_layers,
    factors_of,
    probe_lines,
    separation_figure,
    spectrum_figure,
    tag_figures,
)
from lirefs.files import cache_dir
from lirefs.harness import report, suite
from lirefs.harness.journal import Journal
from lirefs.harness.tasks import Task
from lirefs.organism import suite as organism
from lirefs.organism.language import Language
from lirefs.studies import main_job, main_job_report

KEEP, STRENGTH = 0.8, 1.0


@dataclass(frozen=True)
class Asked:
    """What the command line asked for, looked at before anything is loaded."""

    model: str
    device: str | None
    layers: list[int] | None
    keep: float | None
    strength: float | None
    suite: suite.Suite | None
    data: Path | None
    memorized: Path | None
    factors: Path | None
    lm_eval: list[str]
    out: Path
    seed: int
    limit: int | None
    quick: bool

    @property
    def journal(self) -> Path:
        """Where finished items are kept until the report is written."""
        return self.out / "unfinished"


def compare_language_model(asked: Asked, question_set: lirefs.Questions) -> None:
    """The main job on a model of ordinary language."""
    seed = asked.seed
    keep = asked.keep or KEEP
    strength = STRENGTH if asked.strength is None else asked.strength
    split = question_set.split(seed=seed)
    cache = cache_dir()

    console.rule(f"1/4  model: {asked.model}")
    lm = lirefs.load(asked.model, device=asked.device)
    console.print(lm.layout.describe(), markup=False)
    tasks, left_out = _tasks(asked, lm, split)
    edited = edited_layers(lm, asked.layers)

    console.rule(f"2/4  direction: {len(question_set)} questions")
    probe = lirefs.fit(lm, split, seed=seed, cache=cache / "activations")
    for line in probe_lines(probe):
        console.print(line, markup=False)

    console.rule(f"3/4  curvature: MLPs of layers {', '.join(map(str, edited))}")
    texts = suite.calibration_texts()[: 30 if asked.quick else None]
    collected = factors_of(lm, edited, asked.factors, cache, seed, texts)
    edit = kfac.CurvatureEdit(collected, keep)
    validation = suite.heldout_texts("validation")[: 6 if asked.quick else None]
    with console.status("matching SVD to the perplexity of K-FAC"):
        svd, matched = main_job.matched_svd(
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
    methods = ["K-FAC", "LiReF"]
    comparison.provenance["findings"] += arithmetic_lines(comparison, methods)
    figures = [
        *tag_figures(comparison, methods),
        separation_figure(probe),
        spectrum_figure(collected, collected.names, keep),
    ]
    _save(asked, comparison, figures, {"directions": probe.directions})


def compare_organism(asked: Asked, language: Language) -> None:
    """An organism's main job: all settings that are not given are chosen on validation items."""
    cache, seed = cache_dir(), asked.seed
    console.rule(f"1/3  model: {asked.model}")
    lm = lirefs.load(asked.model, device=asked.device)
    console.print(lm.layout.describe(), markup=False)
    layers = None if asked.layers is None else edited_layers(lm, asked.layers)

    console.rule("2/3  curvature: every MLP")
    texts = organism.training_texts(language, 300 if asked.quick else 1500, seed)
    collected = factors_of(lm, list(range(lm.n_layers)), None, cache, seed, texts)

    console.rule("3/3  comparison")
    found = main_job.run(
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
    shown = main_job_report.figures(found)
    shown.append(spectrum_figure(collected, list(chosen), next(iter(chosen.values()))))
    comparison = found.comparison
    comparison.provenance.update(main_job_report.provenance(found))
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


def _tasks(
    asked: Asked, lm: lirefs.LanguageModel, split: lirefs.Split
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of the comparison, and why others were left out."""
    left_out: dict[str, str] = {}
    if asked.suite is None:
        tasks = lirefs.default_tasks(lm, split.test, asked.memorized, limit=asked.limit)
    else:
        tasks, left_out = suite.suite_tasks(
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
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if asked.lm_eval:
        added = lirefs.lm_eval_tasks(asked.lm_eval, include_path=asked.data, limit=asked.limit)
        tasks = [*tasks, *added]
    return tasks, left_out


def _save(
    asked: Asked,
    comparison: lirefs.Comparison,
    figures: Sequence[report.Figure],
    directions: Mapping[str, lirefs.Directions],
) -> None:
    """Write the report, once for all processes, and drop what was kept for a resumption."""
    if console.quiet:
        return
    with console.status("writing the report"):
        page = comparison.save(asked.out, [*report.default_figures(comparison), *figures])
    for name, one in directions.items():
        one.save(asked.out / f"{name}.safetensors")
    Journal(asked.journal).clear()
    _print_overview(comparison)
    console.print(f"report: {page}", markup=False, soft_wrap=True)


def _print_overview(comparison: lirefs.Comparison) -> None:
    table = Table(title="retained share of the unchanged model, mean over tasks")
    table.add_column("variant")
    for group in comparison.groups:
        table.add_column(group)
    for variant in comparison.variants[1:]:
        kept = [comparison.retained(variant, group) for group in comparison.groups]
        table.add_row(variant, *(f"{one:.2f}" for one in kept))
    Console().print(table)
