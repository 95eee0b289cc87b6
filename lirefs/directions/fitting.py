"""Estimators over layers: what is learned from train states, and from shuffled labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone, is_regressor
from tqdm.auto import tqdm

from lirefs.directions.capture import Activations, check_finite
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import MeanDifference, along, unit_of
from lirefs.errors import CaptureError, SettingError
from lirefs.statistics.intervals import Floats, Ints


class Learner(Protocol):
    """Takes train states batch by batch; after `finish` it holds what was learned.

    Attributes:
        counts: Train items of each class, shape (2,).
        fitted: One estimator for each place.
        means: Class means, shape (places, 2, width).
        null: Vector of each shuffle at each place, shape (places, width, shuffles).
    """

    counts: Ints
    fitted: list[Any]
    means: Floats
    null: Floats

    def add(self, rows: list[int], states: Floats) -> None:
        """Take in states of train items `rows`, shape (rows, places, width)."""
        ...

    def finish(self) -> None:
        """Fit what could not be fitted on the way."""
        ...

    def vector(self, place: int) -> Floats:
        """The direction at a place, shape (width,)."""
        ...


class SumLearner:
    """Mean differences from sums: memory does not grow with the number of items.

    Args:
        estimator: A `MeanDifference`.
        labels: Shape (n,).
        orders: Permutations of the items, shape (shuffles, n).
    """

    def __init__(self, estimator: MeanDifference, labels: Ints, orders: Ints) -> None:
        self.counts = np.bincount(labels, minlength=2)
        self._estimator = estimator
        self._labels = labels
        self._wrong = labels[orders].T.astype(np.float64)
        self._sums: Floats | float = 0.0
        self.fitted: list[Any] = []

    def add(self, rows: list[int], states: Floats) -> None:
        """Take in states of train items `rows`, shape (rows, places, width)."""
        if not self.fitted:
            self.fitted = [clone(self._estimator) for _ in range(states.shape[1])]
        for place, one in enumerate(self.fitted):
            one.partial_fit(states[:, place], self._labels[rows], classes=[0, 1])
        self._sums = self._sums + states.transpose(1, 2, 0) @ self._wrong[rows]

    def finish(self) -> None:
        """Turn the sums into means."""
        self.means = np.stack([one.means_ for one in self.fitted])
        total = np.stack([one.sums_.sum(axis=0) for one in self.fitted])[:, :, None]
        count = self._wrong.sum(axis=0)
        self.null = self._sums / count - (total - self._sums) / (len(self._wrong) - count)

    def vector(self, place: int) -> Floats:
        """The direction at a place, shape (width,)."""
        vector: Floats = self.fitted[place].direction_
        return vector


class HoldingLearner:
    """Any linear estimator: the train states are kept until all are there.

    Args:
        estimator: Has `coef_` after `fit`, or is a search with `best_estimator_`.
        labels: Shape (n,).
        grades: Scores to fit instead of labels, if the estimator is a regressor, shape (n,).
        orders: Permutations of the items, shape (shuffles, n).
        progress: Show a progress bar.
    """

    def __init__(
        self, estimator: Any, labels: Ints, grades: Floats, orders: Ints, progress: bool = False
    ) -> None:
        self.counts = np.bincount(labels, minlength=2)
        self._estimator = estimator
        self._labels = labels
        self._targets = grades if is_regressor(estimator) else labels
        self._orders = orders
        self._progress = progress
        self._states: Floats | None = None

    def add(self, rows: list[int], states: Floats) -> None:
        """Take in states of train items `rows`, shape (rows, places, width)."""
        if self._states is None:
            self._states = np.empty((len(self._labels), *states.shape[1:]), np.float32)
        self._states[rows] = states

    def finish(self) -> None:
        """Fit at every place, on the right targets and on the shuffled ones."""
        assert self._states is not None
        states = self._states.transpose(1, 0, 2).astype(np.float64)
        self.fitted = [clone(self._estimator).fit(one, self._targets) for one in states]
        sides = [states[:, self._labels == label].mean(axis=1) for label in (0, 1)]
        self.means = np.stack(sides, axis=1)
        self._vectors = [
            vector_of(fitted, one, self._targets)
            for fitted, one in zip(self.fitted, states, strict=True)
        ]
        self.null = np.empty((len(states), states.shape[2], len(self._orders)))
        bar = tqdm(self._orders, desc="shuffled labels", disable=not self._progress)
        for shuffle, order in enumerate(bar):
            for place, one in enumerate(states):
                wrong = clone(self._estimator).fit(one, self._targets[order])
                self.null[place, :, shuffle] = coefficients(wrong)

    def vector(self, place: int) -> Floats:
        """The direction at a place, shape (width,)."""
        return self._vectors[place]


def coefficients(estimator: Any) -> Floats:
    """The coefficients of a fitted linear model, shape (n_features,).

    Raises:
        SettingError: It has no `coef_`, or more than one row of them.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)
    found = getattr(estimator, "coef_", None)
    if found is None:
        raise SettingError(
            f"{type(estimator).__name__} has no coef_: a direction needs a linear model, given "
            "by itself and not inside a pipeline"
        )
    rows: Floats = np.atleast_2d(np.asarray(found, np.float64))
    if rows.shape[0] != 1:
        raise SettingError(f"{type(estimator).__name__} has {rows.shape[0]} rows of coef_, not one")
    only: Floats = rows[0]
    return only


def vector_of(estimator: Any, states: Floats, targets: npt.NDArray[Any]) -> Floats:
    """What steering adds: `direction_`, or `coef_` at the length that spans the classes.

    Args:
        estimator: A fitted linear model.
        states: What it was fitted on, shape (n, width).
        targets: Labels 0 and 1, or grades, shape (n,).

    Raises:
        SettingError: It has no coefficients.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)
    if hasattr(estimator, "direction_"):
        return np.asarray(estimator.direction_, np.float64)
    return along(coefficients(estimator), states, targets.astype(np.float64))


def decide(estimator: Any, states: Floats) -> tuple[Floats, Ints]:
    """Scores of states and the labels they are given, shape (n,) each."""
    if is_regressor(estimator):
        scores = np.asarray(estimator.predict(states), np.float64)
        return scores, (scores > 0.5).astype(np.int64)
    return np.asarray(estimator.decision_function(states), np.float64), estimator.predict(states)


def fit_directions(
    states: Activations,
    labels: list[int],
    estimator: Any = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Fit one direction per place on states from anywhere: TransformerLens, nnsight, a file.

    Args:
        states: States of one position each, from `capture` or a backend.
        labels: 0 for memory and 1 for reasoning, one for each prompt.
        estimator: As for `fit`; None for `MeanDifference()`.
        provenance: What made them; with `model`, the fingerprint of the model, steering another
            model is refused.

    Raises:
        CaptureError: If there is not one label for each prompt, or not one position, a label is
            neither 0 nor 1 or one of them is missing.
        NonFiniteError: If a state is not finite.
        SettingError: If the estimator is not a linear model, or gives a vector that is not finite.
    """
    values = states.values
    if values.shape[2] != 1 or len(labels) != len(values):
        raise CaptureError(
            f"expected one position and {len(values)} labels, got {values.shape[2]} and "
            f"{len(labels)}"
        )
    found = set(labels)
    if found != {0, 1}:
        raise CaptureError(
            f"labels must hold 0 (memory) and 1 (reasoning), both of them; found {sorted(found)}"
        )
    check_finite(values, states.places, states.positions, range(len(values)))
    index = np.asarray(labels, np.int64)
    estimator = MeanDifference() if estimator is None else estimator
    none = np.empty((0, len(index)), np.int64)
    learner = learner_for(estimator, index, index.astype(np.float64), none, progress=False)
    samples = values[:, :, 0].double().numpy()
    learner.add(list(range(len(samples))), samples)
    learner.finish()
    directions = {}
    for place, where in enumerate(states.places):
        projections = samples[:, place] @ unit_of(learner.vector(place))
        directions[where] = direction_of(learner, place, where, projections, index)
    return Directions(directions, dict(provenance or {}))


def learner_for(
    estimator: Any, labels: Ints, targets: Floats, orders: Ints, *, progress: bool
) -> Learner:
    """Sums where they are enough, all states where an estimator needs them.

    Args:
        estimator: A linear model.
        labels: Of the train items, shape (n,).
        targets: What a regressor is fitted on, shape (n,).
        orders: Permutations of the items, shape (shuffles, n).
        progress: Show a progress bar.
    """
    if isinstance(estimator, MeanDifference):
        return SumLearner(estimator, labels, orders)
    return HoldingLearner(estimator, labels, targets, orders, progress)


def direction_of(
    learner: Learner, place: int, where: tuple[int, str], projections: Floats, labels: Ints
) -> Direction:
    """What was learned at a place, with the class means of train items and a spread.

    Args:
        learner: What was learned.
        place: Index of the place in the learner.
        where: Its (layer, site).
        projections: Of the items that give the spread, on the unit vector, shape (n,).
        labels: Theirs, shape (n,).

    Raises:
        SettingError: The estimator gave a vector that is not finite.
    """
    vector = learner.vector(place)
    stored = torch.from_numpy(vector).float()
    if not bool(torch.isfinite(stored).all()):
        raise SettingError(
            f"{type(learner.fitted[place]).__name__} gave a direction that is not finite at layer "
            f"{where[0]}, {where[1]}; give it more questions or a stronger penalty"
        )
    first, second = (float(mean) for mean in learner.means[place] @ unit_of(vector))
    spread = [float(projections[labels == label].std()) for label in (0, 1)]
    return Direction(
        vector=stored,
        layer=where[0],
        site=where[1],
        means=(first, second),
        spread=(spread[0], spread[1]),
        counts=(int(learner.counts[0]), int(learner.counts[1])),
    )
