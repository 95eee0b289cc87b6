"""The organism's main job: settings chosen on validation items, numbers reported on test items.

Like `cli`, it stands above both packages; nothing in `lirefs` imports it but `cli`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

import kfac
from lirefs.capture import capture
from lirefs.direction import Direction
from lirefs.harness.comparison import BASELINE, Comparison
from lirefs.harness.engine import token_nlls
from lirefs.harness.running import compare
from lirefs.harness.suites import memory_measures
from lirefs.harness.tasks import Task
from lirefs.intervention import Intervention, applied
from lirefs.models import LanguageModel
from lirefs.organism.language import Language
from lirefs.organism.questions import Form
from lirefs.organism.suite import organism_questions, organism_tasks
from lirefs.probe import Probe, fit
from lirefs.questions import Questions
from lirefs.statistics import Estimate, auroc, interval, resample_counts

FORMS: tuple[Form, ...] = get_args(Form)
"""Surface forms of the question sets; each gives a direction, all are tested on all."""
STEERING_FORMS: tuple[Form, ...] = ("passage", "mixed")
"""Forms whose directions are candidates for steering."""
STRENGTHS = (1.0, 2.0, 4.0, 8.0)
SCOPES = ("all", "last_prompt_token")
KEEPS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SWEPT_MULTIPLES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
"""Swept strengths, as multiples of the one that was chosen."""
SWEPT_KEEPS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
RANDOM_DIRECTIONS = 5
FINALISTS = 6
PROJECTIONS = {"gate, up": ("gate_proj", "up_proj"), "all": ("gate_proj", "up_proj", "down_proj")}

RECITED = "planted sequences"
TRUE = "exceptions, true label"
READ = "conflicts, answer read"
SKILLS = (
    "boolean expressions", "relations", "object tracking", "facts with their passage", "retrieval",
)  # fmt: skip
LANGUAGE = "stories"
SPECTRUM_TASKS = (
    RECITED, "exceptions, memorized label", TRUE, "rare facts", "common facts", "addition",
    "facts with their passage", "boolean expressions", "relations", "object tracking",
)  # fmt: skip
STEERED_TASKS = (TRUE, READ, "relations")
KEPT_SHARE, PERPLEXITY_RATIO = 0.95, 1.05
"""An intervention should keep this share of each skill, at no more than this perplexity."""
STILL_RECITED, BACK_AT_TRUTH = 0.034, 0.61
"""The edit should leave at most this share recited and return this share of exceptions: the K-FAC
paper's recitation after its edit, and what a trial of this experiment had reached."""


@dataclass(frozen=True)
class Choice:
    """A setting that was chosen on validation items.

    Attributes:
        label: The setting in words.
        intervention: The intervention at this setting.
        objective: Its value on validation items, smaller is better.
        tried: Number of settings it was chosen from.
    """

    label: str
    intervention: Any
    objective: float
    tried: int


def harm(comparison: Comparison, variant: str, skills: Sequence[str]) -> float:
    """By how much a variant misses the goals for skills and perplexity, summed; 0 misses none."""
    total = 0.0
    for task in (*skills, LANGUAGE):
        if task not in comparison.tasks or not comparison.informative(task):
            continue
        score, before = comparison.score(variant, task), comparison.score(BASELINE, task)
        kept, goal = score / before, KEPT_SHARE
        if task == LANGUAGE:
            kept, goal = before / score, 1 / PERPLEXITY_RATIO
        total += max(0.0, goal - kept)
    return total


def choose(
    lm: LanguageModel,
    candidates: Mapping[str, Intervention],
    tasks: Sequence[Task],
    objective: Callable[[Comparison, str], float],
    screen: Sequence[str],
    *,
    journal: Any = None,
    progress: bool = True,
) -> Choice:
    """The candidate with the smallest objective on validation tasks; ties go to the first.

    The tasks named in `screen` reduce the candidates to `FINALISTS` before all tasks decide.
    """

    def ranked(some: Mapping[str, Intervention], on: Sequence[Task]) -> list[tuple[float, str]]:
        comparison = compare(lm, some, on, journal=journal, progress=progress)
        return sorted(((objective(comparison, name), name) for name in some), key=lambda p: p[0])

    finalists = [name for _, name in ranked(candidates, [t for t in tasks if t.name in screen])]
    chosen = {name: candidates[name] for name in finalists[:FINALISTS]}
    value, best = ranked(chosen, tasks)[0]
    return Choice(best, candidates[best], value, len(candidates))


def curvature_objective(comparison: Comparison, variant: str) -> float:
    """Sum of what is missed of every goal for the edit; 0 meets all."""
    recited, true = (comparison.score(variant, task) for task in (RECITED, TRUE))
    missed = max(0.0, recited - STILL_RECITED) + max(0.0, BACK_AT_TRUTH - true)
    return missed + harm(comparison, variant, (*SKILLS, "common facts"))


def steering_objective(comparison: Comparison, variant: str) -> float:
    """Exceptions not answered with the truth, plus every miss of the goals for skills."""
    true = comparison.score(variant, TRUE)
    return 1 - true + harm(comparison, variant, SKILLS)


def curvature_candidates(
    factors: kfac.Factors, n_layers: int, layers: Sequence[int] | None, keep: float | None
) -> dict[str, kfac.CurvatureEdit]:
    """Edits of runs of layers, of two choices of matrices, at several values of keep."""
    runs = [[layer] for layer in range(n_layers)]
    runs += [[layer, layer + 1] for layer in range(n_layers - 1)]
    result = {}
    for run in runs if layers is None else [list(layers)]:
        for words, projections in PROJECTIONS.items():
            names = [
                name
                for name in factors.names
                if int(name.split(".")[2]) in run and name.split(".")[-1] in projections
            ]
            for value in KEEPS if keep is None else (keep,):
                label = f"layers {', '.join(map(str, run))}; {words}; keep {value:g}"
                result[label] = kfac.CurvatureEdit(factors, dict.fromkeys(names, value))
    return result


def steering_candidates(
    probes: Mapping[Form, Probe], operator: str, strength: float | None
) -> dict[str, Intervention]:
    """One operator with every direction of two question sets, at every strength and scope.

    Layer 0 is left out: its input at the last prompt token is that token's embedding, which tells
    words apart and nothing that the model does.
    """
    strengths = STRENGTHS if strength is None else (strength,)
    return {
        f"{form}, layer {direction.layer}, {scope}, {value:g}": direction.steer(
            operator, value, scope=scope
        )
        for form in STEERING_FORMS
        for direction in probes[form].directions.values()
        if direction.layer > 0
        for scope in SCOPES
        for value in ((1.0,) if operator == "ablate" else strengths)
    }


def fit_all(
    lm: LanguageModel, language: Language, seed: int, cache: Any, n: int
) -> dict[Form, Probe]:
    """A probe for each surface form."""
    return {
        form: fit(lm, organism_questions(form, language, n).split(), seed=seed, cache=cache)
        for form in FORMS
    }


def transfer(
    lm: LanguageModel, language: Language, probes: Mapping[Form, Probe], layer: int, n: int
) -> dict[tuple[str, str], Estimate]:
    """Test AUROC of each form's direction (first name) on each form's questions (second)."""
    result: dict[tuple[str, str], Estimate] = {}
    for tested in probes:
        side: Questions = organism_questions(tested, language, n).split().test
        states = capture(lm, side.prompts, layers=[layer], progress=False).values[:, 0, 0].double()
        for fitted, probe in probes.items():
            scores = (states @ probe.directions[layer].unit.double()).numpy()
            result[fitted, tested] = auroc(scores, np.array(side.labels))
    return result


def against_random(
    comparison: Comparison, task: str, variant: str, controls: Sequence[str]
) -> Estimate:
    """Score under a variant minus the mean under several controls, paired bootstrap over items."""
    metric = comparison.tasks[task].metric

    def scores(name: str) -> np.ndarray[Any, Any]:
        return np.array([item.scores[metric] for item in comparison.results[name][task]])

    gap = scores(variant) - np.mean([scores(name) for name in controls], axis=0)
    draws = resample_counts(len(gap), comparison.resamples, comparison.seed)
    return Estimate(float(gap.mean()), *interval(draws @ gap / len(gap), len(gap)), len(gap))


def matched_svd(
    lm: LanguageModel,
    edit: Intervention,
    texts: Sequence[str],
    names: Sequence[str],
    steps: int = 8,
) -> tuple[kfac.SVDEdit, str]:
    """The SVD truncation whose perplexity on validation texts is that of another edit.

    Methods are comparable at equal damage to language only, never at equal nominal strength.

    Returns:
        The edit, and a sentence that says what was matched.
    """
    ids = lm.encode(texts)

    def perplexity(intervention: Any) -> float:
        with applied(intervention, lm.model):
            nlls = token_nlls(lm, ids)
        return float(np.exp(sum(float(one.sum()) for one in nlls) / sum(map(len, nlls))))

    goal = perplexity(edit)
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if perplexity(kfac.SVDEdit(names, middle)) > goal:
            low = middle
        else:
            high = middle
    reached = {share: perplexity(kfac.SVDEdit(names, share)) for share in (low, high) if share > 0}
    share = min(reached, key=lambda one: abs(np.log(reached[one] / goal)))
    return kfac.SVDEdit(names, share), (
        f"SVD keeps {share:.1%} of the singular values, chosen so that validation perplexity "
        f"({reached[share]:.3f}, n = {len(texts)} texts) matches K-FAC's ({goal:.3f}); "
        f"unchanged {perplexity(None):.3f}."
    )


@dataclass(frozen=True, eq=False)
class Study:
    """What the organism's main job found.

    Attributes:
        comparison: Every method at its chosen setting, on test items.
        probes: By surface form.
        transfer: AUROC by (form fitted, form tested), at the layer that is steered.
        edit: The curvature edit that was chosen.
        steers: Operator to what was chosen.
        direction: The direction of the `add` that was chosen.
        form: The question set it was fitted on.
        scope: The tokens it is added to.
        strength: Its strength.
        keeps: The curvature edit at `SWEPT_KEEPS`, on test items; described, never used to choose.
        pushes: `add` at `SWEPT_MULTIPLES` of its strength and at every layer, beside random
            directions; the same.
        matched: What SVD was matched to, in words.
    """

    comparison: Comparison
    probes: dict[Form, Probe]
    transfer: dict[tuple[str, str], Estimate]
    edit: Choice
    steers: dict[str, Choice]
    direction: Direction
    form: Form
    scope: str
    strength: float
    keeps: Comparison
    pushes: Comparison
    matched: str


def run(
    lm: LanguageModel,
    factors: kfac.Factors,
    language: Language,
    *,
    layers: Sequence[int] | None = None,
    keep: float | None = None,
    strength: float | None = None,
    measures: bool = False,
    limit: int = 80,
    seed: int = 0,
    cache: Any = None,
    journal: Any = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = True,
) -> Study:
    """Fit, choose on validation items, report on test items.

    Args:
        lm: The organism.
        factors: Factors of all its MLP matrices.
        language: What it was trained on.
        layers: Layers to edit; None to choose them.
        keep: Curvature mass to keep; None to choose it.
        strength: Steering strength; None to choose it.
        measures: Whether to add the stress test and nDCG@10.
        limit: Most test items of a task; validation uses 40 % of it.
        seed: Seed of controls and intervals.
        cache: Folder that keeps activations.
        journal: Folder that keeps finished items, see `compare`.
        say: Told about each step.
        progress: Show progress bars.
    """
    probes = fit_all(lm, language, seed, cache, n=max(20, limit))
    few = organism_tasks(lm, language, "validation", max(8, limit * 2 // 5))
    say("choosing the edit on validation items")
    wanted = {RECITED, TRUE, "common facts", LANGUAGE, *SKILLS}
    edit = choose(
        lm,
        curvature_candidates(factors, lm.n_layers, layers, keep),
        [task for task in few if task.name in wanted],
        curvature_objective,
        screen=(RECITED, TRUE, LANGUAGE),
        journal=journal,
        progress=progress,
    )
    say(f"edit: {edit.label} (of {edit.tried})")
    wanted = {TRUE, LANGUAGE, *SKILLS}
    steers = {}
    for operator in ("add", "amplify", "ablate"):
        steers[operator] = choose(
            lm,
            steering_candidates(probes, operator, strength),
            [task for task in few if task.name in wanted],
            steering_objective,
            screen=(TRUE, LANGUAGE),
            journal=journal,
            progress=progress,
        )
        say(f"{operator}: {steers[operator].label} (of {steers[operator].tried})")
    texts = [text for task in few if task.name == LANGUAGE for _, text in task.items]
    names = list(edit.intervention.keep)
    svd, matched = matched_svd(lm, edit.intervention, texts, names)
    say(matched)

    add = steers["add"].intervention
    words, place, scope, amount = steers["add"].label.split(", ")
    form = next(one for one in FORMS if one == words)
    direction = probes[form].directions[int(place.removeprefix("layer "))]
    random = direction.random_like(seed).steer("add", float(amount), scope=scope)
    interventions: dict[str, Any] = {
        "K-FAC": edit.intervention,
        "SVD": svd,
        "random pairs": kfac.RandomPairsEdit(factors, edit.intervention.keep, seed=seed),
        "LiReF add": add,
        "LiReF amplify": steers["amplify"].intervention,
        "LiReF ablate": steers["ablate"].intervention,
        "random direction": random,
        "LiReF add + K-FAC": add + edit.intervention,
        "random direction + K-FAC": random + edit.intervention,
    }
    test = organism_tasks(lm, language, "test", limit)
    if measures:
        test += memory_measures(lm, test)

    def compared(some: Mapping[str, Any], on: Sequence[Task]) -> Comparison:
        return compare(lm, some, on, seed=seed, journal=journal, progress=progress)

    comparison = compared(interventions, test)
    say("sweeping keep, strength and layer")
    edits = {
        f"keep {value:g}": edit.intervention.with_keep(dict.fromkeys(names, value))
        for value in SWEPT_KEEPS
    }
    spectrum = [task for task in test if task.name in (*SPECTRUM_TASKS, LANGUAGE)]
    pushes: dict[str, Any] = {}
    for multiple in SWEPT_MULTIPLES:
        value = multiple * float(amount)
        pushes |= _beside_random(f"strength {value:g}", direction, value, scope, seed)
    for one in probes[form].directions.values():
        pushes |= _beside_random(f"layer {one.layer}", one, float(amount), scope, seed)
    steered = [task for task in test if task.name in STEERED_TASKS]
    return Study(
        comparison=comparison,
        probes=probes,
        transfer=transfer(lm, language, probes, direction.layer, n=max(20, limit)),
        edit=edit,
        steers=steers,
        direction=direction,
        form=form,
        scope=scope,
        strength=float(amount),
        keeps=compared(edits, spectrum),
        pushes=compared(pushes, steered),
        matched=matched,
    )


def _beside_random(
    name: str, direction: Direction, strength: float, scope: str, seed: int
) -> dict[str, Any]:
    controls = [direction.random_like(seed + i) for i in range(RANDOM_DIRECTIONS)]
    return {name: direction.steer("add", strength, scope=scope)} | {
        f"{name}, random {i}": one.steer("add", strength, scope=scope)
        for i, one in enumerate(controls)
    }
