"""`lirefs compare`: both methods and their controls on the same items, and a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

import kfac
import lirefs
from lirefs.builtin import language_seed
from lirefs.commands.steps import (
    arithmetic_lines,
    edit_lines,
    edited_layers,
    factors_of,
    indices,
    probe_lines,
    separation_figure,
    spectrum_figure,
    tag_figures,
)
from lirefs.errors import SettingError
from lirefs.files import cache_dir
from lirefs.harness import report
from lirefs.harness import suite as default_suite
from lirefs.harness.journal import Journal
from lirefs.harness.suite import Suite, suite_tasks
from lirefs.harness.tasks import Task
from lirefs.organism import suite as organism
from lirefs.organism.language import Language
from lirefs.studies import main_job, main_job_report

DEFAULT_MODEL = "organism"
DEFAULT_FOR_OWN_DATA = "smollm2-135m"  # the organism reads its own language only
KEEP, STRENGTH = 0.8, 1.0
QUICK = 14

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class _Asked:
    """What the command line asked for, looked at before anything is loaded."""

    model: str
    device: str | None
    layers: list[int] | None
    keep: float | None
    strength: float | None
    suite: Suite | None
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


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(compare)


def compare(
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, hub id, folder or .gguf file. Default: organism; with data of "
            "your own or lm-eval tasks, smollm2-135m."
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
    suite: Annotated[
        Suite | None, typer.Option(help="Tasks to run. Default: those that the project ships.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of JSON Lines for a suite, or of lm-eval tasks (YAML)."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness to add, by comma.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many items a task.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    seed: Annotated[int, typer.Option(help="Seed of splits, labels and controls.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK} items a task: a trial, no result.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")
    ] = False,
) -> None:
    """Compare LiReF steering and the K-FAC edit on one model, and write a report.

    On the organism, settings that are not given are chosen on validation items. Under torchrun the
    items are split over the processes.
    """
    # Everything that can be wrong is looked at before the model is loaded.
    if out.exists() and not out.is_dir():
        raise SettingError(f"--out {out}: exists and is not a folder")
    if keep is not None and not 0 < keep <= 1:
        raise kfac.KeepError(f"--keep {keep}: must be in (0, 1]")
    if data is not None and not data.is_dir():
        raise SettingError(f"--data {data}: is not a folder")
    if data is not None and suite is None and lm_eval is None:
        raise SettingError("--data goes with --suite or --lm-eval")
    own_data = any(one is not None for one in (questions, memorized, factors, data, lm_eval))
    model = model or (DEFAULT_FOR_OWN_DATA if own_data else DEFAULT_MODEL)
    taught = language_seed(model)
    if taught is not None and (own_data or suite is Suite.SKILLS):
        raise SettingError("an organism reads its own language only; give another --model")
    if memorized is not None:
        lirefs.files.read_jsonl(memorized)
    question_set = lirefs.load_questions("default" if questions is None else questions)
    asked = _Asked(
        model=model,
        device=_join_processes(device),
        layers=indices(layers),
        keep=keep,
        strength=strength,
        suite=suite,
        data=data,
        memorized=memorized,
        factors=factors,
        lm_eval=[] if lm_eval is None else [name.strip() for name in lm_eval.split(",")],
        out=out,
        seed=seed,
        limit=min(limit or QUICK, QUICK) if quick else limit,
        quick=quick,
    )
    if asked.journal.exists() and not resume:
        console.print("starting anew; --resume would go on with the interrupted run", markup=False)
        Journal(asked.journal).clear()
    try:
        if taught is None:
            _language_model(asked, question_set)
        else:
            _study(asked, Language(taught))
    except KeyboardInterrupt:
        console.print(
            "interrupted; finished activations and factors are kept, and finished items are used "
            "again by the same command with --resume"
        )
        raise typer.Exit(130) from None


def _language_model(asked: _Asked, question_set: lirefs.Questions) -> None:
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
    texts = default_suite.calibration_texts()[: 30 if asked.quick else None]
    collected = factors_of(lm, edited, asked.factors, cache, seed, texts)
    edit = kfac.CurvatureEdit(collected, keep)
    validation = default_suite.heldout_texts("validation")[: 6 if asked.quick else None]
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


def _study(asked: _Asked, language: Language) -> None:
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
    asked: _Asked, lm: lirefs.LanguageModel, split: lirefs.Split
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
        console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
    if asked.lm_eval:
        added = lirefs.lm_eval_tasks(asked.lm_eval, include_path=asked.data, limit=asked.limit)
        tasks = [*tasks, *added]
    return tasks, left_out


def _save(
    asked: _Asked,
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


def _join_processes(device: str | None) -> str | None:
    """Under torchrun, join the other processes; all but the first one are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    cuda = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    console.quiet = dist.get_rank() > 0
    if not cuda:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    return device if device and ":" in device else f"cuda:{local}"


def _print_overview(comparison: lirefs.Comparison) -> None:
    table = Table(title="retained share of the unchanged model, mean over tasks")
    table.add_column("variant")
    for group in comparison.groups:
        table.add_column(group)
    for variant in comparison.variants[1:]:
        kept = [comparison.retained(variant, group) for group in comparison.groups]
        table.add_row(variant, *(f"{one:.2f}" for one in kept))
    Console().print(table)
