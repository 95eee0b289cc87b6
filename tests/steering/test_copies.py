"""A steered model cannot be copied; its weights can be saved, and are those of the plain model."""

import copy
import io
import pickle

import pytest
import torch
from steering_tools import direction, logits
from tiny import fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lirefs import Gate, Steer, wrap
from lirefs.errors import InterventionError

WAYS = {
    "all": {},
    "generated": {"scope": "generated"},
    "output": {"sites": ["resid_post"]},
    "schedule": {"strength": lambda index: 1.0},
    "gate": {"gate": Gate(direction(0), 0.0)},
    "idle": {"strength": 0.0},
}
COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle, in Python": lambda one: pickle._dumps(one),
    "save": lambda one: torch.save(one, io.BytesIO()),
}


@pytest.mark.parametrize("how", COPY)
@pytest.mark.parametrize("way", WAYS)
def test_a_steered_model_is_not_copied(way, how):
    model = fresh_model("llama")
    lm = wrap(model, tiny_tokenizer())
    plain = logits(model)
    steer = Steer(direction(1), "add", **{"strength": 1.0, **WAYS[way]})
    with steer.apply(model):
        for whole in (model, model.model, lm):
            with pytest.raises(InterventionError, match="cannot be copied or pickled"):
                COPY[how](whole)
        if way not in ("gate", "idle"):
            for part in (model.model.layers, model.model.layers[1]):
                with pytest.raises(InterventionError, match="cannot be copied or pickled"):
                    COPY[how](part)
        COPY[how](model.lm_head)  # has nothing of it
        logits(model)
        with pytest.raises(InterventionError, match="cannot be copied"):
            COPY[how](model)
    COPY[how](model)
    twin = copy.deepcopy(model)
    assert "generate" not in vars(twin)
    assert torch.equal(logits(twin), plain)
    for one in twin.modules():
        assert not one._forward_hooks
        assert not one._forward_pre_hooks


def test_saved_weights_are_those_of_the_plain_model(tmp_path):
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    plain = logits(model)
    with Steer(direction(1), "add", 3.0, scope="generated").apply(model):
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "state.pt")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), plain)
    other = fresh_model("llama", initializer_range=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(other), plain)
