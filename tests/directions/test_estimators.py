import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lirefs import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)

CLASSIFIERS = [MeanDifference(), WhitenedMeanDifference(), LogisticDirection(), PCADirection()]
GRIDS = [
    (WhitenedMeanDifference(), {"shrinkage": ["auto", 0.1, 0.9]}),
    (LogisticDirection(), {"C": [0.1, 1.0]}),
    (RidgeDirection(), {"alpha": [1.0, 100.0]}),
]


def data(n=60, width=8, gap=3.0, seed=0):
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 2
    scales = np.geomspace(1, 30, width)  # some features are far larger than others
    X = generator.normal(size=(n, width)) * scales
    X[:, 0] += gap * y
    return X, y


@parametrize_with_checks([*CLASSIFIERS, RidgeDirection()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [*CLASSIFIERS, RidgeDirection()], ids=repr)
def test_works_in_a_pipeline_and_under_cross_validation(estimator):
    X, y = data(gap=5.0)
    pipeline = make_pipeline(StandardScaler(), estimator)
    scoring = "r2" if isinstance(estimator, RidgeDirection) else "roc_auc"
    assert cross_val_score(pipeline, X, y, scoring=scoring).mean() > 0.4


@pytest.mark.parametrize(("estimator", "grid"), GRIDS, ids=repr)
def test_works_in_a_grid_search(estimator, grid):
    X, y = data()
    found = GridSearchCV(estimator, grid, cv=3).fit(X, y)
    assert found.best_score_ > 0.3
    assert found.best_estimator_.direction_.shape == (8,)


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


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=repr)
def test_adding_the_direction_once_spans_the_class_means(estimator):
    X, y = data()
    fitted = estimator.fit(X, y)
    gap = X[y == 1].mean(0) - X[y == 0].mean(0)
    unit = fitted.coef_[0] / np.linalg.norm(fitted.coef_[0])
    np.testing.assert_allclose(fitted.direction_, unit * (unit @ gap), atol=1e-9)
    assert unit @ gap > 0


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=repr)
def test_equal_samples_give_a_zero_direction(estimator):
    fitted = estimator.fit(np.ones((4, 3)), [0, 1, 0, 1])
    assert not fitted.direction_.any()
    assert np.isfinite(fitted.decision_function(np.ones((2, 3)))).all()


def test_batches_give_what_all_at_once_gives():
    X, y = data(n=101)
    X = X + 1e4  # a large common part, as residual streams have
    whole = MeanDifference().fit(X, y)
    stream = MeanDifference()
    for rows in np.array_split(np.argsort(y, kind="stable"), 7):  # batches of one class too
        stream.partial_fit(X[rows], y[rows], classes=[0, 1])
    np.testing.assert_allclose(stream.direction_, whole.direction_, atol=1e-10)
    np.testing.assert_allclose(stream.intercept_, whole.intercept_)
    assert stream.counts_.tolist() == [51, 50]


def test_sums_of_half_precision_samples_are_exact():
    X = np.full((30_000, 1), 1.0, np.float16)
    y = np.arange(30_000) % 2
    assert MeanDifference().fit(X, y).sums_[0, 0] == 15_000  # float16 stops at 2,048


def test_batches_are_checked():
    one = MeanDifference()
    with pytest.raises(ValueError, match="classes must be passed"):
        one.partial_fit([[1.0]], [0])
    with pytest.raises(ValueError, match="two classes, got 3"):
        one.partial_fit([[1.0]], [0], classes=[0, 1, 2])
    other = MeanDifference().partial_fit([[1.0]], [0], classes=[0, 1])
    with pytest.raises(ValueError, match="not one of"):
        other.partial_fit([[1.0]], [2])
    with pytest.raises(ValueError, match="not fitted"):  # the second class is still to come
        other.predict([[1.0]])


@pytest.mark.parametrize("shrinkage", ["auto", 0.0, 0.3])
def test_whitening_is_linear_discriminant_analysis(shrinkage):
    X, y = data(width=5)
    if shrinkage == "auto":  # scikit-learn standardizes first, and shrinks each class by itself
        within = X - np.stack([X[y == k].mean(0) for k in (0, 1)])[y]
        X = X / within.std(axis=0)
    ours = WhitenedMeanDifference(shrinkage).fit(X, y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.5, 0.5])
    theirs.fit(X, y)
    expected = theirs.coef_[0] / np.linalg.norm(theirs.coef_)
    assert ours.coef_[0] @ expected == pytest.approx(1, abs=0.05 if shrinkage == "auto" else 1e-9)
    assert (ours.predict(X) == theirs.predict(X)).mean() > 0.95


def test_full_shrinkage_is_the_mean_difference():
    X, y = data()
    ours = WhitenedMeanDifference(shrinkage=1.0).fit(X, y)
    np.testing.assert_allclose(ours.direction_, MeanDifference().fit(X, y).direction_, atol=1e-9)


def test_wrong_shrinkage_is_refused():
    with pytest.raises(ValueError, match="shrinkage"):
        WhitenedMeanDifference(shrinkage=2).fit(*data())


def test_logistic_direction_undoes_the_standardization():
    X, y = data()
    ours = LogisticDirection(C=0.5).fit(X, y)
    scaled = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000)).fit(X, y)
    np.testing.assert_allclose(ours.decision_function(X), scaled.decision_function(X), atol=1e-6)


def test_principal_component_of_paired_differences():
    generator = np.random.default_rng(0)
    shared = 20 * generator.normal(size=(30, 6))  # what the members of a pair have in common
    vector = np.array([0, 0, 2.0, 0, 0, 0])
    X = np.concatenate([shared, shared + vector + 0.1 * generator.normal(size=(30, 6))])
    y = np.repeat([0, 1], 30)
    fitted = PCADirection().fit(X, y)
    np.testing.assert_allclose(fitted.direction_, vector, atol=0.1)
    assert fitted.explained_ > 0.95
    # One sample too many on one side has no partner.
    more = PCADirection().fit(np.concatenate([X, X[-1:]]), [*y, 1])
    assert more.coef_[0] @ fitted.coef_[0] == pytest.approx(1)


def test_ridge_direction_follows_a_graded_score():
    X, _ = data(n=200, gap=0)
    score = np.random.default_rng(1).uniform(size=200)
    X[:, 3] += 40 * score
    fitted = RidgeDirection(alpha=1.0).fit(X, score)
    assert np.corrcoef(fitted.predict(X), score)[0, 1] > 0.8
    assert np.abs(fitted.direction_).argmax() == 3
    unit = fitted.direction_ / np.linalg.norm(fitted.direction_)
    slope = np.polyfit(score, X @ unit, 1)[0]
    assert np.linalg.norm(fitted.direction_) == pytest.approx(slope)
