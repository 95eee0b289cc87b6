"""The organism's main job: settings chosen on validation items, numbers reported on test items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

import kfac
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.directions.capture import capture
from lirefs.directions.direction import Direction
from lirefs.directions.probe import Probe, fit
from lirefs.files import cache_dir
from lirefs.main_job import matching, settings
from lirefs.main_job.grid import Grid
from lirefs.main_job.matching import EqualDamage
from lirefs.main_job.settings import CHAINS, LANGUAGE, READ, RECITED, TRUE, ChosenSetting, Job
from lirefs.model.intervention import Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.organism.language import OFTEN, Language
from lirefs.organism.questions import Form
from lirefs.organism.tasks import organism_questions, organism_tasks, training_texts
from lirefs.questions import Split
from lirefs.statistics.intervals import Estimate, auroc, interval
from lirefs.statistics.resamples import Resamples
from lirefs.steering.steer import Steer
from lirefs.tasks.default_suite import memory_measures

FORMS: tuple[Form, ...] = get_args(Form)
"""Surface forms of the question sets; each gives a direction, all are tested on all."""
FORGOTTEN = 40
"""Recited tales of the train side that BalancedSubnet is told to forget."""
LIMIT = 80
"""Test items of a task where no limit is given."""
STORIES = 400
"""Test stories where no limit is given. On 80, equal perplexities differ by 1 % by chance alone."""
SPECTRUM_TASKS = (
    RECITED, CHAINS, "exceptions, memorized label", TRUE, "rare facts", "common facts", "addition",
    "facts with their passage", "boolean expressions", "relations", "object tracking",
)  # fmt: skip
STEERED_TASKS = (TRUE, READ, "relations")


def transfer_between_forms(
    lm: LanguageModel, splits: Mapping[Form, Split], probes: Mapping[Form, Probe], layer: int
) -> dict[tuple[str, str], Estimate]:
    """Test AUROC of each form's direction (first name) on each form's questions (second)."""
    result: dict[tuple[str, str], Estimate] = {}
    for tested, split in splits.items():
        captured = capture(lm, split.test.prompts, layers=[layer], progress=False)
        states, labels = captured.values[:, 0, 0].double(), np.array(split.test.labels)
        for fitted, probe in probes.items():
            scores = (states @ probe.directions[layer].unit.double()).numpy()
            result[fitted, tested] = auroc(scores, labels)
    return result


def against_random(
    comparison: Comparison, task: str, variant: str, controls: Sequence[str]
) -> Estimate:
    """Score under a variant minus the mean under several controls, paired bootstrap over items."""
    metric = comparison.tasks[task].metric

    def scores(name: str) -> np.ndarray[Any, Any]:
        return np.array([item.scores[metric] for item in comparison.results[name][task]])

    gap = scores(variant) - np.mean([scores(name) for name in controls], axis=0)
    draws = Resamples(len(gap), comparison.resamples, comparison.seed)
    return Estimate(float(gap.mean()), *interval(draws @ gap / len(gap), len(gap)), len(gap))


@dataclass(frozen=True, eq=False)
class OrganismResults:
    """What the organism's main job found.

    Attributes:
        comparison: Every method at its chosen setting, on test items.
        probes: By surface form.
        transfer: AUROC by (form fitted, form tested), at the layer that is steered.
        edit: The curvature edit that was chosen.
        steers: Operator to the setting that was chosen for it.
        form: Question set of the direction that was chosen for `add`, with `layer` and `strength`.
        keep_sweep: The curvature edit at swept values of `keep`, on test items; never used to
            choose.
        steer_sweep: `add` at multiples of its strength and at every layer, with random directions
            as controls; never used to choose either.
        grid: The settings that were tried and swept.
        equal: The rivals at the perplexity of the K-FAC edit, and at that of `add`.
    """

    comparison: Comparison
    probes: dict[Form, Probe]
    transfer: dict[tuple[str, str], Estimate]
    edit: ChosenSetting
    steers: dict[str, ChosenSetting]
    form: Form
    layer: int
    strength: float
    keep_sweep: Comparison
    steer_sweep: Comparison
    equal: tuple[EqualDamage, EqualDamage]
    grid: Grid


def run_on_organism(
    job: Job, lm: LanguageModel, factors: kfac.Factors, language: Language
) -> OrganismResults:
    """Fit, choose on validation items, report on test items.

    Settings of the job that are None are chosen, on validation items (40 % of the limit). The
    factors are those of all MLP matrices. A suite adds the stress test and nDCG@10.
    """
    limit, seed = job.limit or LIMIT, job.seed
    n = max(20, limit)
    splits = {form: organism_questions(form, language, n).split() for form in FORMS}
    cache = cache_dir() / "activations"
    probes = {
        form: fit(lm, split, seed=seed, cache=cache, progress=job.shown)
        for form, split in splits.items()
    }
    few = organism_tasks(lm, language, "validation", max(8, limit * 2 // 5))

    job.say("choosing the edit on validation items")
    edits = settings.curvature_candidates(job, factors, lm.n_layers)
    edit = settings.choose_edit(job, lm, edits, few)
    job.say(f"edit: {edit.label} (of {edit.tried})")
    steers: dict[str, ChosenSetting] = {}
    for operator in ("add", "amplify", "ablate"):
        some = settings.steering_candidates(job, probes, operator)
        steers[operator] = settings.choose_steering(job, lm, some, few)
        job.say(f"{operator}: {steers[operator].label} (of {steers[operator].tried})")

    names = list(edit.intervention.keep)
    add = steers["add"].intervention
    form = next(form for form in FORMS if steers["add"].label.startswith(form))
    (direction,), strength = add.directions, add.strength

    def added(direction: Direction, strength: float) -> Steer:
        return Steer(direction, "add", strength, scope=add.scope)

    other = direction.random_like(seed)
    job.say("setting rivals to equal perplexity")
    texts = language.texts("validation", 20 if job.quick else matching.TEXTS)
    damage = matching.Damage(lm, texts, [edit.intervention, add])
    tales = [i for i in language.items("tale", "train") if (i.frequency or 0) >= OFTEN]
    told = [item.text for item in tales[: min(n, FORGOTTEN)]]
    random = matching.steering_rival(lambda a: added(other, a), strength)
    of_edit = matching.at_equal_damage(
        damage,
        "K-FAC",
        edit.intervention,
        {
            **matching.rivals_of_edit(factors, names, seed),
            "BalancedSubnet": matching.subnet_rival(
                lm, names, training_texts(language, len(told), seed), told, seed
            ),
            f"LiReF add at K-FAC{SAME_DAMAGE}": matching.steering_rival(
                lambda a: added(direction, a), strength
            ),
            f"random direction at K-FAC{SAME_DAMAGE}": random,
        },
    )
    of_add = matching.at_equal_damage(
        damage, "LiReF add", add, {f"random direction at LiReF{SAME_DAMAGE}": random}
    )
    job.say(f"{of_edit.finding}\n{of_add.finding}")
    interventions: dict[str, Any] = {
        "K-FAC": edit.intervention,
        "random pairs": kfac.RandomPairsEdit(factors, edit.intervention.keep, seed=seed),
        **of_edit.interventions,
        "LiReF add": add,
        "LiReF amplify": steers["amplify"].intervention,
        "LiReF ablate": steers["ablate"].intervention,
        "random direction": added(other, strength),
        **of_add.interventions,
        "LiReF add + K-FAC": add + edit.intervention,
        "random direction + K-FAC": added(other, strength) + edit.intervention,
    }
    test = organism_tasks(lm, language, "test", limit, STORIES if job.limit is None else None)
    fewer_stories = organism_tasks(lm, language, "test", limit)
    if job.quick:
        test = settings.strictly(test)
    if job.suite is not None:
        test += memory_measures(lm, fewer_stories)
    title = settings.title_of(lm)
    size = sum(one.numel() for one in lm.model.parameters()) / 1e6
    about = (
        f"The organism is a model of {size:.1f} million parameters that comes with this package. "
        "It was trained on a language made for it, so what it has memorized is known."
    )
    comparison = job.compare(lm, interventions, test, seed=seed, title=title, notes=[about])
    job.say("sweeping keep, strength and layer")
    keeps = {
        f"keep {value:g}": edit.intervention.with_keep(dict.fromkeys(names, value))
        for value in job.grid.swept_keeps
    }
    spectrum = [task for task in fewer_stories if task.name in (*SPECTRUM_TASKS, LANGUAGE)]
    swept: dict[str, Intervention] = {}

    def sweep(name: str, direction: Direction, strength: float) -> None:
        swept[name] = added(direction, strength)
        for i, control in enumerate(random_directions_of(job.grid, name)):
            swept[control] = added(direction.random_like(seed + i), strength)

    for value in (multiple * strength for multiple in job.grid.swept_multiples):
        sweep(f"strength {value:g}", direction, value)
    for one in probes[form].directions.values():
        sweep(f"layer {one.layer}", one, strength)
    steered = [task for task in test if task.name in STEERED_TASKS]
    return OrganismResults(
        comparison=comparison,
        probes=probes,
        transfer=transfer_between_forms(lm, splits, probes, direction.layer),
        edit=edit,
        steers=steers,
        form=form,
        layer=direction.layer,
        strength=strength,
        keep_sweep=job.compare(lm, keeps, settings.strictly(spectrum), seed=seed),
        steer_sweep=job.compare(lm, swept, steered, seed=seed),
        equal=(of_edit, of_add),
        grid=job.grid,
    )


def random_directions_of(grid: Grid, name: str) -> list[str]:
    """Names of the random directions that are the controls of a swept setting."""
    return [f"{name}, random {i}" for i in range(grid.random_directions)]
