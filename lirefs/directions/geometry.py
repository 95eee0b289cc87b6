"""Directions compared with each other, on other questions, and with principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

from lirefs.directions.capture import capture, stream_states
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.held_out import held_out_sample
from lirefs.directions.prompts import prompts_of
from lirefs.errors import DirectionError, QuestionsError, checked_seed, must_be
from lirefs.model.language_model import LanguageModel
from lirefs.questions import Questions, Split
from lirefs.statistics.intervals import Estimate, Floats, auroc, interval, roc_areas

COMPONENT_ITEMS = 512
"""Most items of each side whose principal components are computed."""


def cosines(one: Directions, other: Directions | None = None) -> Floats:
    """Cosine of each direction with each of `other` (None for the same), shape (places, places).

    Raises:
        DirectionError: If widths differ.
    """
    rows, columns = _units(one), _units(one if other is None else other)
    if rows.shape[1] != columns.shape[1]:
        raise DirectionError(f"directions of width {rows.shape[1]} and {columns.shape[1]}")
    return rows @ columns.T


@dataclass(frozen=True)
class Transfer:
    """Directions of one question set on the questions of another.

    Attributes:
        layers: The layers, in order.
        auroc: AUROC of the projections, for each layer.
        random: AUROC of random directions, their signs chosen on these same items, which favours
            them: mean and 95 % range, for each layer.
    """

    layers: tuple[int, ...]
    auroc: tuple[Estimate, ...]
    random: tuple[Estimate, ...]

    def __repr__(self) -> str:
        return f"Transfer({len(self.layers)} layers)"


def transfer(
    lm: LanguageModel,
    directions: Directions,
    questions: Questions,
    fitted_on: Split,
    *,
    controls: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Transfer:
    """Score directions on questions that they were not fitted on.

    Args:
        lm: The model.
        directions: One per layer.
        questions: The other set; all of it is used.
        fitted_on: The questions that the directions were fitted and chosen on.
        controls: Number of random directions.
        seed: Seed of the random directions.
        progress: Show a progress bar.

    Raises:
        QuestionsError: If the sets share a question.
        CaptureError: If activations cannot be read.
    """
    seed = checked_seed(seed)
    refuse_fitted_questions(questions, fitted_on)
    layers = [layer for layer, _ in directions]
    sites = tuple({site for _, site in directions})
    units = _units(directions)
    noise = np.random.default_rng(seed).normal(size=(units.shape[1], controls))
    labels, prompts = np.array(questions.labels), prompts_of(lm, questions)
    projections = np.empty((len(questions), len(layers)))
    random = np.empty((len(questions), len(layers), controls), np.float32)
    batches = stream_states(lm, prompts, layers=layers, sites=sites, progress=progress)
    for rows, states in batches:
        values = states.double().numpy()
        projections[rows] = np.einsum("npw,pw->np", values, units)
        random[rows] = values @ noise
    found = roc_areas(random, labels)
    found = np.maximum(found, 1 - found)
    return Transfer(
        layers=tuple(layers),
        auroc=tuple(auroc(projections[:, place], labels) for place in range(len(layers))),
        random=tuple(Estimate(float(one.mean()), *interval(one), len(labels)) for one in found),
    )


def refuse_fitted_questions(questions: Questions, fitted_on: Split) -> None:
    """Raise QuestionsError if directions were fitted or chosen on one of the questions."""
    must_be(questions, Questions, "questions", QuestionsError)
    must_be(fitted_on, Split, "the split", QuestionsError)
    used = {item.key for side in (fitted_on.train, fitted_on.validation) for item in side}
    shared = [item.id for item in questions if item.key in used]
    if shared:
        raise QuestionsError(
            f"{questions.source}: the directions were fitted on {len(shared)} of its questions, "
            f"first {shared[0]!r}; leave them out"
        )


@dataclass(frozen=True, eq=False)
class Components:
    """Test states of one layer along a direction and the principal components of train states.

    Attributes:
        direction: The direction.
        explained: Share of the variance of train states by component, shape (components,).
        cosines: Absolute cosine of each component with the direction, shape (components,).
        random: 97.5th percentile of the first component's absolute cosine with random directions.
        points: Test states on the first two components, shape (n, 2).
        axis: The direction's unit vector on them, shape (2,).
        middle: The midpoint of the train class means on them, shape (2,).
        labels: Label of each point, shape (n,).
    """

    direction: Direction
    explained: Floats
    cosines: Floats
    random: float
    points: Floats
    axis: Floats
    middle: Floats
    labels: Floats

    def __repr__(self) -> str:
        return f"Components({self.direction!r}, {len(self.explained)} components)"


def components(lm: LanguageModel, direction: Direction, split: Split) -> Components:
    """Ten principal components of train states at a direction's place, and test states on them.

    Args:
        lm: The model.
        direction: A direction, which gives the place.
        split: Train items give the components, test items the points; at most 512 of each.

    Raises:
        CaptureError: If activations cannot be read.
    """
    must_be(direction, Direction, "direction", DirectionError)
    must_be(split, Split, "split", QuestionsError)
    train, test = (
        [side[i] for i in held_out_sample(0, len(side), COMPONENT_ITEMS).tolist()]
        for side in (split.train, split.test)
    )
    prompts = prompts_of(lm, (*train, *test))
    layers, sites = [direction.layer], [direction.site]
    captured = capture(lm, prompts, layers=layers, sites=sites, progress=False)
    states = captured.values[:, 0, 0].double().numpy()
    fitted = PCA(min(10, len(train), states.shape[1]), svd_solver="full")
    fitted.fit(states[: len(train)])
    unit = direction.unit.double().numpy()
    noise = np.random.default_rng(0).normal(size=(1000, len(unit)))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    labels = np.array([one.label == split.train.names[0] for one in (*train, *test)], np.float64)
    classes = [states[: len(train)][labels[: len(train)] == label].mean(0) for label in (0, 1)]
    return Components(
        direction=direction,
        explained=fitted.explained_variance_ratio_,
        cosines=np.abs(fitted.components_ @ unit),
        random=float(np.percentile(np.abs(noise @ fitted.components_[0]), 97.5)),
        points=fitted.transform(states[len(train) :])[:, :2],
        axis=fitted.components_[:2] @ unit,
        middle=fitted.transform(np.mean(classes, axis=0)[None])[0, :2],
        labels=labels[len(train) :],
    )


def _units(directions: Directions) -> Floats:
    must_be(directions, Directions, "directions", DirectionError)
    return np.stack([one.unit.double().cpu().numpy() for one in directions.values()])
