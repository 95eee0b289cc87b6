"""Fit directions over layers on train items, choose one on validation items, report on test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from lirefs.capture import capture
from lirefs.directions import Direction, Directions
from lirefs.errors import CaptureError
from lirefs.estimators import MeanDifference
from lirefs.models import LanguageModel
from lirefs.questions import LABELS, Questions, Split
from lirefs.statistics import Estimate, auroc, interval, wilson
from lirefs.version import __version__

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerScores:
    """How well one layer's direction separates reasoning from memory questions.

    Attributes:
        layer: Decoder block.
        validation_auroc: On the items that choose the layer.
        test_auroc: On items that chose nothing.
        test_accuracy: Share of test items on the right side of the midpoint.
        cosines: Mean cosine of the test states, measured from the middle of the train class
            means, with the direction: memory items, reasoning items.
    """

    layer: int
    validation_auroc: Estimate
    test_auroc: Estimate
    test_accuracy: Estimate
    cosines: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Probe:
    """Directions of every layer, with their scores and controls.

    Attributes:
        directions: One direction per layer.
        scores: One entry per layer, in layer order.
        best_layer: The layer with the highest validation AUROC.
        shuffled: Test AUROC of the best layer when all labels are shuffled and everything,
            the choice of the layer included, is done again: mean and 95 % range over shuffles.
        bag_of_words: Test AUROC of TF-IDF and logistic regression on the question text alone.
    """

    directions: Directions
    scores: tuple[LayerScores, ...]
    best_layer: int
    shuffled: Estimate
    bag_of_words: Estimate

    @property
    def best(self) -> Direction:
        """The direction of the best layer."""
        return self.directions[self.best_layer]

    @property
    def best_scores(self) -> LayerScores:
        """The scores of the best layer."""
        return next(one for one in self.scores if one.layer == self.best_layer)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "best_layer": self.best_layer,
            "shuffled_auroc": self.shuffled.to_dict(),
            "bag_of_words_auroc": self.bag_of_words.to_dict(),
            "provenance": self.directions.provenance,
            "layers": [
                {
                    "layer": one.layer,
                    "validation_auroc": one.validation_auroc.to_dict(),
                    "test_auroc": one.test_auroc.to_dict(),
                    "test_accuracy": one.test_accuracy.to_dict(),
                    "cosine_memory": one.cosines[0],
                    "cosine_reasoning": one.cosines[1],
                    "norm": self.directions[one.layer].norm,
                }
                for one in self.scores
            ],
        }


def fit(
    lm: LanguageModel,
    split: Split,
    estimator: Any = None,
    *,
    layers: list[int] | None = None,
    site: str = "resid_pre",
    shuffles: int = 100,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Probe:
    """Fit a direction at every layer and choose the best layer (Hong et al. 2025, section 3).

    Args:
        lm: The model.
        split: Train items fit the directions, validation items choose the layer, test items are
            reported. States are read at the last prompt token.
        estimator: A scikit-learn classifier with `coef_` (and `direction_`, when the direction
            has a length of its own); None for `MeanDifference()`.
        layers: Layers to fit; None for all.
        site: Where in the block.
        shuffles: Repetitions of the shuffled-label control.
        seed: Seed of the shuffles.
        cache: Folder that keeps the activations (see `capture`).
        progress: Show progress bars.

    Raises:
        CaptureError: If activations cannot be read, or no layer separates train items at all.
    """
    estimator = MeanDifference() if estimator is None else estimator
    prompts = [prompt for side in split.sides.values() for prompt in side.prompts]
    states = capture(lm, prompts, layers=layers, sites=[site], cache=cache, progress=progress)
    labels = np.array([label for side in split.sides.values() for label in side.labels])
    first = len(split.train)
    second = first + len(split.validation)
    values = states.values[:, :, 0].double().numpy()
    sides = [slice(0, first), slice(first, second), slice(second, len(labels))]

    fitted = [
        clone(estimator).fit(values[sides[0], place], labels[sides[0]])
        for place in range(len(states.places))
    ]
    directions = {
        place: _direction(one, values[sides[0], index], labels[sides[0]], *place)
        for index, (place, one) in enumerate(zip(states.places, fitted, strict=True))
    }
    scores = tuple(
        _scores(layer, one, directions[layer, site], values[:, index], labels, sides)
        for index, ((layer, _), one) in enumerate(zip(states.places, fitted, strict=True))
    )
    separating = [one for one in scores if directions[one.layer, site].norm > 0]
    if not separating:
        raise CaptureError("no layer separates the classes: all its states are equal")
    best = max(separating, key=lambda one: one.validation_auroc.value)
    provenance = {
        "lirefs": __version__,
        "model": lm.fingerprint,
        "model_name": lm.name,
        "tokenizer": lm.tokenizer_fingerprint,
        "questions": {name: _digest(side) for name, side in split.sides.items()},
        "source": split.train.source,
        "estimator": repr(estimator),
        "position": -1,
    }
    return Probe(
        directions=Directions(directions, provenance),
        scores=scores,
        best_layer=best.layer,
        shuffled=_shuffled(estimator, values, labels, sides, shuffles, seed, progress),
        bag_of_words=bag_of_words(split),
    )


def bag_of_words(split: Split) -> Estimate:
    """Test AUROC of a classifier that reads words only: what vocabulary alone gives away."""
    model = make_pipeline(TfidfVectorizer(min_df=1), LogisticRegression(max_iter=1000))
    model.fit([item.text for item in split.train], split.train.labels)
    scores = model.decision_function([item.text for item in split.test])
    return auroc(scores, np.array(split.test.labels))


def _direction(estimator: Any, states: Floats, labels: Ints, layer: int, site: str) -> Direction:
    vector = np.asarray(getattr(estimator, "direction_", estimator.coef_), np.float64).reshape(-1)
    unit = vector / max(float(np.linalg.norm(vector)), 1e-300)
    projections = [states[labels == label] @ unit for label in (0, 1)]
    return Direction(
        vector=torch.from_numpy(vector).float(),
        layer=layer,
        site=site,
        means=(float(projections[0].mean()), float(projections[1].mean())),
        spread=(float(projections[0].std()), float(projections[1].std())),
        counts=(len(projections[0]), len(projections[1])),
    )


def _scores(
    layer: int,
    estimator: Any,
    direction: Direction,
    states: Floats,
    labels: Ints,
    sides: list[slice],
) -> LayerScores:
    train, validation, test = sides
    right = int((estimator.predict(states[test]) == labels[test]).sum())
    # All states of a layer share a large component; only what differs from the middle of the
    # classes says on which side a question lies.
    middle = np.mean(
        [states[train][labels[train] == label].mean(axis=0) for label in (0, 1)], axis=0
    )
    centred = states[test] - middle
    norms = np.maximum(np.linalg.norm(centred, axis=1), 1e-300)
    cosines = centred @ direction.unit.double().numpy() / norms
    return LayerScores(
        layer=layer,
        validation_auroc=auroc(estimator.decision_function(states[validation]), labels[validation]),
        test_auroc=auroc(estimator.decision_function(states[test]), labels[test]),
        test_accuracy=wilson(right, len(labels[test])),
        cosines=(
            float(cosines[labels[test] == 0].mean()),
            float(cosines[labels[test] == 1].mean()),
        ),
    )


def _shuffled(
    estimator: Any,
    values: Floats,
    labels: Ints,
    sides: list[slice],
    shuffles: int,
    seed: int,
    progress: bool,
) -> Estimate:
    train, validation, test = sides
    generator = np.random.default_rng(seed)
    areas = np.empty(shuffles)
    for repetition in tqdm(range(shuffles), desc="shuffled labels", disable=not progress):
        wrong = labels.copy()
        for side in sides:  # within a side, so that both classes stay on it
            wrong[side] = generator.permutation(labels[side])
        chosen = (-1.0, 0.5)
        for place in range(values.shape[1]):
            model = clone(estimator).fit(values[train, place], wrong[train])
            score = roc_auc_score(
                wrong[validation], model.decision_function(values[validation, place])
            )
            if score > chosen[0]:
                final = roc_auc_score(wrong[test], model.decision_function(values[test, place]))
                chosen = (float(score), float(final))
        areas[repetition] = chosen[1]
    return Estimate(float(areas.mean()), *interval(areas), n=values[test].shape[0])


def _digest(side: Questions) -> str:
    text = "\n".join(f"{LABELS.index(item.label)} {item.key}" for item in side)
    return hashlib.sha256(text.encode()).hexdigest()
