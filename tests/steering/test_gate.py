"""Gates: steering of the rows or tokens whose projection passes a threshold."""

import gc

import pytest
import torch
from steering_tools import direction, logits_of, states

from lirefs import Gate, Steer, prompt_lengths
from lirefs.errors import InterventionError
from lirefs.model import prompts


def test_a_gate_by_token_steers_only_what_passes(lm):
    probe, one = direction(layer=1, seed=7), direction(layer=2)
    at = states(lm.model)
    passing = (at[1] @ probe.unit) > 0.1
    assert passing.any()
    assert not passing.all()
    for above in (True, False):
        gate = Gate(probe, 0.1, above=above)
        with Steer(one, "add", 2.0, gate=gate).apply(lm.model):
            moved = states(lm.model)[3] - at[3]
        chosen = passing if above else ~passing
        hook = lm.layout.block(lm.model, 2).register_forward_pre_hook(
            lambda _, a, m=chosen: (a[0] + 2 * m[..., None] * one.vector, *a[1:])
        )
        torch.testing.assert_close(moved, states(lm.model)[3] - at[3], atol=1e-5, rtol=1e-5)
        hook.remove()


def test_a_gate_reads_its_place_before_it_is_steered(lm):
    one = direction(layer=2)
    value = states(lm.model)[2] @ one.unit
    gate = Gate(one, float(value.median()))
    with Steer(one, "ablate", gate=gate).apply(lm.model):
        found = states(lm.model)[2] @ one.unit
    expected = torch.where(value > gate.level, torch.zeros(()), value)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"num_beams": 2},
    ],
)
def test_a_gate_by_row_is_decided_by_each_prompt(lm, more):
    probe, one = direction(layer=1, seed=7), direction(layer=2)
    prompts = ["short", "a longer prompt", "Third!", "fourth one", "5 + 5 = "]
    ids = lm.encode(prompts)
    values = []
    for row in ids:
        hook = lm.layout.block(lm.model, 1).register_forward_pre_hook(
            lambda _, a: values.append(float(a[0][0, -1] @ probe.unit))
        )
        logits_of(lm, row)
        hook.remove()
    gate = Gate(probe, sorted(values)[2] - 1e-4, per="row")
    strengths = [3.0 if value > gate.level else None for value in values]
    assert strengths.count(None) == 2
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **more}
    with Steer(one, "add", 3.0, gate=gate).apply(lm.model):
        found = lm.generate(prompts, **settings)
    only = Steer(one, "add", strengths, scope="last_prompt_token") + Steer(
        one, "add", strengths, scope="generated"
    )
    with only.apply(lm.model):
        assert lm.generate(prompts, **settings) == found
    with Steer(one, "add", 3.0, gate=gate, scope="generated").apply(lm.model):
        later = lm.generate(prompts, **settings)
    with Steer(one, "add", strengths, scope="generated").apply(lm.model):
        assert lm.generate(prompts, **settings) == later


def test_what_a_gate_decided_goes_with_it(lm):
    gate = Gate(direction(layer=0), 0.0, per="row")
    with prompt_lengths([4]):
        with Steer(direction(layer=1), "add", gate=gate).apply(lm.model):
            lm.model(torch.tensor([[0, 40, 50, 60]]))
            assert len(prompts.PROMPT.get().decisions) == 1
        gc.collect()  # the next steering may come to the same address
        assert not prompts.PROMPT.get().decisions


@pytest.mark.parametrize("per", ["token", "row"])
def test_a_gate_that_reads_what_is_not_finite_says_so(per, lm):
    gate = Gate(direction(layer=1), 0.0, per=per)
    hook = lm.layout.block(lm.model, 0).register_forward_pre_hook(
        lambda _, args: (args[0] * torch.nan, *args[1:])
    )
    with (
        pytest.raises(InterventionError, match=r"layer 1, resid_pre .* not finite"),
        Steer(direction(layer=2), "add", gate=gate).apply(lm.model),
    ):
        lm.model(torch.tensor([[0, 40, 50]]))
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_reads_states_of_any_type(dtype):
    gate = Gate(direction(layer=1), 0.0)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    passing = gate.passes(hidden, torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(passing, hidden.double() @ gate.direction.unit.double() > 0)
