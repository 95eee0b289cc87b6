"""Figures and findings of the organism's main job: four questions, answered with numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lirefs.comparison.comparison import BASELINE
from lirefs.comparison.controls import SAME_DAMAGE
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.summary import EQUAL
from lirefs.comparison.sweeps import damage_of
from lirefs.comparison.wording import (
    as_list_of_words,
    as_number,
    as_p,
    as_percent,
    as_points,
)
from lirefs.main_job import figures as plots
from lirefs.main_job import organism, settings
from lirefs.main_job.findings import largest_changes, separation_figure
from lirefs.main_job.organism import OrganismResults, against_random, random_directions_of
from lirefs.main_job.settings import CHAINS, LANGUAGE, READ, RECITED, TRUE, ChosenSetting
from lirefs.organism.language import EXCEPTION_SKILLS
from lirefs.organism.questions import Form
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT


def organism_findings(found: OrganismResults) -> list[str]:
    """The findings by question: a claim, its numbers with n and intervals, its setting."""
    answers = {
        "1. Does the K-FAC edit remove recitation, and what does it keep?": _spectrum(found),
        "2. Do exceptions return to the truth?": _exceptions(found),
        "3. Does the direction decide between reading and recalling?": _conflicts(found),
        "4. Is it one direction or several?": _directions(found),
        "5. What does each method change most besides memorization?": largest_changes(
            found.comparison
        ),
    }
    return [line for question, lines in answers.items() for line in (question, *lines)]


def organism_figures(found: OrganismResults) -> list[Figure]:
    """Figures of the four questions, in their order."""
    probe, scope = found.probes[found.form], found.steers["add"].intervention.scope.name
    keeps = {f"keep {value:g}": value for value in found.grid.swept_keeps}
    values = [multiple * found.strength for multiple in found.grid.swept_multiples]
    strengths = {value: f"strength {value:g}" for value in values}
    controls = [
        {value: random_directions_of(found.grid, name)[i] for value, name in strengths.items()}
        for i in range(found.grid.random_directions)
    ]
    effects = {
        task: [_beyond_random(found, task, f"layer {one.layer}") for one in probe.scores]
        for task in (TRUE, READ)
    }
    return [
        Figure(
            "keep_sweep",
            "Question 1: the spectrum from recitation to reasoning",
            f"Scores on test items when the {_matrices(found.edit)} are edited, from "
            "keep = 1, which is the unchanged model, down to where language itself has fallen. "
            "95 % Wilson intervals; colours are task groups, whose tasks differ in line and "
            "marker. Below: perplexity relative to the unchanged model's, on as many stories as "
            "other tasks have items. Only the setting of the K-FAC edit was chosen, on validation "
            "items.",
            plots.keep_spectrum(
                found.keep_sweep.summary(), keeps, organism.SPECTRUM_TASKS, LANGUAGE
            ),
        ),
        Figure(
            "strength_sweep",
            "Questions 2 and 3: steering against random directions",
            f"Adding the direction (form {found.form}, layer {found.layer}, scope {scope}) at "
            "several strengths; 1 moves a state by the distance between the class means. Grey: "
            f"{found.grid.random_directions} random directions of the same norm.",
            plots.strength_effect(
                found.steer_sweep.summary(), strengths, controls, organism.STEERED_TASKS
            ),
        ),
        Figure(
            "layers",
            "Question 3: where the direction separates, and where it acts",
            f"Left: test AUROC of each layer's direction. Right: change at strength "
            f"{found.strength:g} beyond the mean of {found.grid.random_directions} random "
            "directions of the same norm at the same layer, paired bootstrap over items.",
            plots.layer_effect([one.test_auroc for one in probe.scores], effects),
        ),
        Figure(
            "transfer",
            "Question 4: one direction or several",
            f"Directions fitted on four question sets at layer {found.layer}. passage and "
            "statement share no sentence template but ask for the same; mixed contrasts skills "
            "with bare facts; exception contrasts fresh items with memorized ones of the same "
            "kind.",
            plots.transfer_matrix(organism.FORMS, found.transfer, _cosines(found)),
        ),
        separation_figure(probe, f", form {found.form}"),
    ]


def organism_provenance(found: OrganismResults) -> dict[str, Any]:
    """What is saved with the items: findings, choices, probes and both sweeps cell by cell."""
    return {
        "findings": organism_findings(found),
        EQUAL: {one.name: list(one.matches) for one in found.equal},
        "chosen": {
            name: {"setting": one.label, "objective": one.objective, "tried": one.tried}
            for name, one in {"K-FAC": found.edit, **found.steers}.items()
        },
        "grids": {
            "keep": found.grid.keeps,
            "strength": found.grid.strengths,
            "scope": found.grid.scopes,
        },
        "transfer": {f"{a} on {b}": one.to_dict() for (a, b), one in found.transfer.items()},
        "probes": {form: probe.to_dict() for form, probe in found.probes.items()},
        "keep sweep": [asdict(cell) for cell in found.keep_sweep.cells()],
        "strength and layer sweep": [asdict(cell) for cell in found.steer_sweep.cells()],
    }


def _spectrum(found: OrganismResults) -> list[str]:
    table = found.comparison
    recited, before = (table.cell(name, RECITED).value for name in ("K-FAC", BASELINE))
    language = [table.cell(name, LANGUAGE).value for name in ("K-FAC", BASELINE)]
    cost = as_number(100 * (damage_of(table, "K-FAC", LANGUAGE) - 1))
    verb = "erases" if recited.value <= settings.STILL_RECITED else "does not erase"
    lines = [
        f"The K-FAC edit {verb} the tales and costs {cost} % perplexity. Recited: "
        f"{as_percent(recited)} of {recited.n}, from {as_number(100 * before.value)} %; perplexity "
        f"on stories: {language[0]}, from {language[1].value:.3f}. {_setting(found.edit)}",
        _chains(found),
    ]
    kept = {
        task: one
        for task, info in table.tasks.items()
        if info.group not in (CONFLICT, table.tasks[RECITED].group)
        and table.informative(task)
        and (one := table.cell("K-FAC", task).retained)
    }
    if kept:
        # Rounded as the tables show it, so that a reader counts the same number there.
        enough = sum(
            float(as_number(100 * one.value)) >= 100 * settings.KEPT_SHARE for one in kept.values()
        )
        worst, share = min(kept.items(), key=lambda pair: pair[1].value)
        lines.append(
            f"Under the K-FAC edit {enough} of {len(kept)} other tasks keep at least "
            f"{100 * settings.KEPT_SHARE:.0f} % of their score. Least kept: {worst}, "
            f"{as_percent(share)}. These are all tasks on which the unchanged model is above "
            "chance, except recitation and conflicts; shares are rounded as in the tables."
        )
    else:
        lines.append("No other task is above chance before the K-FAC edit, so none can be kept.")
    return [*lines, _at_equal_damage(found), *(one.finding for one in found.equal)]


def _chains(found: OrganismResults) -> str:
    """What the edit leaves of the other kind of memories, chains of random words."""
    chains, before = (found.comparison.cell(v, CHAINS).value for v in ("K-FAC", BASELINE))
    return (
        "Chains of random words are a second kind of memory. Recited under the K-FAC edit: "
        f"{as_percent(chains)} of {chains.n}, from {as_number(100 * before.value)} %."
    )


def _at_equal_damage(found: OrganismResults) -> str:
    """Who recites less at the perplexity of the K-FAC edit, with the paired differences."""
    matches = found.equal[0].matches
    rivals = [name for name, one in matches.items() if one.equal]
    if not rivals:
        return "No rival stands at the perplexity of the K-FAC edit, so none is compared with it."
    gaps = {one: against_random(found.comparison, RECITED, "K-FAC", [one]) for one in rivals}
    less = [one for one, gap in gaps.items() if gap.high < 0]
    rest = [one for one in rivals if one not in less]
    than = [f"less than {as_list_of_words(less)}"] if less else []
    than += [f"not clearly less than {as_list_of_words(rest)}"] if rest else []
    shown = (
        f"{one} {as_percent(found.comparison.cell(one, RECITED).value)}, K-FAC {as_points(gap)}"
        for one, gap in gaps.items()
    )
    n = gaps[rivals[0]].n
    return (
        f"At equal perplexity the K-FAC edit recites {' and '.join(than)}. Recited of {n}: "
        f"{'; '.join(shown)}, unadjusted."
    )


def _exceptions(found: OrganismResults) -> list[str]:
    base = found.comparison.cell(BASELINE, TRUE).value
    random, layer = ["random direction"], f"layer {found.layer}"
    edits, pushes = ["SVD", f"random pairs at K-FAC{SAME_DAMAGE}"], list(found.equal[1].matches)
    beyond = _beyond_random(found, TRUE, layer)
    lines = [
        f"The unchanged model answers {_seldom(base)} of the exceptions with the truth. "
        f"Answered with the truth: {as_percent(base)} of {base.n} ({_by_skill(found, BASELINE)}). "
        "Test items.",
        f"{_truth(found, 'K-FAC', edits)} {_setting(found.edit)}",
        f"{_truth(found, 'LiReF add', [*random, *pushes])} {_setting(found.steers['add'])}",
        f"Compared with {found.grid.random_directions} random directions instead of one, LiReF add "
        f"returns exceptions to the truth {_often(beyond)} their mean. Answered with the truth: "
        f"{_numbers_beyond(found, TRUE, layer)}. {_swept(found)}",
    ]
    for name in ("amplify", "ablate"):
        lines.append(f"{_truth(found, f'LiReF {name}', random)} {_setting(found.steers[name])}")
    both = _truth(found, "LiReF add + K-FAC", ["random direction + K-FAC"])
    return [*lines, f"{both} Settings: those of each alone."]


def _truth(found: OrganismResults, variant: str, controls: list[str]) -> str:
    """Exceptions answered with the truth under a variant and under its controls.

    The claim is what the adjusted test against the unchanged model allows.
    """
    cell = found.comparison.cell(variant, TRUE)
    beyond = against_random(found.comparison, TRUE, variant, controls)
    shares = [f"{name} {as_percent(found.comparison.cell(name, TRUE).value)}" for name in controls]
    rivals = " and ".join(controls)
    if cell.clear:
        claim = f"{variant} returns exceptions to the truth, {_often(beyond)} {rivals}."
    else:
        claim = f"{variant} is not shown to return exceptions to the truth."
    return (
        f"{claim} Answered with the truth: {as_percent(cell.value)} of {cell.value.n} "
        f"({_by_skill(found, variant)}), p (Holm) against the unchanged model {as_p(cell)}; "
        f"controls: {', '.join(shares)}; {as_points(beyond)} beyond "
        f"{'their mean' if len(controls) > 1 else 'it'}, unadjusted."
    )


def _seldom(share: Estimate) -> str:
    """How large a share is, in words."""
    return "none" if share.value == 0 else "few" if share.high < 0.5 else "many"


def _by_skill(found: OrganismResults, variant: str) -> str:
    """Exceptions answered with the truth in each skill, as counts."""
    items = found.comparison.results[variant][TRUE]
    scores = {s: [one.scores["accuracy"] for one in items if s in one.id] for s in EXCEPTION_SKILLS}
    return ", ".join(f"{skill} {sum(of):.0f} of {len(of)}" for skill, of in scores.items())


def _conflicts(found: OrganismResults) -> list[str]:
    base = found.steer_sweep.cell(BASELINE, READ).value
    lines = []
    for name in [f"strength {sign * found.strength:g}" for sign in (-1, 1)]:
        followed = found.steer_sweep.cell(name, READ).value
        beyond = _beyond_random(found, READ, name)
        lines.append(
            f"At {name} answers to conflicts follow the passage {_often(beyond)} under random "
            "directions on average. "
            f"Followed: {as_percent(followed)} of {base.n}, from {as_percent(base)}; "
            f"{_numbers_beyond(found, READ, name)}. {_swept(found)}"
        )
    scores = found.probes[found.form].scores
    areas = [one.test_auroc.value for one in scores]
    acts = [_beyond_random(found, READ, f"layer {i}") for i in range(len(areas))]
    best = int(np.argmax(areas))
    strongest = int(np.argmax([abs(one.value) for one in acts]))
    return [
        *lines,
        f"The direction separates best at layer {best} and moves conflicts most at layer "
        f"{strongest}. Test AUROC: {scores[best].test_auroc}; change beyond random directions: "
        f"{as_points(acts[strongest])}. Form {found.form}, every layer tried.",
    ]


def _beyond_random(found: OrganismResults, task: str, name: str) -> Estimate:
    return against_random(found.steer_sweep, task, name, random_directions_of(found.grid, name))


def _often(beyond: Estimate) -> str:
    """How an interval beyond some controls compares a frequency with theirs."""
    often = "more often than" if beyond.low > 0 else "about as often as"
    return "less often than" if beyond.high < 0 else often


def _numbers_beyond(found: OrganismResults, task: str, name: str) -> str:
    """The effect of a direction beyond random ones, and the range of these."""
    controls = random_directions_of(found.grid, name)
    shares = [found.steer_sweep.cell(one, task).value.value for one in controls]
    low, high = (as_number(100 * one) for one in (min(shares), max(shares)))
    return (
        f"{as_points(_beyond_random(found, task, name))} beyond the mean of {len(shares)} random "
        f"directions of the same norm ({low} to {high} %), unadjusted"
    )


def _swept(found: OrganismResults) -> str:
    """The setting of the sweeps over strength and layer."""
    scope = found.steers["add"].intervention.scope.name
    return f"Operator add, form {found.form}, layer {found.layer}, scope {scope}."


def _directions(found: OrganismResults) -> list[str]:
    cosines, where = _cosines(found), f"Layer {found.layer}."
    lines = []
    pairs: tuple[tuple[Form, Form], ...] = (("passage", "statement"), ("statement", "passage"))
    for own, other in pairs:
        here, there = found.transfer[own, own], found.transfer[own, other]
        verb = "separates" if there.low > 0.5 else "does not reliably separate"
        words = found.probes[own].bag_of_words
        lines.append(
            f"The {own} direction {verb} {other} questions. Test AUROC: {there}; {here} on its own "
            f"form, where a bag of words reaches {words}. {where}"
        )
    others = [form for form in organism.FORMS if form != "passage"]
    nearest = max(others, key=lambda other: cosines["passage", other])
    shown = [f"{cosines['passage', other]:.2f} with {other}" for other in others]
    return [
        *lines,
        f"Of the other directions, {nearest}'s is nearest to that of passage. Cosines: "
        f"{', '.join(shown)}. {where}",
    ]


def _cosines(found: OrganismResults) -> dict[tuple[str, str], float]:
    units = {form: probe.directions[found.layer].unit for form, probe in found.probes.items()}
    return {(a, b): float(units[a] @ units[b]) for a in units for b in units}


def _setting(one: ChosenSetting) -> str:
    if ";" in one.label:
        words = f"{_matrices(one)}, {one.label.rpartition('; ')[2]}"
    else:
        form, layer, scope, strength = one.label.split(", ")
        words = f"form {form}, {layer}, scope {scope}, strength {strength}"
    return f"Setting, the best of {one.tried} on validation items: {words}."


def _matrices(edit: ChosenSetting) -> str:
    """The matrices of a chosen edit, from "layers 0, 1; gate, up; keep 0.8"."""
    layers, which, _ = edit.label.split("; ")
    numbers = layers.removeprefix("layers ").split(", ")
    named = "gate and up projections" if which == "gate, up" else "gate, up and down projections"
    return f"{named} of layer{'s' * (len(numbers) > 1)} {' and '.join(numbers)}"
