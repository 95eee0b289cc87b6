"""The main job in one call: both methods and their controls on a model, and a report."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.journal import journal_files, remove_journal
from lirefs.comparison.report.tables import equal_tables
from lirefs.comparison.report.write import PAGES
from lirefs.comparison.results_file import FORMAT
from lirefs.comparison.summary import EQUAL, Summary
from lirefs.errors import KeepError, SettingError, checked_seed, must_be
from lirefs.files import cache_dir, refuse_foreign
from lirefs.main_job import findings, matching, organism, organism_report
from lirefs.main_job.console import SafeConsole, console_table
from lirefs.main_job.factors import edited_layers, factors_of
from lirefs.main_job.grid import KEEPS
from lirefs.main_job.matching import EqualDamage
from lirefs.main_job.settings import Job, strictly, title_of
from lirefs.model.layout import missing_layer
from lirefs.model.processes.world import together
from lirefs.organism.language import Language, language_seed
from lirefs.organism.tasks import training_texts
from lirefs.questions.question import LABELS
from lirefs.tasks.default_suite import calibration_texts, heldout_texts
from lirefs.tasks.papers.suite import check_files, suite_tasks
from lirefs.tasks.settings import QUICK, Suite
from lirefs.tasks.task import Task
from lirefs.tasks.texts import text_rows

STRENGTH = 1.0
PROMPT = "Answer by reasoning step by step from what is given, not from memory.\n\n"
"""What asks for the same as a direction from memory to reasoning."""


def run(
    model: str | Path | lirefs.LanguageModel | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    questions: str | Path | None = None,
    labels: Sequence[str] = LABELS,
    memorized: str | Path | None = None,
    factors: str | Path | None = None,
    direction_layers: Sequence[int] | None = None,
    edit_layers: Sequence[int] | None = None,
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
        dtype: Type of its numbers, and `device_map`, for several devices: see `lirefs.load`.
        device_map: See `dtype`.
        questions: Labelled questions (JSON Lines) to fit the direction on.
        labels: Their two labels; the direction points to the first.
        memorized: Memorized texts to recite, a path as for `lirefs.recitation_task`.
        factors: Curvature factors to use; written there if the file is missing.
        direction_layers: Layers to choose the direction's from; None: all.
        edit_layers: Layers whose MLPs are edited; None: three, from two thirds of the depth on.
        keep: Share of the curvature mass that the edit keeps, in (0, 1]; None: of 0.8, 0.9, 0.95,
            0.98, 0.99 and 0.995 the smallest that costs at most 10 % of perplexity on validation
            texts. On an organism, see `model`.
        strength: a of h + a d, where d is the difference of the class means.
        suite: Tasks to run, see `Suite`; None: those that the project ships.
        data: Folder of JSON Lines for a suite, or of lm-eval tasks (YAML).
        lm_eval: Tasks of lm-evaluation-harness to add.
        limit: Most items of a task.
        out: Folder of the report.
        seed: Seed of splits, labels and controls.
        quick: A trial with few items and settings, in which recitation is scored word for word
            only; not a result.
        resume: Continue an interrupted run in `out` instead of starting again.
        console: Where progress is shown; None: the standard error. Of several processes, only the
            first writes the report.

    Returns:
        The comparison; the report is in `out`.

    Raises:
        KeepError: `keep` is outside (0, 1].
        DistributedError: Of several processes, one has failed, or other settings, data or weights.
        SettingError: Another setting cannot be used, settings do not go together, or `out` holds
            files of these names and no report of a comparison.
        LirefsError: A file cannot be read, or the model cannot be loaded.
    """
    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    must_be(model, (str, lirefs.LanguageModel, type(None)), "model")
    console = SafeConsole(stderr=True) if console is None else console
    out = Path(out)
    data, memorized, factors = (
        None if one is None else Path(one) for one in (data, memorized, factors)
    )
    if keep is not None and not 0 < keep <= 1:
        raise KeepError(f"keep is {keep}, must be in (0, 1]")
    if strength is not None and not math.isfinite(strength):
        raise SettingError(f"strength is {strength}, must be finite")
    seed = checked_seed(seed)
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}, must be at least 1")
    if suite is not None and suite not in list(Suite):
        raise SettingError(f"suite is {suite!r}, must be one of {', '.join(Suite)}")
    if out.exists() and not out.is_dir():
        raise SettingError(f"out is {out}, which exists and is not a folder")
    if data is not None and not data.is_dir():
        raise SettingError(f"data is {data}, which is not a folder")
    if data is not None and suite is None and not lm_eval:
        raise SettingError("data is read by a suite or by lm-eval tasks; name one")
    own_data = any(one is not None for one in (questions, memorized, factors, data, *lm_eval))
    if model is None:
        model = "smollm2-135m" if own_data else "organism"
    if isinstance(model, str):
        taught = language_seed(model)
    else:
        taught = getattr(model.model.config, "language_seed", None)
    if taught is not None and (own_data or suite == Suite.SKILLS):
        raise SettingError("an organism reads its own language only; give another model")
    if memorized is not None:
        text_rows(memorized, "memorized")
    if suite is not None and data is not None:
        check_files(data)
    directions = [path.name for path in out.glob("directions*.safetensors")]
    refuse_foreign(out / "results.json", FORMAT, [*PAGES, *directions])
    question_set = lirefs.load_questions(
        "default" if questions is None else questions, labels=labels
    )
    job = Job(
        model=model,
        device=device,
        dtype=dtype,
        device_map=device_map,
        direction_layers=direction_layers,
        edit_layers=edit_layers,
        keep=keep,
        strength=strength,
        suite=None if suite is None else Suite(suite),
        data=data,
        memorized=memorized,
        factors=factors,
        lm_eval=lm_eval,
        limit=min(limit or QUICK, QUICK) if quick else limit,
        out=out,
        seed=seed,
        quick=quick,
        resumed=resume and bool(journal_files(out / "unfinished")),
        console=console,
    )
    if not resume and remove_journal(job.journal):
        job.say("starting again; with resume (--resume) the interrupted run would continue")
    elif resume and not job.resumed:
        job.say(f"nothing to resume in {out}: starting from the beginning")
    with together("the main job") as world:
        if taught is None:
            comparison = _on_language_model(job, question_set)
        else:
            comparison = _on_organism(job, Language(taught))
        world.wait()  # until the first process has written the report
    remove_journal(job.journal)
    return comparison


def _load(job: Job) -> lirefs.LanguageModel:
    lm = job.model
    job.console.rule(f"model: {lm if isinstance(lm, str) else lm.name}")
    if isinstance(lm, str):
        lm = lirefs.load(lm, device=job.device, dtype=job.dtype, device_map=job.device_map)
    job.say(lm.layout.describe())
    return lm


def _on_language_model(job: Job, question_set: lirefs.Questions) -> lirefs.Comparison:
    """The main job on a model of ordinary language."""
    console, cache, seed = job.console, cache_dir(), job.seed
    strength = STRENGTH if job.strength is None else job.strength
    split = question_set.split(validation=0.2, seed=seed)  # of the shipped ones, 66 a label to test
    # What is opened fails before a model is fetched and loaded.
    given = job.factors if job.factors is not None and job.factors.exists() else None
    known = None if given is None else kfac.Factors.load(given)
    asked = lirefs.lm_eval_tasks(job.lm_eval, job.data, job.limit) if job.lm_eval else []
    lm = _load(job)
    if known is not None:
        known.check(lm.model)
    tasks, left_out = _tasks(job, lm, split)
    tasks += asked
    edited = edited_layers(lm, job.edit_layers)

    console.rule(f"direction: {len(question_set)} questions")
    probe = lirefs.fit(
        lm,
        split,
        layers=job.direction_layers,
        seed=seed,
        cache=cache / "activations",
        progress=job.shown,
    )
    separation = findings.probe_lines(probe)
    job.say("\n".join(separation))

    console.rule(f"curvature: MLPs of layers {', '.join(map(str, edited))}")
    texts = calibration_texts()[: 30 if job.quick else None]
    collected = factors_of(lm, edited, job.factors, cache, seed, texts, job.shown, known)
    collected.decompose(spread=True, progress=job.shown)
    validation = [text for _, text in heldout_texts("validation")[: 6 if job.quick else None]]
    steer = lirefs.Steer(probe.best, "add", strength)
    with console.status("choosing keep, then setting rivals to the same perplexity"):
        edit = kfac.CurvatureEdit(collected, job.keep or KEEPS[0])
        damage = matching.Damage(lm, validation, [edit, steer])
        if (keep := job.keep) is None:
            keep, edit = matching.affordable_edit(damage, edit)
        of_edit, of_steer = _at_equal_damage(job, damage, edit, steer)
    job.say(f"{of_edit.finding}\n{of_steer.finding}")

    console.rule("comparison")
    interventions: dict[str, Any] = {
        "LiReF": steer,
        "K-FAC": edit,
        "LiReF + K-FAC": steer + edit,
        "random direction": lirefs.Steer(probe.best.random_like(seed), "add", strength),
        **of_steer.interventions,
        "random pairs": kfac.RandomPairsEdit(collected, keep, seed=seed),
        **of_edit.interventions,
    }
    if question_set.names == LABELS:
        interventions["prompt"] = lirefs.Prompted(PROMPT)
    left_out["BalancedSubnet"] = "it learns from memorized texts, and those here are asked for"
    kept = findings.edit_line(lm, edit, keep, job.keep is not None)
    settings = {
        "findings": [*separation, kept, of_edit.finding, of_steer.finding],
        EQUAL: {one.name: list(one.matches) for one in (of_edit, of_steer)},
        "probe": probe.to_dict(),
        "factors": collected.digest,
        "left out": left_out,
        "settings": {
            "seed": seed, "keep": keep, "strength": strength, "layers": edited,
            "direction layers": job.direction_layers, "suite": job.suite, "limit": job.limit,
        },
    }  # fmt: skip
    comparison = job.compare(
        lm, interventions, tasks, seed=seed, provenance=settings, title=title_of(lm)
    )
    comparison.provenance["findings"] += findings.largest_changes(comparison)
    figures = [
        *findings.tag_figures(comparison, ["K-FAC", "LiReF"]),
        findings.separation_figure(probe),
        findings.spectrum_figure(collected, collected.names, keep),
    ]
    _save(job, comparison, figures, {"directions": probe.directions})
    return comparison


def _at_equal_damage(
    job: Job, damage: matching.Damage, edit: kfac.CurvatureEdit, steer: lirefs.Steer
) -> tuple[EqualDamage, EqualDamage]:
    """Rivals at the perplexity of the edit, and at that of the steering."""
    (direction,), factors = steer.directions, edit.factors
    assert isinstance(steer.strength, float)
    pushed, random = (
        matching.steering_rival(partial(lirefs.Steer, one, "add"), steer.strength)
        for one in (direction, direction.random_like(job.seed))
    )
    rivals = {
        **matching.rivals_of_edit(factors, factors.names, job.seed),
        f"LiReF at K-FAC{SAME_DAMAGE}": pushed,
        f"random direction at K-FAC{SAME_DAMAGE}": random,
    }
    of_steer = {f"random direction at LiReF{SAME_DAMAGE}": random}
    return (
        matching.at_equal_damage(damage, "K-FAC", edit, rivals),
        matching.at_equal_damage(damage, "LiReF", steer, of_steer),
    )


def _on_organism(job: Job, language: Language) -> lirefs.Comparison:
    """An organism's main job: all settings that are not given are chosen on validation items."""
    lm = _load(job)
    for chosen_layers in (job.direction_layers, job.edit_layers):
        if chosen_layers is not None and (problem := missing_layer(chosen_layers, lm.n_layers)):
            raise SettingError(problem)
    if job.direction_layers is not None and set(job.direction_layers) <= {0}:
        raise SettingError(
            f"direction_layers are {list(job.direction_layers)}; an organism is not steered at "
            "layer 0, whose input tells words apart and nothing else"
        )
    job.console.rule("curvature: every MLP")
    texts = training_texts(language, 300 if job.quick else 1500, job.seed)
    layers = list(range(lm.n_layers))
    collected = factors_of(lm, layers, None, cache_dir(), job.seed, texts, job.shown)
    collected.decompose(spread=True, progress=job.shown)

    job.console.rule("comparison")
    found = organism.run_on_organism(job, lm, collected, language)
    chosen = dict(found.edit.intervention.keep)
    shown = organism_report.organism_figures(found)
    shown.append(findings.spectrum_figure(collected, list(chosen), next(iter(chosen.values()))))
    comparison = found.comparison
    given = {
        "layers": job.edit_layers, "direction layers": job.direction_layers,
        "keep": job.keep, "strength": job.strength,
    }  # fmt: skip
    settings = {"seed": job.seed, "quick": job.quick, "language": language.seed, "given": given}
    comparison.provenance.update(organism_report.organism_provenance(found))
    comparison.provenance.update(factors=collected.digest, settings=settings)
    directions = {f"directions-{form}": probe.directions for form, probe in found.probes.items()}
    _save(job, comparison, shown, directions)
    job.say("\n".join(comparison.provenance["findings"]))
    return comparison


def _tasks(
    job: Job, lm: lirefs.LanguageModel, split: lirefs.Split
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of the comparison, and why others were left out."""
    left_out: dict[str, str] = {}
    if job.suite is None:
        tasks = lirefs.default_tasks(lm, split.test, job.memorized, limit=job.limit)
    else:
        tasks, left_out = suite_tasks(
            lm,
            job.suite,
            split.test,
            fitted_on=[*split.train, *split.validation],
            memorized=job.memorized,
            data=job.data,
            limit=job.limit,
            seed=job.seed,
        )
    for name, reason in left_out.items():
        job.say(f"left out: {name}: {reason}")
    return strictly(tasks) if job.quick else tasks, left_out


def _save(
    job: Job,
    comparison: lirefs.Comparison,
    figures: Sequence[Figure],
    directions: Mapping[str, lirefs.Directions],
) -> None:
    """Write the report, once for all processes."""
    if not first_process():
        return
    job.timed(comparison)
    with job.console.status("writing the report"):
        summary = comparison.summary()
        page = lirefs.write_report(comparison, job.out, [*retained_figures(summary), *figures])
    for name, one in directions.items():
        one.save(job.out / f"{name}.safetensors")
    for found in equal_tables(summary):
        table = console_table(*found.head, title=found.name)
        for row in found.rows:
            table.add_row(*(one.text for one in row))
        job.console.print(table)
        job.say(found.note)
    job.say(f"report: {page}")


def first_process() -> bool:
    """Whether this process is the only one or the first of several, the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def retained_table(summary: Summary) -> Table:
    """The share that each variant retains of the unchanged model, for the console."""
    groups = list(summary.groups)
    title = "retained share of the unchanged model, mean of tasks"
    table = console_table("variant", *groups, title=title)
    for variant in summary.variants[1:]:
        table.add_row(variant, *(f"{summary.means[variant, group]:.2f}" for group in groups))
    return table
