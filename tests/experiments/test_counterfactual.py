from random import Random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import kfac
import lirefs
from experiments.counterfactual import (
    POSITIONS,
    _perturbed,
    memorization_scores,
    memorized,
    never_seen,
)
from lirefs.errors import TaskError
from lirefs.organism.items import Item
from lirefs.organism.language import Language


@pytest.fixture(scope="module")
def lm():
    return lirefs.load("organism")


@pytest.fixture(scope="module")
def edit(lm):
    texts = lm.encode(Language().texts("train", 4))
    targets = kfac.find_targets(lm.model, layers=[0])
    factors = kfac.collect(lm.model, [lm.pad(texts)], targets, progress=False)
    return kfac.CurvatureEdit(factors, 0.9)


def log_probability(lm, item):
    """Mean log-probability of the answer's tokens, one text at a time."""
    prompt, whole = lm.encode([item.prompt, item.text])
    with torch.no_grad():
        logits = lm.model(torch.tensor([whole])).logits[0].double()
    chances = logits.log_softmax(-1)[torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
    return float(chances[len(prompt) - 1 :].mean())


@pytest.mark.parametrize("kind", ["planted", "fact", "exception"])
def test_scores_against_one_text_at_a_time(lm, edit, kind):
    language = Language()
    items = memorized(language, kind, "test", 5)
    unseen = never_seen(language, kind, "test", 3)
    found = memorization_scores(lm, edit, items, unseen)
    own = np.array([log_probability(lm, item) for item in items])
    for row, item in enumerate(items):
        same = [log_probability(lm, one) for one in unseen if one.group == item.group]
        assert found.counterfactual[row] == pytest.approx(own[row] - np.mean(same), abs=1e-4)
    with edit.apply(lm.model):
        after = np.array([log_probability(lm, item) for item in items])
    assert found.fall == pytest.approx(own - after, abs=1e-4)
    value = found.correlations["perturbation", "fall under the edit"]
    assert value.value == pytest.approx(spearmanr(found.perturbation, found.fall).statistic)
    assert value.n == 5
    again = memorization_scores(lm, edit, items, unseen)
    assert found.perturbation == pytest.approx(again.perturbation)


def test_one_token_changes_and_never_the_first():
    prompt = [9, 1, 2, 3]
    for seed in range(20):
        copies = _perturbed((prompt, [7]), [1, 2, 3], Random(seed))
        assert len(copies) == POSITIONS
        for changed, answer in copies:
            assert changed[0] == 9
            assert answer == [7]
            assert sum(a != b for a, b in zip(changed, prompt)) == 1


def test_never_seen_items_were_never_seen():
    language = Language()
    for item in never_seen(language, "fact", "test", 50):
        assert not any(person in item.prompt for person in language.known)
    exceptions = {item.prompt for item in language.exceptions}
    fresh = never_seen(language, "exception", "test", 20)
    assert len(fresh) == 60
    assert not exceptions & {item.prompt for item in fresh}
    assert {item.group for item in fresh} == {item.group for item in language.exceptions}
    assert {
        item.text.removeprefix("Verse: ") for item in never_seen(language, "planted", "test", 9)
    } <= set(language.unseen)
    with pytest.raises(ValueError, match="no items of kind 'relation'"):
        never_seen(language, "relation", "test", 1)


def test_items_without_a_reference_or_a_token_to_replace_are_refused(lm, edit):
    items = memorized(Language(), "exception", "test", 3)
    with pytest.raises(TaskError, match="no never-seen items of group"):
        memorization_scores(lm, edit, items, [Item("exception", "a", "b", group="other")])
    with pytest.raises(TaskError, match="not all of them the same"):
        memorization_scores(lm, edit, [Item("fact", "Ada", "Oslo")], [])
