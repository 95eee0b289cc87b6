"""A steering and what calls the model: a `generate` of the user's own, an outer model, a cache."""

import copy

import pytest
import torch
from steering_tools import IDS, direction
from tiny import fresh_model, tiny_tokenizer
from transformers import DynamicCache

from lirefs import Gate, Steer, wrap
from lirefs.errors import InterventionError, ScopeError
from lirefs.model.intervention import UndoStack
from lirefs.steering import scope as scopes

SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 2}


@pytest.fixture
def model():
    return wrap(fresh_model("llama"), tiny_tokenizer()).model


def scoped(scope="generated", strength=8.0, **more):
    return Steer(direction(1), "add", strength, scope=scope, **more)


def mine(*args, **kwargs):
    return "mine"


def test_a_generate_set_while_steered_is_called_and_stays(model):
    with scoped().apply(model):
        model.generate = mine
        assert model.generate(IDS) == "mine"
        with scoped("prompt").apply(model):
            assert model.generate(IDS) == "mine"
    assert vars(model)["generate"] is mine


def test_a_generate_that_wraps_what_was_there_stays_and_works(model):
    plain = model.generate(IDS, **SETTINGS)
    calls = []
    with scoped().apply(model):
        steered = model.generate(IDS, **SETTINGS)
        inner = model.generate

        def wrapping(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        model.generate = wrapping
        assert torch.equal(model.generate(IDS, **SETTINGS), steered)
    assert torch.equal(model.generate(IDS, **SETTINGS), plain)
    assert len(calls) == 2


def test_a_generate_removed_while_steered_stays_removed(model):
    model.generate = mine
    with scoped().apply(model):
        assert model.generate(IDS) == "mine"
        del model.generate
    assert "generate" not in vars(model)
    model.generate = mine
    with scoped().apply(model):
        pass
    assert vars(model)["generate"] is mine


def test_a_shallow_copy_of_a_steered_model_is_refused_where_it_would_keep_something(model):
    with scoped().apply(model), pytest.raises(InterventionError, match="cannot be copied"):
        copy.copy(model)
    twin = copy.copy(model)
    assert not {"generate", "__getstate__"} & vars(twin).keys()


@pytest.mark.parametrize("scope", ["prompt", "generated", "last_prompt_token"])
def test_generation_without_a_cache_around_the_steered_model_is_refused(model, scope):
    steer = scoped(scope)
    with steer.apply(model):
        right = model.generate(IDS, **SETTINGS)
        assert torch.equal(model.generate(IDS, use_cache=False, **SETTINGS), right)
    with steer.apply(model.model):
        assert torch.equal(model.generate(IDS, **SETTINGS), right)
        with pytest.raises(ScopeError, match="attach the steering to the model whose generate"):
            model.generate(IDS, use_cache=False, **SETTINGS)
        model(IDS, use_cache=False)  # a prompt


def test_absolute_scopes_need_no_prompt_around_the_steered_model(model):
    steer = scoped(scopes.from_position(3))
    with steer.apply(model):
        right = model.generate(IDS, **SETTINGS)
    with steer.apply(model.model):
        assert torch.equal(model.generate(IDS, use_cache=False, **SETTINGS), right)
    gated = scoped("all", gate=Gate(direction(0), 0.0, per="row"))
    with gated.apply(model.model), pytest.raises(ScopeError):
        model.generate(IDS, use_cache=False, **SETTINGS)


@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_kept_over_turns_of_a_chat(model, masked):
    """In each turn the prompt is all that was given, and what the cache holds stays as it was."""
    rows = torch.tensor([[2, 2, 0, 33, 44, 55], [0, 40, 50, 60, 70, 80]])
    rows = rows if masked else rows[1:]
    steers = {scope: scoped(scope, 1.0) for scope in ("prompt", "generated", "last_prompt_token")}
    for scope, steer in steers.items():
        layout, mask = steer.check(model), steer.token_mask()
        undo = UndoStack()
        steer.attach_checked(model, layout, undo, mask)
        passes = []
        hook = model.model.register_forward_hook(
            lambda *given, mask=mask, passes=passes: passes.append(mask.strengths(1.0).tolist())
        )
        talk, cache = rows, DynamicCache(config=model.config)
        for _ in range(2):
            more = {"attention_mask": (talk != 2).long()} if masked else {}
            talk = model.generate(talk, past_key_values=cache, **more, **SETTINGS)
            talk = torch.cat([talk, talk[:, 3:5]], dim=1)  # what the user says next
        hook.remove()
        undo.remove()
        ones, last = [[1.0] * 6, [1.0] * 3], [[0.0] * 5 + [1.0], [0.0, 0.0, 1.0]]
        none = [[0.0] * 6, [0.0] * 3]
        prompts = {"prompt": ones, "generated": none, "last_prompt_token": last}[scope]
        step = [1.0] if scope == "generated" else [0.0]
        expected = [prompts[0], step, step, prompts[1], step, step]
        assert [one[-1] for one in passes] == expected
        if masked:  # the shorter row has two tokens of padding
            first = [0.0, 0.0, *prompts[0][2:]]
            assert [one[0] for one in passes] == [first, *expected[1:]]
