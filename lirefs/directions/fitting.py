"""Fitting one estimator at every place, on the train labels and on shuffled ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone, is_regressor
from tqdm.auto import tqdm

from lirefs.directions.capture import Activations, check_finite_states
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import MeanDifference, scaled_to_scores, unit_vector
from lirefs.errors import CaptureError, SettingError, as_list, must_be
from lirefs.statistics.intervals import Floats, Ints


def fit_directions(
    states: Activations,
    labels: list[int],
    estimator: Any = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    """Fit one direction per place on states from any source: TransformerLens, nnsight, a file.

    Args:
        states: States of one position each, from `capture` or a backend.
        labels: 1 for prompts of the class that directions point to (reasoning), 0 for the other
            (memory), one for each prompt; `Questions.labels` are such.
        estimator: As for `fit`; None for `MeanDifference()`.
        provenance: Origin of the states. If it has `model`, the fingerprint of a model, the
            directions refuse to steer any other; `labels` names the two classes, that of 1 first.

    Raises:
        CaptureError: If there is not one label for each prompt, or not one position, a label is
            neither 0 nor 1, or one of the two is missing.
        NonFiniteStateError: If a state is not finite; the message says which.
        SettingError: If the estimator is not a linear model, or gives a vector that is not finite.
    """
    must_be(states, Activations, "states", CaptureError)
    labels = as_list(labels, "labels", error=CaptureError)
    values = states.values
    n, _, positions, _ = values.shape
    if positions != 1 or len(labels) != n:
        raise CaptureError(f"need one position and {n} labels, got {positions} and {len(labels)}")
    if found := set(labels) ^ {0, 1}:
        raise CaptureError(
            "labels must hold 0 and 1 (the class to point to), both of them and nothing else; "
            f"wrong or missing: {sorted(found)}"
        )
    check_finite_states(values, states.places, states.positions, range(n))
    index, no_shuffles = np.asarray(labels, np.int64), np.empty((0, n), np.int64)
    estimator = MeanDifference() if estimator is None else estimator
    learner = learner_for(estimator, index, index.astype(np.float64), no_shuffles)
    samples = values[:, :, 0].double().numpy()
    learner.add(list(range(n)), samples)
    learner.finish()
    directions = {}
    for i, place in enumerate(states.places):
        projections = samples[:, i] @ unit_vector(learner.vectors[i])
        directions[place] = direction_of_learner(learner, i, place, projections, index)
    return Directions(directions, dict(provenance or {}))


class SumLearner:
    """Mean differences from sums: memory does not grow with the number of items.

    `finish` sets, at each place, `vectors`, shape (places, width), the class `means`, (places, 2,
    width), and the vector of each shuffle, `null`, (places, width, shuffles).
    """

    def __init__(self, estimator: MeanDifference, labels: Ints, orders: Ints) -> None:
        self.labels = labels
        self.fitted: list[Any] = []
        self._estimator = estimator
        self._shuffled = labels[orders].T.astype(np.float64)
        self._sums: Floats | float = 0.0

    def add(self, rows: list[int], states: Floats) -> None:
        """Take in states of train items `rows`, shape (rows, places, width)."""
        if not self.fitted:
            self.fitted = [clone(self._estimator) for _ in range(states.shape[1])]
        for place, one in enumerate(self.fitted):
            one.partial_fit(states[:, place], self.labels[rows], classes=[0, 1])
        self._sums = self._sums + states.transpose(1, 2, 0) @ self._shuffled[rows]

    def finish(self) -> None:
        """Turn the sums into means and their differences."""
        self.vectors = np.stack([one.direction_ for one in self.fitted])
        self.means = np.stack([one.means_ for one in self.fitted])
        total = np.stack([one.sums_.sum(axis=0) for one in self.fitted])[:, :, None]
        count = self._shuffled.sum(axis=0)
        self.null = self._sums / count - (total - self._sums) / (len(self._shuffled) - count)


@dataclass(eq=False)
class StateLearner:
    """Any linear estimator, from all train states; attributes and methods as in `SumLearner`."""

    estimator: Any
    labels: Ints
    targets: npt.NDArray[Any]
    orders: Ints
    progress: bool
    _states: Floats | None = None

    def add(self, rows: list[int], states: Floats) -> None:
        """Keep states, in float32."""
        if self._states is None:
            self._states = np.empty((len(self.labels), *states.shape[1:]), np.float32)
        self._states[rows] = states

    def finish(self) -> None:
        """Fit at every place, on the true targets and on the shuffled ones."""
        assert self._states is not None
        states = self._states.transpose(1, 0, 2).astype(np.float64)
        self.fitted = [clone(self.estimator).fit(one, self.targets) for one in states]
        pairs = zip(self.fitted, states, strict=True)
        self.vectors = np.stack([_vector_of(fitted, one, self.targets) for fitted, one in pairs])
        sides = [states[:, self.labels == label].mean(axis=1) for label in (0, 1)]
        self.means = np.stack(sides, axis=1)
        self.null = np.empty((len(states), states.shape[2], len(self.orders)))
        bar = tqdm(self.orders, desc="shuffled labels", disable=not self.progress or None)
        for shuffle, order in enumerate(bar):
            for place, one in enumerate(states):
                wrong = clone(self.estimator).fit(one, self.targets[order])
                self.null[place, :, shuffle] = _coefficients(wrong)


def _vector_of(estimator: Any, states: Floats, targets: npt.NDArray[Any]) -> Floats:
    """The vector that steering adds: `direction_`, or `coef_` as long as it spans the classes."""
    estimator = getattr(estimator, "best_estimator_", estimator)
    if hasattr(estimator, "direction_"):
        return np.asarray(estimator.direction_, np.float64)
    return scaled_to_scores(_coefficients(estimator), states, targets.astype(np.float64))


def _coefficients(estimator: Any) -> Floats:
    """The coefficients of a fitted linear model, shape (n_features,); SettingError without them."""
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
    return rows.ravel()


Learner = SumLearner | StateLearner


def learner_for(
    estimator: Any, labels: Ints, targets: npt.NDArray[Any], orders: Ints, progress: bool = False
) -> Learner:
    """The learner for an estimator: from sums where they are enough, else from all train states.

    Labels of the n train items are 0 or 1; a regressor is fitted on the targets, shape (n,),
    instead. Each row of orders, (shuffles, n), shuffles them.
    """
    if isinstance(estimator, MeanDifference):
        return SumLearner(estimator, labels, orders)
    targets = targets if is_regressor(estimator) else labels
    return StateLearner(estimator, labels, targets, orders, progress)


def direction_of_learner(
    learner: Learner, index: int, place: tuple[int, str], projections: Floats, labels: Ints
) -> Direction:
    """The direction that a finished learner found at its place number `index`, if it is finite.

    Projections on the unit vector, shape (n,), of items with these labels give the spread.
    """
    layer, site = place
    vector = torch.from_numpy(learner.vectors[index]).float()
    if not bool(torch.isfinite(vector).all()):
        raise SettingError(
            f"{type(learner.fitted[index]).__name__} gave a direction that is not finite at layer "
            f"{layer}, {site}; give it more questions or a stronger penalty"
        )
    means = (learner.means[index] @ unit_vector(learner.vectors[index])).tolist()
    spread = np.array([projections[labels == label].std() for label in (0, 1)]).tolist()
    counts = np.bincount(learner.labels, minlength=2).tolist()
    return Direction(vector, layer, site, tuple(means), tuple(spread), tuple(counts))
