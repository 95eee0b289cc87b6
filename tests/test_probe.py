import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny import fresh_model, tiny_tokenizer

from lirefs import Question, Questions, capture, fit, wrap
from lirefs.errors import CaptureError


def split(n=24, seed=0):
    """Memory questions hold digits, reasoning questions letters: a tiny model can tell."""
    generator = np.random.default_rng(seed)
    items = [
        Question(
            "".join(generator.choice(list("0123456789" if label == "memory" else "abcdefgh"), 8))
            + f"{'.' * i}",
            label,
            f"{label}-{i}",
        )
        for label in ("memory", "reasoning")
        for i in range(n)
    ]
    return Questions(items).split(seed=0)


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
