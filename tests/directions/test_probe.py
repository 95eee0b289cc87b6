import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from steering_tools import split
from tiny import fresh_model, tiny_tokenizer

from lirefs import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
    capture,
    fit,
    fit_directions,
    wrap,
)
from lirefs.directions.fitting import SumLearner
from lirefs.errors import CaptureError, QuestionsError, SettingError


@pytest.fixture(scope="module")
def probe():
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    return fit(lm, split(), shuffles=40, progress=False), lm


def test_directions_are_the_class_mean_differences_of_train_items(probe):
    found, lm = probe
    train = split().train
    states = capture(lm, train.prompts, progress=False)
    labels = np.array(train.labels)
    for layer in range(lm.n_layers):
        values = states[layer].double()
        expected = values[labels == 1].mean(0) - values[labels == 0].mean(0)
        torch.testing.assert_close(
            found.directions[layer].vector.double(), expected, atol=1e-5, rtol=1e-5
        )
        assert found.directions[layer].counts == (12, 12)


def test_layer_is_chosen_on_validation_items(probe):
    found, _ = probe
    usable = [one for one in found.scores if found.directions[one.layer].norm > 0]
    best = max(usable, key=lambda one: one.validation_auroc.value)
    assert found.best_layer == best.layer
    assert found.best.means[1] > found.best.means[0]
    assert found.best_scores.test_auroc.n == 12


def test_layer_zero_separates_nothing(probe):
    found, _ = probe  # its last token is the same for all prompts
    assert found.directions[0].norm == pytest.approx(0, abs=1e-6)
    assert found.scores[0].test_auroc.value == 0.5


def test_controls_stand_beside_the_result(probe):
    found, _ = probe
    assert found.shuffled.low < 0.5 < found.shuffled.high
    assert abs(found.shuffled.value - 0.5) < 0.15
    assert 0 <= found.bag_of_words.value <= 1
    assert set(found.to_dict()) >= {"best_layer", "layers", "shuffled_auroc", "bag_of_words_auroc"}


def test_any_linear_classifier_fits(probe):
    _, lm = probe
    found = fit(lm, split(), LogisticRegression(), layers=[1, 2], shuffles=2, progress=False)
    assert sorted(layer for layer, _ in found.directions) == [1, 2]
    assert "LogisticRegression" in found.directions.provenance["estimator"]


def test_no_separating_layer_is_an_error(probe):
    _, lm = probe
    with pytest.raises(CaptureError, match="no layer separates"):
        fit(lm, split(), layers=[0], shuffles=1, progress=False)


ESTIMATORS = [
    MeanDifference(),
    WhitenedMeanDifference(),
    LogisticDirection(),
    PCADirection(),
    RidgeDirection(),
    Ridge(),
    GridSearchCV(LogisticDirection(), {"C": [0.1, 1.0]}, cv=2),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_every_estimator_fits_with_its_controls(probe, estimator):
    _, lm = probe
    found = fit(lm, split(), estimator, layers=[1, 3], shuffles=3, progress=False)
    best = found.best
    # Adding the direction once spans the classes along it, whatever the estimator.
    assert best.norm == pytest.approx(best.means[1] - best.means[0], rel=1e-4)
    assert len(found.null) == 3
    assert 0 < found.p_value <= 1
    layer = found.to_dict()["layers"][0]
    keys = "validation_auroc test_auroc test_accuracy cosine_memory cosine_reasoning spearman"
    keys += " pearson shuffled_auroc random_auroc norm"
    assert list(layer) == ["layer", *keys.split()]  # files keep their order
    assert (layer["cosine_memory"], layer["cosine_reasoning"]) == found.scores[0].cosines


def test_streamed_and_held_states_give_the_same_probe(probe, tmp_path):
    streamed, lm = probe
    held = fit(lm, split(), shuffles=40, progress=False, cache=tmp_path)
    for place, one in streamed.directions.items():
        other = held.directions[place]
        torch.testing.assert_close(one.vector, other.vector, atol=1e-5, rtol=1e-4)
        assert one.spread == pytest.approx(other.spread, abs=1e-4)
    assert streamed.best_layer == held.best_layer
    assert streamed.best_scores.test_auroc == held.best_scores.test_auroc
    assert streamed.null == pytest.approx(held.null, abs=0.05)


def test_memory_of_the_mean_difference_does_not_grow_with_the_items():
    def held(n):
        labels = np.arange(n) % 2
        orders = np.array([np.random.default_rng(i).permutation(n) for i in range(5)])
        learner = SumLearner(MeanDifference(), labels, orders)
        for start in range(0, n, 50):
            learner.add(list(range(start, start + 50)), np.ones((50, 3, 4)))
        learner.finish()
        return learner.null.nbytes + learner.means.nbytes + learner._sums.nbytes

    assert held(100) == held(10_000)


def test_grades_are_fitted_by_regressors_and_correlated(probe):
    _, lm = probe
    sides = split()
    grades = {
        item.id: 0.8 * (item.label == "reasoning") + 0.2 * (i % 2)
        for side in sides.sides.values()
        for i, item in enumerate(side)
    }
    found = fit(lm, sides, RidgeDirection(1.0), grades=grades, layers=[2], progress=False)
    assert found.best_scores.pearson.value > 0.5
    assert found.best_scores.spearman.low < found.best_scores.spearman.value
    with pytest.raises(QuestionsError, match="have no grade"):
        fit(lm, sides, grades={}, progress=False)
    with pytest.raises(QuestionsError, match="from 0 to 1"):
        fit(lm, sides, grades=dict.fromkeys(grades, 2.0), progress=False)


def test_the_last_layer_is_fitted_on_the_raw_block_output(probe):
    _, lm = probe
    last = lm.n_layers - 1
    found = fit(lm, split(), layers=[last], site="resid_post", shuffles=1, progress=False)
    train = split().train
    seen = []
    handle = lm.model.model.layers[last].register_forward_hook(lambda m, a, out: seen.append(out))
    normed = []
    with torch.no_grad():
        for prompt in train.prompts:
            ids = torch.tensor(lm.encode([prompt]))
            normed.append(lm.model(ids, output_hidden_states=True).hidden_states[-1][0, -1])
    handle.remove()
    labels = np.array(train.labels)
    raw = torch.stack([one[0, -1] for one in seen])
    expected = raw[labels == 1].mean(0) - raw[labels == 0].mean(0)
    torch.testing.assert_close(found.best.vector, expected, atol=1e-4, rtol=1e-4)
    normed = torch.stack(normed)
    wrong = normed[labels == 1].mean(0) - normed[labels == 0].mean(0)
    assert (found.best.vector - wrong).norm() > 0.1 * expected.norm()


def test_models_that_give_no_direction_are_refused(probe):
    _, lm = probe
    with pytest.raises(SettingError, match="coef_"):
        fit(lm, split(), KNeighborsClassifier(), layers=[1], shuffles=1, progress=False)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    with pytest.raises(SettingError, match="coef_"):
        fit(lm, split(), pipeline, layers=[1], shuffles=1, progress=False)


def test_directions_from_states_are_those_of_fit(probe):
    found, lm = probe
    train = split().train
    states = capture(lm, train.prompts, progress=False)
    made = fit_directions(states, train.labels, provenance={"model": lm.fingerprint})
    for place, one in found.directions.items():
        torch.testing.assert_close(made[place].vector, one.vector, atol=1e-5, rtol=1e-4)
    assert made[1].model == lm.fingerprint
    with pytest.raises(CaptureError, match="labels"):
        fit_directions(states, [0, 1])
    for labels in ([0] * 24, [1] * 24, [1, 2] * 12):
        with pytest.raises(CaptureError, match="both of them"):
            fit_directions(states, labels)
    broken = dataclasses.replace(states, values=states.values.clone())
    broken.values[3, 1] = torch.inf
    for estimator in (MeanDifference(), LogisticDirection()):
        with pytest.raises(CaptureError, match="prompt 3, layer 1"):
            fit_directions(broken, train.labels, estimator)


def test_layers_and_shuffles_of_a_fit(probe, tmp_path):
    _, lm = probe
    for cache in (None, tmp_path):
        settings = {"shuffles": 1, "cache": cache, "progress": False}
        found = fit(lm, split(), layers=np.array([1, 2]), **settings)
        assert list(found.directions) == [(1, "resid_pre"), (2, "resid_pre")]
        for layers in (3, ["1"]):
            with pytest.raises(SettingError, match="list of integers"):
                fit(lm, split(), layers=layers, **settings)
            with pytest.raises(SettingError, match="list of integers"):
                capture(lm, ["a"], layers=layers, cache=cache, progress=False)
    with pytest.raises(SettingError, match="at least 1"):
        fit(lm, split(), shuffles=0, progress=False)
