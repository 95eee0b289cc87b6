"""Scores of held-out states along fitted directions and along their controls."""

from __future__ import annotations

import numpy as np
from sklearn.base import is_regressor

from lirefs.directions.fitting import Learner
from lirefs.statistics.intervals import Floats, Ints

CONTROL_ITEMS = 2000
"""Most items of each side that controls are scored on: enough for a distribution."""


class HeldOut:
    """Scores of n held-out items, validation items first, at every place, filled batch by batch.

    A finished learner gives decision values (`scores`), labels (`predicted`), `projections` on the
    unit direction and `cosines` with it, measured from the middle of the train class means, shape
    (n, places). Shuffled directions and as many random ones score the `control_rows` of both
    `sides`: `shuffled` and `random`, (rows, places, shuffles).
    """

    def __init__(self, learner: Learner, labels: Ints, validation: int, seed: int) -> None:
        self.labels = labels
        self.sides = slice(0, validation), slice(validation, len(labels))
        self._learner = learner
        n, (places, width, controls) = len(labels), learner.null.shape
        norms = np.linalg.norm(learner.vectors, axis=1, keepdims=True)
        self._units = learner.vectors / np.where(norms > 0, norms, 1.0)
        self._middles = learner.means.mean(axis=1)
        noise = np.random.default_rng(seed).normal(size=(width, controls))
        # A random direction gets the better of its two signs on train items, like a fitted one.
        sign = np.sign((learner.means[:, 1] - learner.means[:, 0]) @ noise)
        self._random = noise[None] * np.where(sign == 0, 1.0, sign)[:, None]
        self.scores, self.projections, self.cosines = np.empty((3, n, places))
        self.predicted = np.empty((n, places), np.int64)
        self.control_rows = [
            held_out_sample(one.start, one.stop, CONTROL_ITEMS) for one in self.sides
        ]
        chosen = np.concatenate(self.control_rows)
        self._slot = np.full(n, -1)  # row of each item among those of the controls
        self._slot[chosen] = np.arange(len(chosen))
        self.shuffled, self.random = np.empty((2, len(chosen), places, controls), np.float32)

    def add(self, rows: list[int], states: Floats) -> None:
        """Score states of held-out items `rows`, shape (rows, places, width)."""
        index = np.asarray(rows)
        for place, one in enumerate(self._learner.fitted):
            if is_regressor(one):
                self.scores[index, place] = one.predict(states[:, place])
                self.predicted[index, place] = self.scores[index, place] > 0.5
            else:
                self.scores[index, place] = one.decision_function(states[:, place])
                self.predicted[index, place] = one.predict(states[:, place])
        self.projections[index] = np.einsum("npw,pw->np", states, self._units)
        centred = states - self._middles
        lengths = np.maximum(np.linalg.norm(centred, axis=2), 1e-300)
        self.cosines[index] = np.einsum("npw,pw->np", centred, self._units) / lengths
        slots = self._slot[index]
        # Centred, because a large common part would drown the differences in float32.
        kept = centred[slots >= 0].transpose(1, 0, 2)
        slots = slots[slots >= 0]
        self.shuffled[slots] = (kept @ self._learner.null).transpose(1, 0, 2)
        self.random[slots] = (kept @ self._random).transpose(1, 0, 2)


def held_out_sample(begin: int, end: int, most: int) -> Ints:
    """At most `most` indices, evenly over a range, so that both classes of items are there."""
    return np.linspace(begin, end - 1, min(end - begin, most)).round().astype(np.int64)
