"""scikit-learn estimators of a direction in activation space."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data


class MeanDifference(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Difference of the class means, in float64 (Hong et al. 2025, section 3).

    The decision value of a sample is its projection on the unit direction, measured from the
    midpoint between the class means.

    Attributes:
        classes_: The two labels, sorted; the direction points to the second.
        direction_: Mean of the second class minus mean of the first, shape (n_features,).
        means_: Class means, shape (2, n_features).
        coef_: Unit direction, shape (1, n_features); zero if the means coincide.
        intercept_: Shape (1,).
    """

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> MeanDifference:
        """Fit the direction.

        Args:
            X: Samples, shape (n_samples, n_features).
            y: Labels, shape (n_samples,), two values.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If y does not hold exactly two classes.
        """
        samples: npt.NDArray[np.float64]
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
        self.direction_ = self.means_[1] - self.means_[0]
        norm = np.linalg.norm(self.direction_)
        self.coef_ = (self.direction_ / norm if norm > 0 else self.direction_)[None]
        self.intercept_ = -self.coef_ @ self.means_.mean(axis=0)
        return self

    def decision_function(self, X: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Signed distance from the midpoint along the direction, shape (n_samples,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        values: npt.NDArray[np.float64] = X @ self.coef_[0] + self.intercept_[0]
        return values

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """The class on whose side of the midpoint each sample lies, shape (n_samples,)."""
        side = (self.decision_function(X) > 0).astype(int)
        labels: npt.NDArray[Any] = self.classes_[side]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
