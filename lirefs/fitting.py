"""Directions from states: one fit at each place, whatever the states come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lirefs.capture import Activations, check_finite
from lirefs.direction import Direction
from lirefs.directions import Directions
from lirefs.errors import CaptureError, SettingError
from lirefs.estimators import MeanDifference, unit_of
from lirefs.learning import HoldingLearner, Learner, SumLearner
from lirefs.statistics import Floats, Ints


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
