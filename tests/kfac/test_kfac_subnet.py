import json

import pytest
import torch
from curvature_tools import assert_restored, batch, llama, snapshot

import kfac
from kfac import fit_balanced_subnet
from kfac.analysis.losses import passage_losses
from lirefs.errors import BatchError, EditError, FactorsMismatchError
from lirefs.model.training.copies import trained_weights


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


def fit(model, **settings):
    targets = kfac.find_targets(model, projections="mlp")
    return fit_balanced_subnet(
        model, [batch([0, 1])], [batch([2, 4])], targets, progress=False, **settings
    )


def losses(model):
    with torch.no_grad():
        return [float(passage_losses(model, batch(rows)).sum()) for rows in ([0, 1], [2, 4])]


def test_it_raises_the_loss_of_the_memorized_texts(model):
    before, plain = snapshot(model), losses(model)
    untrained = fit(model, ratio=0.05, epochs=1, lr=1e-12)
    trained = fit(model, ratio=0.05, epochs=60)
    assert_restored(model, before)
    with untrained.apply(model):
        first = losses(model)
    with trained.apply(model):
        last = losses(model)
    assert_restored(model, before)
    # The objective: clean loss minus 0.7 of the memorized loss.
    assert last[0] - 0.7 * last[1] < first[0] - 0.7 * first[1]
    assert last[1] > plain[1]


def test_the_ratio_is_pruned_in_each_matrix(model):
    edit = fit(model, ratio=0.1, epochs=2)
    for target, weight in edit.prepare(model):
        mask = edit.masks[target.name]
        assert int((~mask).sum()) == round(0.1 * mask.numel())
        assert torch.equal(weight, target.weight * mask)
    assert json.loads(json.dumps(edit.describe()))["kind"] == "balanced_subnet"


def test_it_nests_inside_another_edit(model):
    before = snapshot(model)
    edit = fit(model, ratio=0.1, epochs=1)
    names = list(edit.masks)
    with kfac.SVDEdit(names, 0.5).apply(model):
        inner = {target.name: weight.clone() for target, weight in edit.prepare(model)}
        with edit.apply(model):
            for target in kfac.named_targets(model, names):
                assert torch.equal(target.weight, inner[target.name])
                assert not target.weight[~edit.masks[target.name]].any()
    assert_restored(model, before)


def test_a_seed_gives_the_same_mask(model):
    one, two, other = (fit(model, ratio=0.1, epochs=2, seed=s).describe() for s in (0, 0, 1))
    assert one["masks"] == two["masks"] != other["masks"]


def test_the_gradient_of_a_score_is_straight_through(model):
    """One step without momentum equals autograd through W ∘ m with m's gradient passed on."""
    target = kfac.named_targets(model, ["model.layers.0.mlp.up_proj"])[0]
    masked = kfac.edits.subnet._Masked([target], 0.1, 0.3, seed=0)
    score = masked.parts[0][2].clone()
    weight = target.weight.clone()
    mask = kfac.edits.subnet._kept(score, 0.1).float().requires_grad_(True)
    name = target.name + ".weight"
    logits = torch.func.functional_call(
        model, {name: weight * mask}, kwargs={"input_ids": batch([0])["input_ids"]}
    ).logits
    by_mask = torch.autograd.grad(logits.square().sum(), mask)[0]
    with trained_weights([target.parameter]):
        masked.mask()
        model(input_ids=batch([0])["input_ids"]).logits.square().sum().backward()
        masked.step()
    model.zero_grad()
    expected = score - 0.3 * (by_mask * score.sign() + 5e-4 * score)
    torch.testing.assert_close(masked.parts[0][2], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(target.weight, weight)


def test_named_errors(model):
    targets = kfac.find_targets(model)
    with pytest.raises(BatchError, match="empty"):
        fit_balanced_subnet(model, [], [batch([0])], targets)
    with pytest.raises(BatchError, match=r"use \[text\]"):
        fit_balanced_subnet(model, [batch([0])], "a text", targets)
    with pytest.raises(EditError, match="seed"):
        fit(model, seed=-1)
    with pytest.raises(EditError, match="target"):
        fit_balanced_subnet(model, [batch([0])], [batch([0])], [])
    for wrong in ({"ratio": 0}, {"ratio": 1}, {"weight": -1}, {"epochs": 0}, {"lr": 0}):
        with pytest.raises(EditError):
            fit(model, **wrong)
    edit = fit(model, ratio=0.1, epochs=1)
    settings = {"ratio": 0.1, "epochs": 1, "seed": 0}
    assert {key: edit.describe()[key] for key in settings} == settings
    other = llama(torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(FactorsMismatchError):
        edit.attach(other)


def test_another_ratio_prunes_by_the_same_scores(model):
    edit = fit(model, ratio=0.05, epochs=1)
    more = edit.with_ratio(0.2)
    again = edit.with_ratio(0.05)
    for name, mask in edit.masks.items():
        assert torch.equal(again.masks[name], mask)
        assert int((~more.masks[name]).sum()) == round(0.2 * mask.numel())
        assert not (more.masks[name] & ~mask).any()  # what was pruned still is
    assert more.describe()["learned at"] == 0.05
    assert more.with_ratio(0.3).describe()["learned at"] == 0.05
    assert more.describe()["ratio"] == 0.2
    for broken, ratio in ((edit, 0), (kfac.SubnetEdit(edit.masks, edit.digests, {}), 0.2)):
        with pytest.raises(EditError, match="with_ratio needs scores"):
            broken.with_ratio(ratio)
