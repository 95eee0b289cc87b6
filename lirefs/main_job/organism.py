"""The organism's main job: settings chosen on validation items, numbers reported on test items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

import kfac
from lirefs.comparison.compare import compare
from lirefs.comparison.comparison import Comparison
from lirefs.directions.capture import capture
from lirefs.directions.probe import Probe, fit
from lirefs.main_job.settings import (
    KEEPS,
    LANGUAGE,
    READ,
    RECITED,
    SKILLS,
    TRUE,
    Choice,
    Push,
    choose,
    curvature_candidates,
    curvature_objective,
    steering_candidates,
    steering_objective,
)
from lirefs.model.intervention import Intervention, applied
from lirefs.model.language_model import LanguageModel
from lirefs.organism.language import Language
from lirefs.organism.questions import Form
from lirefs.organism.suite import organism_questions, organism_tasks
from lirefs.questions import Questions
from lirefs.statistics.intervals import Estimate, auroc, interval, resample_counts
from lirefs.tasks.inference import token_nlls
from lirefs.tasks.suite import memory_measures
from lirefs.tasks.task import Task

FORMS: tuple[Form, ...] = get_args(Form)
"""Surface forms of the question sets; each gives a direction, all are tested on all."""
SWEPT_MULTIPLES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
"""Swept strengths, as multiples of the one that was chosen."""
RANDOM_DIRECTIONS = 5
SPECTRUM_TASKS = (
    RECITED, "exceptions, memorized label", TRUE, "rare facts", "common facts", "addition",
    "facts with their passage", "boolean expressions", "relations", "object tracking",
)  # fmt: skip
STEERED_TASKS = (TRUE, READ, "relations")


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


def perplexity(
    lm: LanguageModel, ids: Sequence[Sequence[int]], intervention: Intervention | None
) -> float:
    """Perplexity per token over texts, given as token ids, under an intervention."""
    with applied(intervention, lm.model):
        nlls = token_nlls(lm, ids)
    return float(np.exp(sum(float(one.sum()) for one in nlls) / sum(map(len, nlls))))


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
    goal = perplexity(lm, ids, edit)
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if perplexity(lm, ids, kfac.SVDEdit(names, middle)) > goal:
            low = middle
        else:
            high = middle
    ends = [share for share in (low, high) if share > 0]
    reached = {share: perplexity(lm, ids, kfac.SVDEdit(names, share)) for share in ends}
    share = min(reached, key=lambda one: abs(np.log(reached[one] / goal)))
    return kfac.SVDEdit(names, share), (
        f"SVD keeps {share:.1%} of the singular values, chosen so that validation perplexity "
        f"({reached[share]:.3f}, n = {len(texts)} texts) matches K-FAC's ({goal:.3f}); "
        f"unchanged {perplexity(lm, ids, None):.3f}."
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
        added: The direction of the `add` that was chosen, its tokens and its strength.
        keeps: The curvature edit at `KEEPS`, on test items; described, never used to choose.
        pushes: `add` at `SWEPT_MULTIPLES` of its strength and at every layer, beside random
            directions; the same.
        matched: What SVD was matched to, in words.
    """

    comparison: Comparison
    probes: dict[Form, Probe]
    transfer: dict[tuple[str, str], Estimate]
    edit: Choice
    steers: dict[str, Choice]
    added: Push
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

    def chosen(
        candidates: Mapping[str, Intervention],
        objective: Callable[[Comparison, str], float],
        screen: Sequence[str],
        others: Sequence[str],
    ) -> Choice:
        asked = [task for task in few if task.name in (*screen, *others)]
        return choose(lm, candidates, asked, objective, screen, journal=journal, progress=progress)

    say("choosing the edit on validation items")
    edits = curvature_candidates(factors, lm.n_layers, layers, keep)
    screen = (RECITED, TRUE, LANGUAGE)
    edit = chosen(edits, curvature_objective, screen, (*SKILLS, "common facts"))
    say(f"edit: {edit.label} (of {edit.tried})")
    pushed: dict[str, Push] = {}
    steers: dict[str, Choice] = {}
    for operator in ("add", "amplify", "ablate"):
        pushes = steering_candidates(probes, operator, strength)
        some = {label: one.steer(operator) for label, one in pushes.items()}
        steers[operator] = chosen(some, steering_objective, (TRUE, LANGUAGE), SKILLS)
        pushed[operator] = pushes[steers[operator].label]
        say(f"{operator}: {steers[operator].label} (of {steers[operator].tried})")
    texts = [text for task in few if task.name == LANGUAGE for _, text in task.items]
    names = list(edit.intervention.keep)
    svd, matched = matched_svd(lm, edit.intervention, texts, names)
    say(matched)

    push, add = pushed["add"], steers["add"].intervention
    random = replace(push, direction=push.direction.random_like(seed)).steer("add")
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
    keeps = {
        f"keep {value:g}": edit.intervention.with_keep(dict.fromkeys(names, value))
        for value in KEEPS
    }
    spectrum = [task for task in test if task.name in (*SPECTRUM_TASKS, LANGUAGE)]
    swept: dict[str, Intervention] = {}
    for multiple in SWEPT_MULTIPLES:
        one = replace(push, strength=multiple * push.strength)
        swept |= _beside_random(f"strength {one.strength:g}", one, seed)
    for direction in probes[push.form].directions.values():
        one = replace(push, direction=direction)
        swept |= _beside_random(f"layer {direction.layer}", one, seed)
    steered = [task for task in test if task.name in STEERED_TASKS]
    return Study(
        comparison=comparison,
        probes=probes,
        transfer=transfer(lm, language, probes, push.direction.layer, n=max(20, limit)),
        edit=edit,
        steers=steers,
        added=push,
        keeps=compared(keeps, spectrum),
        pushes=compared(swept, steered),
        matched=matched,
    )


def _beside_random(name: str, push: Push, seed: int) -> dict[str, Intervention]:
    controls = [
        replace(push, direction=push.direction.random_like(seed + i))
        for i in range(RANDOM_DIRECTIONS)
    ]
    randoms = {f"{name}, random {i}": one.steer("add") for i, one in enumerate(controls)}
    return {name: push.steer("add"), **randoms}
