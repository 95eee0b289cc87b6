"""What a main job was asked to do, the settings it tries, and how it chooses the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

import kfac
from lirefs.comparison.compare import compare
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.directions.probe import Probe
from lirefs.main_job import grid
from lirefs.main_job.grid import Grid
from lirefs.model.intervention import Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.organism.questions import Form
from lirefs.steering.steer import Steer
from lirefs.tasks.batches.recomputed import Advance
from lirefs.tasks.inference import score_continuations
from lirefs.tasks.recitation import Recitation
from lirefs.tasks.settings import Suite
from lirefs.tasks.task import ItemResult, Task

STEERING_FORMS: tuple[Form, ...] = ("passage", "mixed")
"""Forms whose directions are candidates for steering."""
PROJECTIONS = {"gate, up": ("gate_proj", "up_proj"), "all": ("gate_proj", "up_proj", "down_proj")}
FINALISTS = 6
TOGETHER = 12
"""Candidates run in one comparison: the more there are, the more they share."""
SAME = 1e-9
"""Objectives that differ by less are the same number, summed in another order."""

RECITED, CHAINS = "tales", "planted sequences"
TRUE = "exceptions, true label"
READ = "conflicts, answer read"
SKILLS = (
    "boolean expressions", "relations", "object tracking", "facts with their passage", "retrieval",
)  # fmt: skip
LANGUAGE = "stories"
KEPT_SHARE, PERPLEXITY_RATIO = 0.95, 1.05
"""An intervention should keep this share of each skill, at no more than this perplexity."""
TOO_COSTLY = 100.0
"""Added to the objective of an edit beyond that ratio; goals missed by other edits sum to less."""
STILL_RECITED, BACK_AT_TRUTH = 0.034, 0.61
"""The edit should leave at most this share recited and return this share of exceptions: the K-FAC
paper's recitation after its edit, and what a trial of this experiment had reached."""


@dataclass(frozen=True)
class Job:
    """The checked settings of one main job: arguments of `run`."""

    model: str | LanguageModel = "organism"
    device: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    direction_layers: Sequence[int] | None = None
    edit_layers: Sequence[int] | None = None
    keep: float | None = None
    strength: float | None = None
    suite: Suite | None = None
    data: Path | None = None
    memorized: Path | None = None
    factors: Path | None = None
    lm_eval: Sequence[str] = ()
    limit: int | None = None
    out: Path = Path("report")
    seed: int = 0
    quick: bool = False
    resumed: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    console: Console = field(default_factory=lambda: Console(quiet=True))

    @property
    def journal(self) -> Path:
        """Folder that keeps finished items until the report is written."""
        return self.out / "unfinished"

    @property
    def grid(self) -> Grid:
        """The settings to try and to sweep."""
        return grid.TRIAL if self.quick else grid.WHOLE

    @property
    def shown(self) -> bool:
        """Whether to show progress."""
        return not self.console.quiet

    def compare(
        self,
        lm: LanguageModel,
        interventions: Mapping[str, Intervention],
        tasks: Sequence[Task],
        **options: Any,
    ) -> Comparison:
        """`lirefs.compare` with the journal of the job, silent where its console is quiet."""
        return compare(
            lm, interventions, tasks, journal=self.journal, progress=self.shown, **options
        )

    def timed(self, comparison: Comparison) -> None:
        """Write into a comparison when the whole job began, and how long it took."""
        seconds = round((datetime.now(UTC) - self.started).total_seconds(), 1)
        started = self.started.isoformat(timespec="seconds")
        comparison.run.update(started=started, seconds=seconds, resumed=self.resumed)

    def say(self, line: str) -> None:
        """Print a line on the console, as it is."""
        self.console.print(line, markup=False, soft_wrap=True)


def title_of(lm: LanguageModel) -> str:
    """Heading of a main job's report."""
    return f"Reasoning against recitation in {lm.name}"


@dataclass(frozen=True)
class ChosenSetting:
    """The one of `tried` settings with the smallest objective on validation items."""

    label: str
    intervention: Any
    objective: float
    tried: int


def missed_goals(comparison: Comparison, variant: str, skills: Sequence[str]) -> float:
    """By how much a variant misses the goals for skills and perplexity, summed; 0 misses none."""
    total = 0.0
    for task in (*skills, LANGUAGE):
        if task not in comparison.tasks or not comparison.informative(task):
            continue
        score, before = (comparison.score(name, task) for name in (variant, BASELINE))
        if task == LANGUAGE:
            total += _missed(1 / PERPLEXITY_RATIO - before / score)
        else:
            total += _missed(KEPT_SHARE - score / before)
    return total


def _missed(by: float) -> float:
    """By how much a goal is missed; infinitely where a score is NaN: the model overflowed."""
    return math.inf if math.isnan(by) else max(0.0, by)


def choose_edit(
    job: Job, lm: LanguageModel, edits: Mapping[str, Intervention], tasks: Sequence[Task]
) -> ChosenSetting:
    """The edit that misses all its goals by the least, summed; 0 meets all.

    One that costs too much perplexity comes after all others: where much is broken, every method
    has removed recitation, and nothing tells them apart.
    """
    skills = (*SKILLS, "common facts")

    def objective(comparison: Comparison, variant: str) -> float:
        missed = _missed(comparison.score(variant, RECITED) - STILL_RECITED)
        if TRUE in comparison.tasks:  # not yet, where candidates are run on recitation alone
            missed += _missed(BACK_AT_TRUTH - comparison.score(variant, TRUE))
        too_costly = TOO_COSTLY * (missed_goals(comparison, variant, ()) > 0)
        return missed + missed_goals(comparison, variant, skills) + too_costly

    return _choose(job, lm, edits, tasks, objective, (RECITED, TRUE, LANGUAGE), skills)


def choose_steering(
    job: Job, lm: LanguageModel, steers: Mapping[str, Intervention], tasks: Sequence[Task]
) -> ChosenSetting:
    """The steering with the fewest exceptions not answered with the truth, plus `missed_goals`."""

    def objective(comparison: Comparison, variant: str) -> float:
        missed = _missed(1 - comparison.score(variant, TRUE))
        return missed + missed_goals(comparison, variant, SKILLS)

    return _choose(job, lm, steers, tasks, objective, (TRUE, LANGUAGE), SKILLS)


@dataclass(frozen=True, repr=False)
class StrictRecitation(Recitation):
    """Whether suffixes are recited word for word, and no other score: one pass, no decoding."""

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        self.encoded(lm)
        asked = [(prefix, [suffix]) for _, prefix, suffix in self.items]
        scored = score_continuations(lm, asked, advance=advance)
        return [
            ItemResult(item, {"strict": float(greedy) if math.isfinite(value) else math.nan})
            for (item, *_), ((value, greedy),) in zip(self.items, scored, strict=True)
        ]


def strictly(tasks: Sequence[Task]) -> list[Task]:
    """The tasks, of recitation the strict score alone: what settings are chosen and swept by."""
    return [
        StrictRecitation(one.name, one.items) if isinstance(one, Recitation) else one
        for one in tasks
    ]


def _choose(
    job: Job,
    lm: LanguageModel,
    candidates: Mapping[str, Intervention],
    tasks: Sequence[Task],
    objective: Callable[[Comparison, str], float],
    screen: Sequence[str],
    skills: Sequence[str],
) -> ChosenSetting:
    """The candidate with the smallest objective; ties go to the first.

    The tasks named in `screen` reduce the candidates to `FINALISTS` before the skills decide too.
    An objective is a sum of misses, each at least 0, so its value on some of the tasks is a lower
    bound. All candidates run on the first task of `screen`. In the order of that bound they run on
    all of `screen`, until no bound that is left is as low as the last finalist's objective.
    """
    by_name = {task.name: task for task in strictly(tasks)}

    def objectives(some: Sequence[str], names: Sequence[str]) -> dict[str, float]:
        on = [by_name[name] for name in names if name in by_name]
        found = job.compare(lm, {name: candidates[name] for name in some}, on)
        return {name: objective(found, name) for name in some}

    bounds = objectives(list(candidates), screen[:1])
    waiting = sorted(candidates, key=bounds.__getitem__)
    finalists: list[str] = []
    reached: dict[str, float] = {}
    while waiting and (
        len(finalists) < FINALISTS or bounds[waiting[0]] <= reached[finalists[-1]] + SAME
    ):
        some, waiting = waiting[:TOGETHER], waiting[TOGETHER:]
        reached |= objectives(some, screen)
        ranked = sorted((one for one in candidates if one in reached), key=reached.__getitem__)
        finalists = ranked[:FINALISTS]
    best, value = min(objectives(finalists, (*screen, *skills)).items(), key=lambda pair: pair[1])
    return ChosenSetting(best, candidates[best], value, len(candidates))


def curvature_candidates(
    job: Job, factors: kfac.Factors, n_layers: int
) -> dict[str, kfac.CurvatureEdit]:
    """Edits of runs of layers, of two choices of matrices, at several values of keep."""
    layers, keep = job.edit_layers, job.keep
    runs = [
        list(range(first, first + length))
        for length in range(1, job.grid.longest_run + 1)
        for first in range(n_layers - length + 1)
    ]
    result = {}
    for run in runs if layers is None else [list(layers)]:
        for words, projections in PROJECTIONS.items():
            paths = [(name, name.split(".")) for name in factors.names]
            names = [n for n, path in paths if int(path[2]) in run and path[-1] in projections]
            for value in job.grid.keeps if keep is None else (keep,):
                label = f"layers {', '.join(map(str, run))}; {words}; keep {value:g}"
                result[label] = kfac.CurvatureEdit(factors, dict.fromkeys(names, value))
    return result


def steering_candidates(job: Job, probes: Mapping[Form, Probe], operator: str) -> dict[str, Steer]:
    """Every direction of two question sets, or those of the layers given, at all strengths, scopes.

    Layer 0 is left out: its input at the last prompt token is that token's embedding, which tells
    words apart and nothing that the model does.
    """
    layers, tried = job.direction_layers, job.grid
    strengths = tried.strengths if job.strength is None else (job.strength,)
    return {
        f"{form}, layer {one.layer}, {scope}, {value:g}": Steer(one, operator, value, scope=scope)
        for form in STEERING_FORMS
        for one in probes[form].directions.values()
        if one.layer > 0 and (layers is None or one.layer in layers)
        for scope in tried.scopes
        for value in ((1.0,) if operator == "ablate" else strengths)
    }
