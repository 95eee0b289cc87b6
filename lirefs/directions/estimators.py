"""scikit-learn estimators of a direction in activation space."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.linalg import LinAlgError, solve
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.covariance import ledoit_wolf, shrunk_covariance
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import (
    _check_partial_fit_first_call,
    check_classification_targets,
    type_of_target,
)
from sklearn.utils.validation import check_is_fitted, validate_data

from lirefs.statistics.intervals import Floats, Ints


class _BinaryDirection(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A linear decision between two classes, by `coef_` and `intercept_`, and a `direction_`.

    It is as long as the gap between the class means along `coef_`, so that with every estimator,
    adding it once moves the mean of the first class to the level of the second.
    """

    def decision_function(self, X: npt.ArrayLike) -> Floats:
        """Linear score of each sample, larger for the second class, shape (n_samples,)."""
        check_is_fitted(self, "coef_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return np.asarray(X @ self.coef_[0] + self.intercept_[0])

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """The class on whose side of the boundary each sample lies, shape (n_samples,)."""
        side = (self.decision_function(X) > 0).astype(int)
        return np.asarray(self.classes_[side])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit to samples X, (n_samples, n_features), and their labels y, (n_samples,).

        Raises:
            ValueError: If y does not hold exactly two classes, or a setting cannot be used.
        """
        samples, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        if type_of_target(y) == "multiclass":
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass."
            )
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError("Classifier can't train when only one class is present.")
        self.means_ = np.stack([samples[index == k].mean(axis=0) for k in (0, 1)])
        self._learn(samples, index)
        return self

    def _learn(self, samples: Floats, index: Ints) -> None:
        """Set the fitted attributes from float64 samples and the class index, 0 or 1, of each."""
        raise NotImplementedError

    def _decide_halfway(self, vector: Floats) -> None:
        """Set the decision along `vector`, with the boundary halfway between the class means."""
        unit = unit_vector(vector)
        gap = float(unit @ (self.means_[1] - self.means_[0]))
        # The sign of a principal component is arbitrary: make it point to the second class.
        self.coef_ = (-unit if gap < 0 else unit)[None]
        self.direction_ = unit * gap
        self.intercept_ = -self.coef_ @ self.means_.mean(axis=0)


class MeanDifference(_BinaryDirection):
    """Difference of the class means, in float64 (Hong et al. 2025, section 3).

    The decision value of a sample is its projection on the unit direction, measured from the
    midpoint between the class means. `partial_fit` keeps one sum and one count per class, so any
    number of samples fits in memory.

    Attributes:
        classes_: The two labels, sorted; the direction points to the second.
        counts_: Samples seen of each class, shape (2,).
        sums_: Sum of the samples of each class, shape (2, n_features).
        means_: Class means, shape (2, n_features).
        direction_: As long as the gap between the class means along it, shape (n_features,); here
            the mean of the second class minus the mean of the first.
        coef_: Unit direction, shape (1, n_features); zero where `direction_` is zero.
        intercept_: Decision value of a sample of zeros, shape (1,).
    """

    def _learn(self, samples: Floats, index: Ints) -> None:
        self.counts_, self.sums_ = np.zeros(2, np.int64), np.zeros((2, samples.shape[1]))
        self._add(samples, index)

    def partial_fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None
    ) -> Self:
        """Add samples X, (n_samples, n_features), with their labels y, (n_samples,).

        The two `classes` are needed at the first call, because a batch may lack one; prediction
        needs samples of both.

        Raises:
            ValueError: If there are not two classes, or y holds another one.
        """
        first = _check_partial_fit_first_call(self, classes)
        samples, y = validate_data(self, X, y, dtype=np.float64, reset=first)
        if len(self.classes_) != 2:
            raise ValueError(f"MeanDifference takes two classes, got {len(self.classes_)}.")
        if first:
            self.counts_, self.sums_ = np.zeros(2, np.int64), np.zeros((2, samples.shape[1]))
        unknown = np.setdiff1d(y, self.classes_)
        if unknown.size:
            raise ValueError(f"y holds {unknown[0]!r}, which is not one of {self.classes_}.")
        self._add(samples, np.searchsorted(self.classes_, y))
        return self

    def _add(self, samples: Floats, index: Ints) -> None:
        for k in (0, 1):
            chosen = samples[index == k]
            self.counts_[k] += len(chosen)
            self.sums_[k] += chosen.sum(axis=0)
        if self.counts_.all():
            self.means_ = self.sums_ / self.counts_[:, None]
            self._decide_halfway(self.means_[1] - self.means_[0])
            self.direction_ = self.means_[1] - self.means_[0]


class WhitenedMeanDifference(_BinaryDirection):
    """Difference of the class means, whitened by the spread within the classes.

    The direction of linear discriminant analysis with equal priors: S^-1 (mean1 - mean0), with S
    the covariance within the classes, shrunk towards a multiple of the identity because there are
    often fewer samples than features. Attributes not listed are as in `MeanDifference`.

    Args:
        shrinkage: Between 0 (the empirical covariance) and 1 (its trace alone, which gives the
            mean difference); `"auto"` for the estimate of Ledoit and Wolf (2004).

    Attributes:
        shrinkage_: The shrinkage that was used.
    """

    def __init__(self, shrinkage: float | str = "auto") -> None:
        self.shrinkage = shrinkage

    def _learn(self, samples: Floats, index: Ints) -> None:
        within = samples - self.means_[index]
        if self.shrinkage == "auto":
            covariance, self.shrinkage_ = ledoit_wolf(within, assume_centered=True)
        elif isinstance(self.shrinkage, int | float) and 0 <= self.shrinkage <= 1:
            self.shrinkage_ = float(self.shrinkage)
            covariance = shrunk_covariance(within.T @ within / len(within), self.shrinkage_)
        else:
            raise ValueError(f"shrinkage must be 'auto' or in [0, 1], got {self.shrinkage!r}.")
        difference = self.means_[1] - self.means_[0]
        if not covariance.any():  # no spread at all: nothing to whiten with
            covariance = np.eye(len(difference))
        try:
            vector = solve(covariance, difference, assume_a="pos")
        except LinAlgError:  # singular, without shrinkage
            vector = np.linalg.lstsq(covariance, difference)[0]
        self._decide_halfway(vector)


class LogisticDirection(_BinaryDirection):
    """Logistic regression on standardized features, transformed back to the samples' space.

    Residual streams have a few features a hundred times larger than the rest; without
    standardization only the others would be penalized, and the solver would converge slowly.
    Attributes not listed are as in `MeanDifference`.

    Args:
        C: Inverse of the penalty, as in scikit-learn.
        max_iter: Largest number of solver iterations.

    Attributes:
        coef_: Coefficients of the log-odds, shape (1, n_features).
        intercept_: Log-odds of a sample of zeros, shape (1,).
    """

    def __init__(self, C: float = 1.0, max_iter: int = 1000) -> None:
        self.C = C
        self.max_iter = max_iter

    def _learn(self, samples: Floats, index: Ints) -> None:
        model = LogisticRegression(C=self.C, max_iter=self.max_iter)
        self.coef_, self.intercept_ = _fit_standardized(model, samples, index)
        self.n_iter_ = model.n_iter_
        unit = unit_vector(self.coef_[0])
        self.direction_ = unit * float(unit @ (self.means_[1] - self.means_[0]))


class PCADirection(_BinaryDirection):
    """First principal component of paired differences (Zou et al. 2023, section 3.1).

    The k-th sample of one class is paired with the k-th of the other, in the order given; samples
    without a partner are left out. The differences are taken with both signs, so that the
    component also explains their mean. Attributes not listed are as in `MeanDifference`.

    Attributes:
        explained_: Share of the squared differences that lies along the direction.
    """

    def _learn(self, samples: Floats, index: Ints) -> None:
        first, second = (samples[index == k] for k in (0, 1))
        pairs = min(len(first), len(second))
        # The principal components of the differences and their negatives, whose mean is zero.
        _, singular, components = np.linalg.svd(second[:pairs] - first[:pairs], full_matrices=False)
        total = float((singular**2).sum())
        self.explained_ = float(singular[0] ** 2) / total if total > 0 else 0.0
        self._decide_halfway(components[0] if total > 0 else np.zeros(samples.shape[1]))


class RidgeDirection(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression of a graded score on standardized features.

    For items that are neither pure reasoning nor pure memory: the score, usually in [0, 1], is
    the share of reasoning. The direction's length is the change along it from score 0 to 1.

    Args:
        alpha: Penalty, as in scikit-learn.

    Attributes:
        direction_: Shape (n_features,).
        coef_: Change of the score per unit of each feature, shape (n_features,).
        intercept_: The score predicted at zero.
    """

    def __init__(self, alpha: float = 100.0) -> None:
        self.alpha = alpha

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit to samples X, (n_samples, n_features), and their scores y, (n_samples,)."""
        samples, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        scores = np.asarray(y, np.float64)
        self.coef_, intercept = _fit_standardized(Ridge(alpha=self.alpha), samples, scores)
        self.intercept_ = float(intercept)
        self.direction_ = scaled_to_scores(self.coef_, samples, scores)
        return self

    def predict(self, X: npt.ArrayLike) -> Floats:
        """The predicted score of each sample, float64, shape (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return np.asarray(X @ self.coef_ + self.intercept_)


def scaled_to_scores(vector: Floats, samples: Floats, scores: Floats) -> Floats:
    """The vector, scaled to the change of samples along it from score 0 to score 1.

    That is the slope of their projections on the scores; zero where all scores are equal. For
    labels 0 and 1 it spans the class means.
    """
    unit = unit_vector(vector)
    centred = scores - scores.mean()
    spread = float(centred @ centred)
    return unit * (float((samples @ unit) @ centred) / spread if spread > 0 else 0.0)


def unit_vector(vector: Floats) -> Floats:
    """The vector at length 1; zero where it is zero."""
    norm = float(np.linalg.norm(vector))
    return vector / norm if norm > 0 else vector


def _fit_standardized(model: Any, samples: Floats, targets: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Fit on standardized features; coefficients and intercept in the units of the samples."""
    scaler = StandardScaler().fit(samples)
    model.fit(scaler.transform(samples), targets)
    coefficients = model.coef_ / scaler.scale_
    return coefficients, model.intercept_ - coefficients @ scaler.mean_
