"""Fit directions over layers on train items, choose one on validation items, report on test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lirefs.directions.capture import capture, stream_states
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import MeanDifference
from lirefs.directions.fitting import direction_of_learner, learner_for
from lirefs.directions.held_out import HeldOut
from lirefs.directions.plots import draw_separation
from lirefs.directions.prompts import prompts_of, token_text
from lirefs.errors import (
    CaptureError,
    NonFiniteStateError,
    QuestionsError,
    SettingError,
    checked_seed,
    got,
    must_be,
    whole_number,
)
from lirefs.files import html_table, sha256_of
from lirefs.model.batching import check_length
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import layer_indices
from lirefs.questions import Question, Questions, Split
from lirefs.statistics.intervals import (
    Estimate,
    Floats,
    Ints,
    auroc,
    correlation,
    interval,
    roc_areas,
    wilson,
)
from lirefs.version import __version__

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure as Canvas

_ROWS = 1024
"""Prompts tokenized at a time, so that memory does not grow with them."""
_TOKENS = 5
"""How many of the tokens that are read the provenance names, the most common ones."""


@dataclass(frozen=True)
class LayerScores:
    """How well the direction of one layer separates the two classes of questions.

    Attributes:
        layer: Decoder block.
        validation_auroc: On the items that choose the layer.
        test_auroc: On items that chose nothing.
        test_accuracy: Share of test items on the right side of the midpoint.
        cosines: Mean cosine with the direction of test states of the second label (memory) and of
            the first (reasoning), measured from the middle of the train class means.
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
        bag_of_words: Test AUROC of TF-IDF and logistic regression on the question text alone.
        null: The test AUROC of each of these shuffles.
    """

    directions: Directions
    scores: tuple[LayerScores, ...]
    best_layer: int
    shuffled: Estimate
    bag_of_words: Estimate
    null: tuple[float, ...] = ()

    def __repr__(self) -> str:
        test, n = self.best_scores.test_auroc, len(self.scores)
        layers = f"{n} layer{'s' * (n != 1)}, best layer {self.best_layer}"
        return f"Probe({layers}, test AUROC {test}, n={test.n})"

    def _repr_html_(self) -> str:
        shown = ["layer", "validation_auroc", "test_auroc", "test_accuracy", "random_auroc", "norm"]
        return html_table(repr(self), self.to_dataframe()[shown].to_dict("records"))

    @property
    def names(self) -> tuple[str, str]:
        """The two labels of the questions, first the one that the directions point to."""
        return self.directions.names

    @property
    def p_value(self) -> float:
        """Share of shuffles, each at the layer that it chooses, that reach the test AUROC."""
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
        """As a JSON object; an interval is an object of value, low, high and n."""
        layers = []
        first, second = self.names
        for one in self.scores:
            row: dict[str, Any] = {}
            for name, value in asdict(one).items():
                if name == "cosines":
                    row[f"cosine_{second}"], row[f"cosine_{first}"] = value
                else:
                    row[name] = value
            layers.append({**row, "norm": self.directions[one.layer].norm})
        return {
            "best_layer": self.best_layer,
            "shuffled_auroc": self.shuffled.to_dict(),
            "p_value": self.p_value,
            "bag_of_words_auroc": self.bag_of_words.to_dict(),
            "provenance": self.directions.provenance,
            "layers": layers,
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each layer: the scores of `LayerScores`, and more.

        The others are the norm of the direction, the number `n` of test questions, and whether the
        layer is the `best`. An estimate has three columns: its value under its name, `_low` and
        `_high`.
        """
        import pandas

        rows = []
        for one in self.to_dict()["layers"]:
            row: dict[str, Any] = {}
            for name, value in one.items():
                if isinstance(value, dict):
                    row[name] = value["value"]
                    row |= {f"{name}_{end}": value[end] for end in ("low", "high")}
                else:
                    row[name] = value
            rows.append(
                {**row, "n": one["test_auroc"]["n"], "best": one["layer"] == self.best_layer}
            )
        return pandas.DataFrame(rows)

    def plot(self) -> Canvas:
        """AUROC of every layer with its controls, and cosines of both classes with the direction.

        Returns:
            A matplotlib figure to show, restyle or save; pyplot does not know of it.
        """
        return draw_separation(
            layers=[one.layer for one in self.scores],
            test=[one.test_auroc for one in self.scores],
            validation=[one.validation_auroc.value for one in self.scores],
            along=[one.cosines for one in self.scores],
            best_layer=self.best_layer,
            shuffled=self.shuffled,
            words=self.bag_of_words.value,
            names=self.names,
        )


def fit(
    lm: LanguageModel,
    split: Split | Questions,
    estimator: Any = None,
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_pre",
    grades: Mapping[str, float] | None = None,
    shuffles: int = 100,
    seed: int = 0,
    cache: str | Path | None = None,
    any_model: bool = False,
    progress: bool = True,
) -> Probe:
    """Fit a direction at every layer and choose the best layer (Hong et al. 2025, section 3).

    With `MeanDifference` and without `cache`, states are streamed and only sums are kept, so any
    number of questions fits in memory. Other estimators need the train states themselves.

    Args:
        lm: The model.
        split: Train items fit the directions, validation items choose the layer, test items are
            reported. Questions are split first, by `split()`. States are read at the last prompt
            token, which `provenance["tokens_read"]` names.
        estimator: A scikit-learn linear model, or a search over one; None for `MeanDifference()`.
            A regressor is fitted on the grades, a classifier on the labels. Unless it has a
            `direction_`, its direction is as long as the gap between the classes.
        layers: Layers to fit; None for all.
        site: Where in the block; always the raw states, never after the final norm.
        grades: How much of the first label each question has (how much reasoning it needs), in
            [0, 1], by question id; None for the scores of the questions, or else their labels.
        shuffles: Number of label shuffles and of random directions for the controls, at least 1.
        seed: Seed of the controls.
        cache: Folder that keeps the activations (see `capture`).
        any_model: Also fit on a model without a fingerprint, such as one with offloaded weights.
            Its directions do not say on which model they were fitted, and steer any.
        progress: Show progress bars.

    Raises:
        CaptureError: If activations cannot be read, or no layer separates train items at all.
        NonFiniteStateError: If a hidden state is not finite; the message names the question.
        QuestionsError: If a question has no grade, or one outside [0, 1].
        SettingError: If the estimator is not a linear model or gives a vector that is not finite,
            `shuffles` is below 1, or `layers` are not integers.
        ProvenanceError: If the model has no fingerprint (`any_model` fits it all the same), or a
            cache is given and the model has no identity (see `capture`).

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> questions = lirefs.load_questions("organism")
        >>> probe = lirefs.fit(lm, questions, layers=[2, 3], progress=False)
        >>> print(f"layer {probe.best_layer}: {probe.best_scores.test_auroc:.2f}")
        layer 3: 0.99 [0.98, 1.00]
    """
    must_be(lm, LanguageModel, "lm")
    must_be(split, (Split, Questions), "split")
    must_be(grades, (Mapping, type(None)), "grades")
    shuffles, seed = whole_number(shuffles, "shuffles", least=1), checked_seed(seed)
    if estimator is not None and not hasattr(estimator, "fit"):
        raise SettingError(f"estimator must be a scikit-learn model, got {got(estimator)}")
    split = split.split() if isinstance(split, Questions) else split
    layers = list(range(lm.n_layers)) if layers is None else layer_indices(layers)
    made_on = lm.provenance
    if not any_model:
        made_on["model"] = lm.fingerprint
    estimator = MeanDifference() if estimator is None else estimator
    items = [item for side in split.sides.values() for item in side]
    labels = np.array([label for side in split.sides.values() for label in side.labels])
    targets = _targets(items, labels, grades)
    first = len(split.train)
    prompts = prompts_of(lm, items)
    tokens_read: Counter[int] = Counter()
    for start in range(0, len(items), _ROWS):  # of all sides, before the first one is read
        part = slice(start, start + _ROWS)
        for item, ids in zip(items[part], lm.encode(prompts[part]), strict=True):
            check_length(lm.model, len(ids), f"question {item.id!r}", CaptureError)
            tokens_read.update(ids[-1:])
    settings: dict[str, Any] = {"layers": layers, "sites": [site], "progress": progress}
    states = None
    if cache is not None:
        try:
            states = capture(lm, prompts, cache=cache, **settings).values[:, :, 0]
        except NonFiniteStateError as error:
            raise error.named(items[error.prompt].id) from None

    def batches(begin: int, end: int) -> Iterator[tuple[list[int], Floats]]:
        if states is not None:
            yield list(range(end - begin)), states[begin:end].double().numpy()
            return
        try:
            for rows, values in stream_states(lm, prompts[begin:end], **settings):
                yield rows, values.double().numpy()
        except NonFiniteStateError as error:
            raise error.named(items[begin + error.prompt].id) from None

    generator = np.random.default_rng(seed)
    orders = np.array([generator.permutation(first) for _ in range(shuffles)])
    learner = learner_for(estimator, labels[:first], targets[:first], orders, progress)
    for rows, values in batches(0, first):
        learner.add(rows, values)
    learner.finish()
    held_out = HeldOut(learner, labels[first:], len(split.validation), seed)
    for rows, values in batches(first, len(items)):
        held_out.add(rows, values)

    validation, _ = held_out.sides
    directions = {}
    for i, layer in enumerate(layers):
        # The spread within a class is measured on validation items: on train items, of which
        # there are fewer than dimensions, it would come out too small.
        along, truth = held_out.projections[validation, i], held_out.labels[validation]
        directions[layer, site] = direction_of_learner(learner, i, (layer, site), along, truth)
    scores, null = _scores(held_out, layers, targets[first:], generator)
    separating = [one for one in scores if directions[one.layer, site].norm > 0]
    if not separating:
        raise CaptureError("no layer separates the classes: all its states are equal")
    best = max(separating, key=lambda one: one.validation_auroc.value)
    provenance = {
        "lirefs": __version__,
        **made_on,
        "questions": {name: _digest(side) for name, side in split.sides.items()},
        "source": split.train.source,
        "labels": list(split.train.names),
        "estimator": repr(estimator),
        "position": -1,
        "tokens_read": {token_text(lm, one): n for one, n in tokens_read.most_common(_TOKENS)},
        "best_layer": best.layer,
    }
    found = Directions(directions, provenance)
    shuffled, words = _range(null, best.shuffled_auroc.n), bag_of_words(split)
    return Probe(found, scores, best.layer, shuffled, words, null=tuple(map(float, null)))


def bag_of_words(split: Split) -> Estimate:
    """Test AUROC of a classifier that sees only words: what the vocabulary alone gives away."""
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    model.fit([item.text for item in split.train], split.train.labels)
    scores = model.decision_function([item.text for item in split.test])
    return auroc(scores, np.array(split.test.labels))


def _targets(items: list[Question], labels: Ints, grades: Mapping[str, float] | None) -> Floats:
    """What regressors are fitted on and scores are correlated with: grades, else the labels."""
    found = [one.score if grades is None else grades.get(one.id) for one in items]
    missing = [one.id for one, grade in zip(items, found, strict=True) if grade is None]
    if grades is None and len(missing) == len(items):
        return labels.astype(np.float64)
    if missing:
        raise QuestionsError(f"{len(missing)} question(s) have no grade, first {missing[0]!r}")
    values = np.array(found, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        low, high = values.min(), values.max()
        raise QuestionsError(f"grades must be from 0 to 1, found {low:g} to {high:g}")
    return values


def _scores(
    held_out: HeldOut, layers: list[int], targets: Floats, generator: np.random.Generator
) -> tuple[tuple[LayerScores, ...], Floats]:
    """Scores of every layer, and the test AUROC of each shuffle at the layer that it chooses."""
    labels, (validation, test) = held_out.labels, held_out.sides
    rows = held_out.control_rows[1]
    random = roc_areas(held_out.random[-len(rows) :], labels[rows])
    null = []  # AUROC on validation and on test items, their labels shuffled too
    sides = np.split(held_out.shuffled, [len(held_out.control_rows[0])])
    for chosen, scores in zip(held_out.control_rows, sides, strict=True):
        orders = [generator.permutation(labels[chosen]) for _ in range(scores.shape[2])]
        null.append(roc_areas(scores, np.stack(orders, axis=1)[:, None]))
    on_validation, on_test = null  # (places, shuffles) each
    found = []
    for i, layer in enumerate(layers):
        scores, truth, cosines = held_out.scores[:, i], labels[test], held_out.cosines[test, i]
        right = held_out.predicted[test, i] == truth
        found.append(
            LayerScores(
                layer=layer,
                validation_auroc=auroc(scores[validation], labels[validation]),
                test_auroc=auroc(scores[test], truth),
                test_accuracy=wilson(int(right.sum()), len(truth)),
                cosines=(float(cosines[truth == 0].mean()), float(cosines[truth == 1].mean())),
                spearman=correlation(scores[test], targets[test], ranks=True),
                pearson=correlation(scores[test], targets[test]),
                shuffled_auroc=_range(on_test[i], len(rows)),
                random_auroc=_range(random[i], len(rows)),
            )
        )
    # Each shuffle chooses its own layer, as the fit did: the selection effect is in the null.
    return tuple(found), on_test[on_validation.argmax(axis=0), np.arange(on_test.shape[1])]


def _range(values: Floats, n: int) -> Estimate:
    """Mean and 95 % range of a control's values."""
    return Estimate(float(values.mean()), *interval(values), n=n)


def _digest(side: Questions) -> str:
    text = "\n".join(f"{n} {one.key}" for n, one in zip(side.labels, side, strict=True))
    return sha256_of(text.encode())
