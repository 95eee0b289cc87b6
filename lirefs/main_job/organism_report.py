"""Figures and findings of the organism's main job: four questions, answered with numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.directions.figures import direction_separation
from lirefs.main_job import figures as plots
from lirefs.main_job.organism import (
    FORMS,
    RANDOM_DIRECTIONS,
    SPECTRUM_TASKS,
    SWEPT_MULTIPLES,
    Study,
    against_random,
)
from lirefs.main_job.settings import (
    KEEPS,
    KEPT_SHARE,
    LANGUAGE,
    READ,
    RECITED,
    SCOPES,
    SKILLS,
    STRENGTHS,
    TRUE,
)
from lirefs.organism.language import EXCEPTION_SKILLS
from lirefs.statistics.intervals import Estimate


def findings(study: Study) -> list[str]:
    """What was found, one sentence or two each, with n and intervals."""
    return [*_spectrum(study), *_exceptions(study), *_conflicts(study), *_directions(study)]


def figures(study: Study) -> list[Figure]:
    """Figures of the four questions, in their order."""
    push, probe = study.added, study.probes[study.added.form]
    keeps = {f"keep {value:g}": value for value in KEEPS}
    places = {name: (value, _perplexity(study.keeps, name)) for name, value in keeps.items()}
    strengths = {
        multiple * push.strength: f"strength {multiple * push.strength:g}"
        for multiple in SWEPT_MULTIPLES
    }
    controls = [
        {value: f"{name}, random {i}" for value, name in strengths.items()}
        for i in range(RANDOM_DIRECTIONS)
    ]
    layers = [f"layer {one.layer}" for one in probe.scores]
    effects = {
        task: [against_random(study.pushes, task, name, _randoms(name)) for name in layers]
        for task in (TRUE, READ)
    }
    return [
        Figure(
            "keep_sweep",
            "Question 1: the spectrum from recitation to reasoning",
            f"Scores on test items when {study.edit.label.rsplit(';', 1)[0]} are edited at several "
            "values of keep, against the curvature mass that is kept (left) and the perplexity on "
            "stories relative to the unchanged model's (right). 95 % Wilson intervals. Only the "
            "setting named above was chosen, on validation items.",
            plots.scores_against(
                study.keeps.summary(),
                places,
                SPECTRUM_TASKS,
                ("curvature mass kept", "perplexity over the unchanged model's"),
            ),
        ),
        Figure(
            "strength_sweep",
            "Questions 2 and 3: steering against random directions",
            f"Adding the direction (form {push.form}, layer {push.direction.layer}, scope "
            f"{push.scope}) at several strengths; 1 moves a state by the distance "
            "between the class means. Grey: "
            f"{RANDOM_DIRECTIONS} random directions of the same norm.",
            plots.strength_effect(
                study.pushes.summary(), strengths, controls, (TRUE, READ, "relations")
            ),
        ),
        Figure(
            "layers",
            "Question 3: where the direction separates, and where it acts",
            f"Left: test AUROC of each layer's direction. Right: change at strength "
            f"{push.strength:g} beyond the mean of {RANDOM_DIRECTIONS} random directions of the "
            "same norm at the same layer, paired bootstrap over items.",
            plots.layer_effect([one.test_auroc for one in probe.scores], effects),
        ),
        Figure(
            "transfer",
            "Question 4: one direction or several",
            f"Directions fitted on four question sets at layer {push.direction.layer}. passage "
            "and statement share no sentence template but ask for the same; mixed puts skills "
            "against bare facts; exception puts fresh items against memorized ones of the same "
            "make.",
            plots.transfer_matrix(FORMS, study.transfer, _cosines(study)),
        ),
        Figure(
            "separation",
            f"Direction separation per layer, form {push.form}",
            "Left: AUROC of the mean-difference direction on test questions with 95 % bootstrap "
            "intervals, beside its controls. Right: mean cosine of the test questions' states, "
            "measured from the middle of the train class means, with each layer's direction.",
            direction_separation(probe),
        ),
    ]


def provenance(study: Study) -> dict[str, Any]:
    """What is saved beside the items: findings, choices, probes and both sweeps cell by cell."""
    return {
        "findings": findings(study),
        "chosen": {
            name: {"setting": one.label, "objective": one.objective, "tried": one.tried}
            for name, one in {"K-FAC": study.edit, **study.steers}.items()
        },
        "grids": {"keep": KEEPS, "strength": STRENGTHS, "scope": SCOPES},
        "transfer": {f"{a} on {b}": one.to_dict() for (a, b), one in study.transfer.items()},
        "probes": {form: probe.to_dict() for form, probe in study.probes.items()},
        "keep sweep": [asdict(cell) for cell in study.keeps.cells()],
        "strength and layer sweep": [asdict(cell) for cell in study.pushes.cells()],
    }


def _spectrum(study: Study) -> list[str]:
    found = study.comparison
    recited = found.cell("K-FAC", RECITED)
    kept = {
        task: found.cell("K-FAC", task).retained
        for task in (*SKILLS, "common facts")
        if found.informative(task)
    }
    enough = sum(_number(one) >= KEPT_SHARE for one in kept.values())
    worst = min(kept, key=lambda task: _number(kept[task]), default=None)
    least = (
        "No skill is above chance before it. "
        if worst is None
        else (f"The skill that keeps least is {worst}: {kept[worst]} of its score. ")
    )
    return [
        f"1. Edit chosen on validation items among {study.edit.tried}: {study.edit.label}. On test "
        f"items it leaves {recited.value} of planted sequences (n = {recited.value.n}; unchanged "
        f"{found.cell(BASELINE, RECITED).value}), at a perplexity of "
        f"{found.cell('K-FAC', LANGUAGE).value} (unchanged "
        f"{found.cell(BASELINE, LANGUAGE).value.value:.3f}). "
        f"{least}{enough} of {len(kept)} of {', '.join(kept)} keep {KEPT_SHARE:.0%}. "
        + study.matched
    ]


def _exceptions(study: Study) -> list[str]:
    found = study.comparison
    parts = [
        f"{name} {found.cell(name, TRUE).value}"
        for name in (BASELINE, "K-FAC", "SVD", "random pairs", "LiReF add", "LiReF amplify",
                     "LiReF ablate", "random direction", "LiReF add + K-FAC",
                     "random direction + K-FAC")
    ]  # fmt: skip
    n = found.cell(BASELINE, TRUE).value.n
    return [
        f"2. Exceptions answered with the truth (n = {n} test items): " + "; ".join(parts) + ". "
        "By skill: "
        + "; ".join(f"{name} {_by_skill(study, name)}" for name in (BASELINE, "K-FAC", "LiReF add"))
        + ". "
        + _against_random(study, TRUE, f"layer {study.added.direction.layer}", "LiReF add")
        + "LiReF settings, chosen on validation items: "
        + "; ".join(f"{name} {one.label} (of {one.tried})" for name, one in study.steers.items())
        + "."
    ]


def _against_random(study: Study, task: str, name: str, label: str) -> str:
    """What the direction does beyond random ones, and how far these lie apart."""
    shares = [study.pushes.cell(one, task).value.value for one in _randoms(name)]
    beyond = against_random(study.pushes, task, name, _randoms(name))
    return (
        f"{label} beyond {len(shares)} random directions of the same norm "
        f"({min(shares):.3f} to {max(shares):.3f}): {beyond:+.3f}. "
    )


def _by_skill(study: Study, variant: str) -> str:
    """Exceptions answered with the truth in each skill, as counts."""
    parts = []
    for skill in EXCEPTION_SKILLS:
        items = [one for one in study.comparison.results[variant][TRUE] if skill in one.id]
        right = sum(one.scores["accuracy"] for one in items)
        parts.append(f"{skill} {right:.0f} of {len(items)}")
    return ", ".join(parts)


def _conflicts(study: Study) -> list[str]:
    ends = [f"strength {sign * study.added.strength:g}" for sign in (-1, 1)]
    parts = []
    for name in ends:
        cell = study.pushes.cell(name, READ)
        parts.append(
            f"At {name} the passage is followed in {cell.value} (change {cell.difference:+.3f}). "
            + _against_random(study, READ, name, "Change")
        )
    base = study.pushes.cell(BASELINE, READ).value
    areas = [one.test_auroc.value for one in study.probes[study.added.form].scores]
    acts = [
        abs(against_random(study.pushes, READ, f"layer {layer}", _randoms(f"layer {layer}")).value)
        for layer in range(len(areas))
    ]
    return [
        f"3. Conflicts (n = {base.n}; unchanged {base} follow the passage). "
        + "".join(parts)
        + f"The direction separates best at layer {int(np.argmax(areas))} and moves conflicts "
        f"most beyond random directions at layer {int(np.argmax(acts))}."
    ]


def _directions(study: Study) -> list[str]:
    cosines, layer = _cosines(study), study.added.direction.layer
    here, there = study.transfer["passage", "statement"], study.transfer["statement", "passage"]
    own = [study.transfer[form, form] for form in ("passage", "statement")]
    words = [study.probes[form].bag_of_words for form in ("passage", "statement")]
    return [
        f"4. At layer {layer} the passage direction has a test AUROC of {own[0]} "
        f"on its own form and {here} on the statement form; the statement direction {own[1]} and "
        f"{there}; cosine between them {cosines['passage', 'statement']:.2f}, with mixed "
        f"{cosines['passage', 'mixed']:.2f}, with exception {cosines['passage', 'exception']:.2f}. "
        f"A bag of words reaches {words[0]} and {words[1]}."
    ]


def _cosines(study: Study) -> dict[tuple[str, str], float]:
    units = {
        form: probe.directions[study.added.direction.layer].unit
        for form, probe in study.probes.items()
    }
    return {(a, b): float(units[a] @ units[b]) for a in units for b in units}


def _randoms(name: str) -> list[str]:
    return [f"{name}, random {i}" for i in range(RANDOM_DIRECTIONS)]


def _perplexity(comparison: Comparison, variant: str) -> float:
    value = comparison.cell(variant, LANGUAGE).value.value
    return value / comparison.cell(BASELINE, LANGUAGE).value.value


def _number(one: Estimate | Any | None) -> float:
    return float(one.value) if one is not None else 1.0
