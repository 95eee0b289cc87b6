"""Estimators over layers: what is learned from train states, and from shuffled labels."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sklearn.base import clone, is_regressor
from tqdm.auto import tqdm

from lirefs.errors import SettingError
from lirefs.estimators import MeanDifference, along
from lirefs.statistics import Floats, Ints


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
