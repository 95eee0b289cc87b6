"""A steering that does not act in the first whole forward pass is an error."""

import accelerate
import pytest
import torch
from steering_tools import IDS, direction, logits
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Gate, Steer, capture, wrap
from lirefs.errors import CaptureError, InterventionError, LayoutError, ScopeError

VECTOR = direction(1).vector


def swapped_block(model):
    model.model.layers[2] = fresh_model("llama").model.layers[2]


def swapped_part(model):
    model.model.layers[2].mlp = fresh_model("llama").model.layers[2].mlp


def bypassed(model):
    """A block that runs its parts other than by calling them."""
    mlp = model.model.layers[2].mlp
    model.model.layers[2].mlp = Around(mlp)


class Around(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside.forward(*args, **kwargs)


def cut(model):
    model.config.num_hidden_layers = 2


def early_exit(model):
    model.model.layers = model.model.layers[:2]


BROKEN = {f.__name__: f for f in (swapped_block, swapped_part, bypassed, cut, early_exit)}


@pytest.mark.parametrize("settings", [{}, {"scope": "prompt"}, {"strength": [1.0]}])
@pytest.mark.parametrize("how", BROKEN)
def test_hooks_that_did_not_run_are_named(how, settings):
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    steer = Steer(Direction(VECTOR, 2, "mlp_out"), "add", **{"strength": 1.0, **settings})
    with steer.apply(model):
        BROKEN[how](model)
        for _ in range(2):  # until it acts, or is taken off
            with pytest.raises(InterventionError, match="nothing ran at layer 2, mlp_out"):
                model(IDS)
        with pytest.raises(InterventionError, match="nothing ran at"):
            model.model(IDS)
    model(IDS)


def test_one_of_many_places_and_the_gate():
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    everywhere = Steer(direction(1), "add", layers="all")
    gated = Steer(Direction(VECTOR, 3), "add", gate=Gate(Direction(VECTOR, 2), 0.0))
    cut(model)
    with everywhere.apply(model), pytest.raises(InterventionError, match=r"layer 2.*and 1 more"):
        model(IDS)
    with gated.apply(model), pytest.raises(InterventionError, match="which the gate reads"):
        model(IDS)
    with Steer(direction(1), "add").apply(model):
        model(IDS)


def test_an_earlier_steering_at_the_same_place_does_not_vouch_for_a_later_one():
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    with Steer(direction(2), "add").apply(model):
        model(IDS)
        with Steer(direction(2, seed=1), "add").apply(model):
            swapped_block(model)
            with pytest.raises(InterventionError, match="layer 2"):
                model(IDS)


def test_passes_that_are_not_whole_are_not_judged():
    model = fresh_model("llama")
    lm = wrap(model, tiny_tokenizer())
    with Steer(direction(3), "add").apply(model):
        capture(lm, ["abc"], layers=[0, 1], progress=False)  # ends before layer 3
        model.model.layers[0](torch.zeros(1, 2, 32), position_embeddings=_rotary(model))
        with pytest.raises(ScopeError):
            model(torch.zeros(0, 4, dtype=torch.long))
        steered = logits(model)
        assert not model._forward_hooks  # judged, and done
    assert not torch.equal(steered, logits(model))


def _rotary(model):
    return model.model.rotary_emb(torch.zeros(1, 2, 32), torch.arange(2)[None])


def test_drafts_of_the_model_itself_may_leave_out_layers():
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    with Steer(direction(3), "add", 3.0).apply(model):
        wanted = model.generate(IDS, **settings)
        found = model.generate(IDS, **settings, assistant_early_exit=2)
    assert found.tolist() == wanted.tolist()
    with Steer(direction(3), "add", 3.0).apply(model):
        assert model.generate(IDS, **settings, assistant_early_exit=2).tolist() == wanted.tolist()
        assert not model._forward_hooks


def test_capture_names_what_did_not_run():
    for how, found, words in (
        (cut, CaptureError, "layer 2, mlp_out did not run"),
        (early_exit, LayoutError, "no module model.layers.2 any more"),
    ):
        model = fresh_model("llama")
        lm = wrap(model, tiny_tokenizer())
        how(model)
        with pytest.raises(found, match=words):
            capture(lm, ["abc"], layers=[2], sites=["mlp_out"], progress=False)
    for how in (swapped_block, swapped_part):  # read as they are now
        model = fresh_model("llama")
        lm = wrap(model, tiny_tokenizer())
        how(model)
        capture(lm, ["abc"], layers=[2], sites=["mlp_out"], progress=False)


def test_wrappers_of_accelerate_keep_the_hooks():
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    steer = Steer(direction(1), "add", 3.0, scope="prompt", sites=["resid_pre", "mlp_out"])
    with steer.apply(model):
        wanted = logits(model)
    accelerate.cpu_offload(model)
    with steer.apply(model):
        torch.testing.assert_close(logits(model), wanted)
    accelerate.hooks.remove_hook_from_submodules(model)
    prepared = accelerate.Accelerator(cpu=True).prepare(model)
    with steer.apply(model):
        torch.testing.assert_close(logits(prepared), wanted)
