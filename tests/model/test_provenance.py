"""Whose model a direction is, with and without edits of the weights; edits beside steering."""

import dataclasses

import pytest
import torch
from steering_tools import direction, logits
from tiny import fresh_model, tiny_tokenizer

import kfac
from lirefs import Directions, Gate, Steer, compose, wrap
from lirefs.errors import ProvenanceError


def test_directions_of_another_model_are_refused():
    lm, other = (wrap(fresh_model("llama"), tiny_tokenizer()) for _ in range(2))
    with torch.no_grad():
        other.model.model.norm.weight[0] += 1
    items = {(1, "resid_pre"): direction()}
    directions = Directions(items, {"model": lm.fingerprint})
    for steer in (Steer(directions, "add"), Steer(directions[1], "add")):
        with steer.apply(lm.model):
            pass
        with pytest.raises(ProvenanceError, match="any_model"):
            steer.attach(other.model)
    gate = Gate(directions[1], 0.0)
    with pytest.raises(ProvenanceError):
        Steer(direction(layer=2), "add", gate=gate).attach(other.model)
    with Steer(directions[1], "add", any_model=True).apply(other.model):
        pass


def test_an_edit_before_the_steering_is_no_other_model():
    model = fresh_model("llama")
    directions = Directions(
        {(1, "resid_pre"): direction()}, {"model": wrap(model, tiny_tokenizer()).fingerprint}
    )
    with compose(Doubled(), Steer(directions, "add")).apply(model):
        assert not torch.equal(model.model.norm.weight, torch.ones(32))


class Doubled:
    """A weight edit."""

    def attach(self, model):
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data.mul_(2)
        return type("Handle", (), {"remove": lambda self: weight.data.div_(2)})()

    def describe(self):
        return {}


def curvature_edit(model):
    ids = torch.randint(3, 120, (6, 12), generator=torch.Generator().manual_seed(0))
    targets = kfac.find_targets(model, layers=[1, 2])
    return kfac.CurvatureEdit(kfac.collect(model, [{"input_ids": ids}], targets, seed=0), 0.6)


def test_steering_and_a_curvature_edit_compose():
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    made = dataclasses.replace(direction(layer=2), model=lm.fingerprint)
    edit, steer = curvature_edit(lm.model), Steer(made, "add", 2.0)
    clean = logits(lm.model)
    weight = lm.model.model.layers[1].mlp.up_proj.weight.clone()
    with edit.apply(lm.model):
        edited = logits(lm.model)
        hook = lm.layout.block(lm.model, 2).register_forward_pre_hook(
            lambda _, args: (args[0] + 2 * made.vector, *args[1:])
        )
        expected = logits(lm.model)
        hook.remove()
    assert (expected - edited).abs().max() > 1e-3
    assert (edited - clean).abs().max() > 1e-3
    for both in (steer + edit, edit + steer):
        with both.apply(lm.model):
            torch.testing.assert_close(logits(lm.model), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits(lm.model), clean)
        assert torch.equal(lm.model.model.layers[1].mlp.up_proj.weight, weight)
    assert (steer + edit).describe()["members"][1]["kind"] == "kfac"


def test_a_model_stays_itself_under_an_edit_that_is_attached():
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    made = dataclasses.replace(direction(), model=lm.fingerprint)
    with curvature_edit(lm.model).apply(lm.model):
        with Steer(made, "add").apply(lm.model):
            pass
        edited = dataclasses.replace(direction(), model=lm.fingerprint)
        assert edited.model != made.model
        with Steer(edited, "add").apply(lm.model):
            pass
    with Steer(made, "add").apply(lm.model), pytest.raises(ProvenanceError):
        Steer(edited, "add").attach(lm.model)


def test_a_model_that_was_trained_on_is_another_model():
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    made = dataclasses.replace(direction(), model=lm.fingerprint)
    weight = lm.model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    with Steer(made, "add").apply(lm.model), torch.no_grad():
        weight.add_(0.01)
    with pytest.raises(ProvenanceError):
        Steer(made, "add").attach(lm.model)
    with torch.no_grad():
        weight.copy_(before)
    with Steer(made, "add").apply(lm.model):
        pass
