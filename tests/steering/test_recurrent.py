"""With a recurrent cache the same tokens are steered as without one."""

import pytest
import torch
from recurrent import HYBRID, RECURRENT, recurrent_model
from steering_tools import touched
from tiny import tiny_tokenizer

from lirefs import Direction, Gate, Schedule, Steer, prompt_lengths, wrap
from lirefs.errors import ScopeError
from lirefs.steering import scope as scopes
from lirefs.tasks.inference import greedy

VECTOR = 3 * torch.randn(32, generator=torch.Generator().manual_seed(5))
PROMPT = torch.tensor([[0, 65, 32, 80, 82, 79, 77, 80, 84]])
WAYS = {
    "prompt": {"scope": "prompt"},
    "generated": {"scope": "generated"},
    "last_prompt_token": {"scope": "last_prompt_token"},
    "from_position": {"scope": scopes.from_position(10)},
    "mask": {"scope": scopes.mask([p in (2, 5, 8) for p in range(9)])},
    "schedule": {"strength": Schedule([1.0, 0.0, 2.0])},
    "row gate": {"gate": Gate(Direction(VECTOR, 0), -1e3, per="row")},
}
"""What a steering is confined to; what it means is what it does without a cache."""


def steering(way):
    settings = {"strength": 1.0, **WAYS[way]}
    return Steer(Direction(VECTOR, 1), "add", **settings)


def language_model(family):
    return wrap(recurrent_model(family), tiny_tokenizer())


@pytest.mark.parametrize("family", [*RECURRENT, *HYBRID])
def test_generate_is_steered_with_a_cache_as_without(family):
    lm = language_model(family)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    for way in WAYS:
        with steering(way).apply(lm.model), torch.no_grad():
            cached, plain = (
                torch.stack(lm.model.generate(PROMPT, use_cache=use, **settings).logits)
                for use in (True, False)
            )
        torch.testing.assert_close(cached, plain, atol=2e-5, rtol=1e-4, msg=f"{family}, {way}")


def loop(lm, ids, pieces, mask=None):
    """Logits of the last token of each piece of a text, run by hand under the model's own cache."""
    cache, found = {}, []
    for start, end in pieces:
        given = {} if mask is None else {"attention_mask": mask(start, end)}
        out = lm.model(ids[:, start:end], use_cache=True, **cache, **given)
        name = next(n for n in ("past_key_values", "cache_params", "state") if out.get(n))
        cache = {name: out[name]}
        found.append(out.logits[:, -1])
    return torch.stack(found)


MASKS = {
    "no mask": None,
    "a mask of all tokens": lambda start, end: torch.ones(1, end, dtype=torch.long),
    "a mask of the new tokens": lambda start, end: torch.ones(1, end - start, dtype=torch.long),
}


@pytest.mark.parametrize("given", MASKS)
@pytest.mark.parametrize("family", RECURRENT)
def test_a_loop_written_by_hand(family, given):
    lm = language_model(family)
    ids = torch.cat([PROMPT, torch.tensor([[50, 60, 70]])], dim=1)
    pieces = [(0, 9), (9, 10), (10, 11), (11, 12)]
    if family != "rwkv" and given == "a mask of all tokens":
        pytest.skip("this model multiplies its input by the mask, so their lengths must agree")
    for way in WAYS:
        with steering(way).apply(lm.model), torch.no_grad():
            found = loop(lm, ids, pieces, MASKS[given])
            with prompt_lengths([9]):
                whole = lm.model(ids, use_cache=False).logits[0, 8:]
        torch.testing.assert_close(found[:, 0], whole, atol=2e-5, rtol=1e-4, msg=way)


@pytest.mark.parametrize("family", RECURRENT)
def test_a_prompt_in_pieces(family):
    lm = language_model(family)
    ids = torch.cat([PROMPT, torch.tensor([[50, 60, 70]])], dim=1)
    pieces = [(0, 1), *((i, i + 1) for i in range(1, 12))]  # these models take one after a state
    with torch.no_grad(), prompt_lengths([9]):
        for way in WAYS:
            with steering(way).apply(lm.model):
                found = loop(lm, ids, pieces)
                whole = lm.model(ids, use_cache=False).logits[0]
            torch.testing.assert_close(found[:, 0], whole, atol=2e-5, rtol=1e-4, msg=way)


@pytest.mark.parametrize("family", RECURRENT[:-1])
def test_rows_of_different_lengths(family):
    """Which tokens are steered in a padded batch, seen at the block itself.

    Not for RWKV, which mixes the rows of a batch when it continues a state (transformers 5.23).
    """
    lm = language_model(family)
    batch = lm.pad(lm.encode(["abcdef", "xy"]))
    batch.pop("position_ids", None)
    for scope, expected in {
        "prompt": [[[1] * 7, [0] * 4 + [1] * 3], [[0], [0]], [[0], [0]]],
        "generated": [[[0] * 7] * 2, [[1], [1]], [[1], [1]]],
        "last_prompt_token": [[[0] * 6 + [1]] * 2, [[0], [0]], [[0], [0]]],
    }.items():
        steer = Steer(Direction(VECTOR, 1), "add", scope=scope)
        with steer.apply(lm.model), touched(lm, 1) as seen, torch.no_grad():
            lm.model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=2)
        assert seen == expected, scope


@pytest.mark.parametrize("family", RECURRENT)
def test_a_state_that_began_before_the_steering_is_refused(family):
    lm = language_model(family)
    with torch.no_grad():
        out = lm.model(PROMPT, use_cache=True)
        name = next(n for n in ("cache_params", "state") if out.get(n))
        for way in WAYS:
            with steering(way).apply(lm.model), pytest.raises(ScopeError, match="began before"):
                lm.model(PROMPT[:, :1], use_cache=True, **{name: out[name]})
        with Steer(Direction(VECTOR, 1), "add").apply(lm.model):  # every token, wherever it is
            lm.model(PROMPT[:, :1], use_cache=True, **{name: out[name]})


def test_a_cache_that_was_reset_begins_again():
    lm = language_model("mamba")
    with steering("prompt").apply(lm.model), torch.no_grad():
        out = lm.model(PROMPT, use_cache=True)
        out.cache_params.reset()
        again = lm.model(PROMPT, use_cache=True, cache_params=out.cache_params)
    torch.testing.assert_close(again.logits, out.logits)


@pytest.mark.parametrize("way", ["prompt", "generated", "last_prompt_token", "from_position"])
@pytest.mark.parametrize("family", [*RECURRENT, *HYBRID])
def test_rows_that_leave_a_batch_change_no_other(family, way):
    """A recurrent cache does not say how far each of the rows that are left has come."""
    lm = language_model(family)
    prompts = lm.encode([f"{i}" + "?" * (i % 3) for i in range(5)])
    limits = [5, 4, 1, 2, 5]
    with steering(way).apply(lm.model):
        alone = [greedy(lm, [prompt], limit)[0] for prompt, limit in zip(prompts, limits)]
        assert greedy(lm, prompts, limits) == alone
