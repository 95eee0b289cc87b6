import numpy as np
import pytest
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lirefs import MeanDifference


@parametrize_with_checks([MeanDifference()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_direction_is_the_difference_of_means():
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(40, 5)), np.arange(40) % 2
    X[y == 1] += 3
    fitted = MeanDifference().fit(X, y)
    expected = X[y == 1].mean(0) - X[y == 0].mean(0)
    np.testing.assert_allclose(fitted.direction_, expected, rtol=1e-12)
    assert np.linalg.norm(fitted.coef_) == pytest.approx(1)
    middle = (X[y == 1].mean(0) + X[y == 0].mean(0)) / 2
    assert fitted.decision_function(middle[None])[0] == pytest.approx(0, abs=1e-12)
    pipeline = make_pipeline(StandardScaler(), MeanDifference())
    assert cross_val_score(pipeline, X, y).mean() > 0.9


def test_equal_means_give_a_zero_direction():
    fitted = MeanDifference().fit(np.ones((4, 3)), [0, 1, 0, 1])
    assert not fitted.direction_.any()
    assert np.isfinite(fitted.decision_function(np.ones((2, 3)))).all()
