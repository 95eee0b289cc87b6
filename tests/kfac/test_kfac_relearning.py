import copy

import pytest
import torch
from curvature_tools import assert_restored, batch, collect, llama, snapshot

import kfac
from kfac import SVDEdit, relearn
from lirefs.errors import BatchError, EditError, NonFiniteError
from lirefs.model.training.copies import trainable


def prefix_labels(one, prefix=2):
    labels = one["input_ids"].clone()
    labels[:, :prefix] = -100
    return one | {"labels": labels}


@pytest.fixture(scope="module")
def trained():
    """A tiny model that recites five texts, and the texts."""
    model = llama(torch.float32)
    rows = (0, 1, 2, 4, 5)
    texts, together = [prefix_labels(batch([row])) for row in rows], prefix_labels(batch(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = kfac.analysis.losses.passage_losses(model, together).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model, texts


def test_recitation_is_greedy_generation(trained):
    model, texts = trained
    for one in texts:
        ids = one["input_ids"]
        made = model.generate(ids[:, :2], max_new_tokens=ids.shape[1] - 2, do_sample=False)
        same = torch.equal(made[:, : ids.shape[1]], ids)
        assert bool(kfac.teacher_forced_matches(model, [one])[0]) == same
    assert kfac.teacher_forced_matches(model, texts).mean() == 1
    wrong = batch([3])
    assert kfac.teacher_forced_matches(model, [wrong])[0] == 0


def test_padding_does_not_change_recitation(trained):
    model, _ = trained
    together = [prefix_labels(batch([0, 1, 2, 4, 5])), batch([3, 0])]
    alone = [prefix_labels(batch([row])) for row in (0, 1, 2, 4, 5)] + [batch([3]), batch([0])]
    one, two = (
        kfac.teacher_forced_matches(model, together),
        kfac.teacher_forced_matches(model, alone),
    )
    assert torch.equal(one, two)
    assert 0 < one.mean() < 1


def test_relearning_restores_the_model_and_separates_the_arms(trained):
    model, texts = trained
    edit = SVDEdit([*collect(model, texts).names, "lm_head"], 0.3)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    result = relearn(
        model,
        {"edited": edit, "unchanged": None},
        texts[:3],
        texts[3:],
        other=[batch([3])],
        steps=[0, 3, 20],
        lr=3e-3,
        progress=False,
    )
    assert_restored(model, before)
    assert model.training
    model.eval()
    model.lm_head.weight.requires_grad_(True)
    assert list(result.rest) == ["edited", "unchanged", "edited (other text)"]
    assert result.rest["unchanged"][0].value == 1
    assert result.known["edited"][0].value < 1
    assert result.known["edited"][-1].value > result.known["edited"][0].value
    with edit.apply(model):
        assert result.rest["edited"][0].value == float(
            kfac.teacher_forced_matches(model, texts[3:]).mean()
        )
    assert [one.n for one in result.rest["edited"]] == [2, 2, 2]


def test_half_precision_learns_in_float32_and_comes_back(trained):
    model, texts = trained
    half = copy.deepcopy(model).bfloat16()
    before = snapshot(half)
    weight = half.model.layers[0].mlp.up_proj.weight
    with trainable(half):
        start = weight.detach().clone()
        optimizer = torch.optim.AdamW(half.parameters(), lr=1e-5, weight_decay=0.0)
        kfac.analysis.losses.passage_losses(half, texts[0]).mean().backward()
        optimizer.step()
        # Each weight takes its small step; in bfloat16 nearly all would have stayed.
        assert ((weight.detach() - start).abs() > 5e-6).double().mean() > 0.9
    assert_restored(half, before)


def test_a_curvature_edit_of_a_half_precision_model(trained):
    model, texts = trained
    half = copy.deepcopy(model).bfloat16()
    edit = kfac.CurvatureEdit(collect(half, texts), 0.5)
    before = snapshot(half)
    arms = {"edited": edit, "unchanged": None}
    result = relearn(half, arms, texts[:3], texts[3:], steps=[0, 2], progress=False)
    assert_restored(half, before)
    # Tested is the edited model in its own precision, computed in float32.
    with edit.apply(half), trainable(half):
        expected = kfac.teacher_forced_matches(half, texts[:3]).mean()
    assert result.known["edited"][0].value == float(expected)


def test_named_errors(trained):
    model, texts = trained
    before = snapshot(model)
    with pytest.raises(BatchError, match="rest"):
        relearn(model, {"a": None}, texts, [])
    with pytest.raises(EditError):
        relearn(model, {}, texts, texts)
    for steps in ([], [3, 1], [-1]):
        with pytest.raises(EditError):
            relearn(model, {"a": None}, texts, texts, steps=steps)
    with pytest.raises(EditError):
        relearn(model, {"a": None}, texts, texts, lr=0)
    with pytest.raises(BatchError, match="no position"):
        relearn(model, {"a": None}, [batch([0]) | {"labels": torch.full((1, 9), -100)}], texts)
    with pytest.raises(NonFiniteError, match="lower lr"):
        relearn(model, {"a": None}, texts, texts, lr=1e30, steps=[5], progress=False)
    assert_restored(model, before)
