"""Fit directions over layers on train items, choose one on validation items, report on test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lirefs.directions.capture import capture, stream
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import MeanDifference
from lirefs.directions.fitting import Learner, direction_of, learner_for
from lirefs.directions.held_out import HeldOut
from lirefs.errors import CaptureError, NonFiniteStateError, QuestionsError, SettingError
from lirefs.files import read_jsonl
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import indices
from lirefs.questions import LABELS, Questions, Split
from lirefs.statistics.intervals import (
    Estimate,
    Floats,
    Ints,
    areas,
    auroc,
    correlation,
    interval,
    wilson,
)
from lirefs.version import __version__


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
        spearman: Rank correlation of test scores with the grades (the labels, without grades).
        pearson: Their linear correlation.
        shuffled_auroc: Test AUROC of this layer with shuffled labels: mean and 95 % range.
        random_auroc: Test AUROC of random directions at this layer: mean and 95 % range.
    """

    layer: int
    validation_auroc: Estimate
    test_auroc: Estimate
    test_accuracy: Estimate
    cosines: tuple[float, float]
    spearman: Estimate
    pearson: Estimate
    shuffled_auroc: Estimate
    random_auroc: Estimate


@dataclass(frozen=True, eq=False)
class Probe:
    """Directions of every layer, with their scores and controls.

    Attributes:
        directions: One direction per layer.
        scores: One entry per layer, in layer order.
        best_layer: The layer with the highest validation AUROC.
        shuffled: Test AUROC of the best layer when all labels are shuffled and everything,
            the choice of the layer included, is done again: mean and 95 % range over shuffles.
        null: The test AUROC of each of these shuffles: the distribution of the best layer.
        bag_of_words: Test AUROC of TF-IDF and logistic regression on the question text alone.
    """

    directions: Directions
    scores: tuple[LayerScores, ...]
    best_layer: int
    shuffled: Estimate
    bag_of_words: Estimate
    null: tuple[float, ...] = ()

    @property
    def p_value(self) -> float:
        """Share of shuffles, each with a layer of its own choice, that reach the test AUROC."""
        reached = sum(one >= self.best_scores.test_auroc.value for one in self.null)
        return (1 + reached) / (1 + len(self.null))

    @property
    def best(self) -> Direction:
        """The direction of the best layer."""
        return self.directions[self.best_layer]

    @property
    def best_scores(self) -> LayerScores:
        """The scores of the best layer."""
        return next(one for one in self.scores if one.layer == self.best_layer)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object.

        Returns:
            JSON values; an interval is an object of value, low, high and n.
        """
        return {
            "best_layer": self.best_layer,
            "shuffled_auroc": self.shuffled.to_dict(),
            "p_value": self.p_value,
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
                    "spearman": one.spearman.to_dict(),
                    "pearson": one.pearson.to_dict(),
                    "shuffled_auroc": one.shuffled_auroc.to_dict(),
                    "random_auroc": one.random_auroc.to_dict(),
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
    layers: Sequence[int] | None = None,
    site: str = "resid_pre",
    grades: Mapping[str, float] | None = None,
    shuffles: int = 100,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> Probe:
    """Fit a direction at every layer and choose the best layer (Hong et al. 2025, section 3).

    With `MeanDifference` and without `cache`, states are streamed and only sums are kept, so any
    number of questions fits in memory. Other estimators need the train states themselves.

    Args:
        lm: The model.
        split: Train items fit the directions, validation items choose the layer, test items are
            reported. States are read at the last prompt token.
        estimator: A scikit-learn linear model, or a search over one; None for `MeanDifference()`.
            A regressor is fitted on the grades, a classifier on the labels. Without a
            `direction_` of its own, its direction is as long as the gap between the classes.
        layers: Layers to fit; None for all.
        site: Where in the block; always the raw states, never after the final norm.
        grades: Score in [0, 1] by question id, how much reasoning a question needs; None for
            the labels.
        shuffles: Repetitions of the shuffled-label control, and number of random directions; at
            least 1.
        seed: Seed of the controls.
        cache: Folder that keeps the activations (see `capture`).
        progress: Show progress bars.

    Returns:
        Directions, scores and controls of every layer.

    Raises:
        CaptureError: If activations cannot be read, or no layer separates train items at all.
        NonFiniteStateError: If a hidden state is not finite; the message names the question.
        QuestionsError: If a question has no grade, or one outside [0, 1].
        SettingError: If the estimator is not a linear model or gives a vector that is not finite,
            `shuffles` is below 1, or `layers` are no indices.
    """
    if shuffles < 1:
        raise SettingError(f"shuffles={shuffles}: the controls need at least one")
    layers = list(range(lm.n_layers)) if layers is None else indices(layers)
    estimator = MeanDifference() if estimator is None else estimator
    items = [item for side in split.sides.values() for item in side]
    labels = np.array([label for side in split.sides.values() for label in side.labels])
    targets = _grades(items, grades, labels)
    first, second = len(split.train), len(split.train) + len(split.validation)
    prompts = [item.prompt for item in items]
    places = [(layer, site) for layer in layers]
    states = None
    if cache is not None:
        try:
            held = capture(lm, prompts, layers=layers, sites=[site], cache=cache, progress=progress)
        except NonFiniteStateError as error:
            raise error.named(items[error.prompt].id) from None
        states = held.values[:, :, 0]

    def batches(begin: int, end: int) -> Iterator[tuple[list[int], Floats]]:
        if states is not None:
            yield list(range(end - begin)), states[begin:end].double().numpy()
            return
        settings: dict[str, Any] = {"layers": layers, "sites": [site], "progress": progress}
        try:
            for rows, values in stream(lm, prompts[begin:end], **settings):
                yield rows, values.double().numpy()
        except NonFiniteStateError as error:
            raise error.named(items[begin + error.prompt].id) from None

    generator = np.random.default_rng(seed)
    orders = np.array([generator.permutation(first) for _ in range(shuffles)])
    learner = learner_for(estimator, labels[:first], targets[:first], orders, progress=progress)
    for rows, values in batches(0, first):
        learner.add(rows, values)
    learner.finish()
    sides = [slice(0, second - first), slice(second - first, len(items) - first)]
    readings = HeldOut(learner, labels[first:], sides, shuffles, seed)
    for rows, values in batches(first, len(items)):
        readings.add(rows, values)

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
    return _report(learner, readings, places, targets[first:], generator, provenance, split)


def load_grades(path: str | Path) -> dict[str, float] | None:
    """The `score` of each question in a JSON Lines file, by question id; None if no row has one.

    Raises:
        QuestionsError: If some rows have a score and others have none, or it is no number.
    """
    rows = read_jsonl(path, error=QuestionsError)
    if not any("score" in row for _, row in rows):
        return None
    for line, row in rows:
        score: Any = row.get("score")
        if type(score) not in (int, float) or not math.isfinite(score):
            raise QuestionsError(f"{path}, line {line}: 'score' is not a finite number")
    return {str(row.get("id") or f"line-{line}"): float(row["score"]) for line, row in rows}


def bag_of_words(split: Split) -> Estimate:
    """Test AUROC of a classifier that reads words only: what vocabulary alone gives away."""
    model = make_pipeline(TfidfVectorizer(min_df=1), LogisticRegression(max_iter=1000))
    model.fit([item.text for item in split.train], split.train.labels)
    scores = model.decision_function([item.text for item in split.test])
    return auroc(scores, np.array(split.test.labels))


def _grades(items: list[Any], grades: Mapping[str, float] | None, labels: Ints) -> Floats:
    if grades is None:
        return labels.astype(np.float64)
    missing = [item.id for item in items if item.id not in grades]
    if missing:
        raise QuestionsError(f"{len(missing)} question(s) have no grade, first {missing[0]!r}")
    values = np.array([grades[item.id] for item in items], np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise QuestionsError(f"grades go from 0 to 1, found {values.min():g} to {values.max():g}")
    return values


def _report(
    learner: Learner,
    readings: HeldOut,
    places: list[tuple[int, str]],
    targets: Floats,
    generator: np.random.Generator,
    provenance: dict[str, Any],
    split: Split,
) -> Probe:
    labels = readings.labels
    validation, test = readings.sides
    directions = {
        # The spread within a class is measured on validation items: on train items, of which
        # there are fewer than dimensions, it would come out too small.
        where: direction_of(
            learner, place, where, readings.projections[validation, place], labels[validation]
        )
        for place, where in enumerate(places)
    }
    shuffled = _shuffled_areas(readings, generator)
    rows = readings.control_rows[1]
    random = areas(readings.random[-len(rows) :], labels[rows])
    scores = tuple(
        LayerScores(
            layer=layer,
            validation_auroc=auroc(readings.scores[validation, place], labels[validation]),
            test_auroc=auroc(readings.scores[test, place], labels[test]),
            test_accuracy=wilson(
                int((readings.predicted[test, place] == labels[test]).sum()), len(labels[test])
            ),
            cosines=_class_means(readings.cosines[test, place], labels[test]),
            spearman=correlation(readings.scores[test, place], targets[test], ranks=True),
            pearson=correlation(readings.scores[test, place], targets[test]),
            shuffled_auroc=_range(shuffled[1][place], len(rows)),
            random_auroc=_range(random[place], len(rows)),
        )
        for place, (layer, _) in enumerate(places)
    )
    separating = [one for one in scores if directions[one.layer, places[0][1]].norm > 0]
    if not separating:
        raise CaptureError("no layer separates the classes: all its states are equal")
    best = max(separating, key=lambda one: one.validation_auroc.value)
    # Each shuffle chooses its own layer, as the fit did: the selection effect is in the null.
    chosen = shuffled[0].argmax(axis=0)
    null = shuffled[1][chosen, np.arange(len(chosen))]
    return Probe(
        directions=Directions(directions, {**provenance, "best_layer": best.layer}),
        scores=scores,
        best_layer=best.layer,
        shuffled=_range(null, len(rows)),
        bag_of_words=bag_of_words(split),
        null=tuple(map(float, null)),
    )


def _shuffled_areas(readings: HeldOut, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Validation and test AUROC of each shuffle, (places, shuffles); held-out labels too."""
    shuffles = readings.shuffled.shape[2]
    found, begin = [], 0
    for rows in readings.control_rows:
        scores = readings.shuffled[begin : begin + len(rows)]
        begin += len(rows)
        wrong = np.stack(
            [generator.permutation(readings.labels[rows]) for _ in range(shuffles)], axis=1
        )
        found.append(areas(scores, wrong[:, None]))
    return found[0], found[1]


def _class_means(values: Floats, labels: Ints) -> tuple[float, float]:
    return float(values[labels == 0].mean()), float(values[labels == 1].mean())


def _range(values: Floats, n: int) -> Estimate:
    return Estimate(float(values.mean()), *interval(values), n=n)


def _digest(side: Questions) -> str:
    text = "\n".join(f"{LABELS.index(item.label)} {item.key}" for item in side)
    return hashlib.sha256(text.encode()).hexdigest()
