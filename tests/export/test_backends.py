"""One direction, one operator, three runtimes: the same logits and the same text."""

import copy
import dataclasses
import warnings

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import Direction, Steer, capture, wrap
from lirefs.errors import BackendError, CaptureError, InterventionError, ProvenanceError
from lirefs.export import nnsight as sight
from lirefs.export import transformer_lens as lens
from lirefs.export.operators import operators
from lirefs.model.intervention import applied
from lirefs.steering.scope import generated

PROMPTS = ["Q: how many\nA: ", "a text of some length"]


@pytest.fixture(scope="module", params=["llama", "olmo2", "gpt2", "gemma2"])
def runtimes(request):
    lm = wrap(fresh_model(request.param), tiny_tokenizer(), name=f"tiny-{request.param}")
    before = copy.deepcopy(lm.model.state_dict())
    return lm, lens.boot(lm), sight.wrap(lm), before


def direction(layer=2, site="resid_pre", scale=3.0):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    return Direction(scale * vector / vector.norm(), layer, site)


STEERS = [
    Steer(direction(), "add", 1.5),
    Steer(direction(), "ablate", layers="all"),
    Steer(direction(site="resid_post"), "amplify", 2.0, layers=[1, 3]),
    Steer(direction(site="attn_out"), "clamp", 4.0),
    Steer(direction(site="mlp_out"), "norm_preserving_add", 1.0),
    Steer(direction(), "ablate_then_add", 1.0, layers=[0, 2]),
]


def generate_on_nnsight(model, lm, tokens, steer, n=5):
    """Token ids of greedy generation with a steering in every step, prompt included."""
    with torch.no_grad(), warnings.catch_warnings():
        # The open loop ends with the last step, which nnsight warns of every time.
        warnings.filterwarnings("ignore", message=".*was never reached")
        with model.generate(max_new_tokens=n, do_sample=False) as tracer:
            with tracer.invoke(tokens):
                if steer is not None:
                    for _ in tracer.iter[:]:
                        sight.steer_here(steer, model, lm)
            with tracer.invoke():
                result = tracer.result.save()
    return torch.as_tensor(result)


@pytest.mark.parametrize("steer", [None, *STEERS], ids=lambda s: s and s.operator)
def test_three_runtimes_agree(runtimes, steer):
    lm, bridge, model, _ = runtimes
    hooks = [] if steer is None else lens.hooks(steer, bridge, lm)
    for ids in lm.encode(PROMPTS):
        tokens = torch.tensor([ids])
        with torch.no_grad(), applied(steer, lm.model):
            ours = lm.model(tokens).logits
            text = lm.model.generate(tokens, max_new_tokens=5, do_sample=False)
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            theirs = bridge(tokens, return_type="logits")
            continued = bridge.generate(
                tokens,
                max_new_tokens=5,
                do_sample=False,
                use_past_kv_cache=True,
                return_type="tokens",
                verbose=False,
            )
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        assert continued.tolist() == text.tolist()
        seen = sight.logits(model, lm, tokens, steer)
        torch.testing.assert_close(seen, ours, atol=1e-4, rtol=0)
        traced = generate_on_nnsight(model, lm, tokens, steer)
        assert traced.tolist() == text.tolist()


def test_steering_moves_the_logits(runtimes):
    lm, _, model, _ = runtimes
    tokens = torch.tensor(lm.encode(PROMPTS[:1]))
    plain = sight.logits(model, lm, tokens)
    for steer in STEERS:
        assert (sight.logits(model, lm, tokens, steer) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_transformer_lens_sees_the_same_states(runtimes, site):
    lm, bridge, _, _ = runtimes
    ours = capture(lm, PROMPTS, sites=[site], progress=False)
    theirs = lens.capture(bridge, lm, PROMPTS, site=site)
    assert theirs.places == ours.places
    torch.testing.assert_close(theirs.values, ours.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steer", STEERS, ids=lambda s: s.operator)
def test_three_runtimes_agree_on_a_padded_batch(runtimes, steer):
    lm, bridge, model, _ = runtimes
    batch = lm.pad(lm.encode(PROMPTS))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad(), steer.apply(lm.model):
        ours = lm.model(**batch).logits[mask == 1]
    with torch.no_grad(), bridge.hooks(fwd_hooks=lens.hooks(steer, bridge, lm)):
        theirs = bridge(ids, attention_mask=mask, return_type="logits")[mask == 1]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    traced = sight.logits(model, lm, batch, steer)[mask == 1]
    torch.testing.assert_close(traced, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_nnsight_steers_modules_that_flatten_the_batch(site):
    lm = wrap(fresh_model("opt"), tiny_tokenizer())
    batch, steer = lm.pad(lm.encode(PROMPTS)), Steer(direction(site=site), "ablate_then_add", 2.0)
    with torch.no_grad(), steer.apply(lm.model):
        ours = lm.model(**batch).logits
    theirs = sight.logits(sight.wrap(lm), lm, batch, steer)
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(theirs[real], ours[real], atol=1e-4, rtol=0)


def test_states_that_are_not_finite_are_refused():
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(CaptureError, match="first at prompt 0, layer 2"):
        lens.capture(lens.boot(lm), lm, PROMPTS)


def test_a_steered_model_is_not_booted():
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    with (
        Steer(direction(), "add").apply(lm.model),
        pytest.raises(BackendError, match="add 1 at lay"),
    ):
        lens.boot(lm)


def test_the_users_model_is_left_as_it_was(runtimes):
    lm, _, _, before = runtimes
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("Bridge" in type(module).__name__ for module in lm.model.modules())
    for module in lm.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_cache_of_a_padded_batch(runtimes):
    lm, bridge, _, _ = runtimes
    batch = lm.pad(lm.encode(PROMPTS))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            names_filter=["blocks.1.hook_out"],
        )
    states = lens.from_cache(cache, bridge, layers=[1], site="resid_post")
    expected = capture(lm, PROMPTS, layers=[1], sites=["resid_post"], progress=False)
    torch.testing.assert_close(states.values, expected.values, atol=1e-4, rtol=1e-4)
    with pytest.raises(CaptureError, match=r"blocks\.2\.hook_in"):
        lens.from_cache(cache, bridge, layers=[2])


def test_what_cannot_be_carried_over_is_refused(lm):
    one = direction()
    for steer in (
        Steer(one, "add", scope=generated()),
        Steer(one, "add", [1.0, None]),
    ):
        with pytest.raises(BackendError):
            operators(steer, lm)
    with pytest.raises(InterventionError, match="layer 9"):
        operators(Steer(one, "add", layers=[9]), lm)
    with pytest.raises(ProvenanceError, match="another model"):
        operators(Steer(dataclasses.replace(one, model="f" * 64), "add"), lm)
    assert operators(Steer(one, "add", 0.0), lm) == []


def test_no_prompts_is_an_error(runtimes):
    lm, bridge, _, _ = runtimes
    with pytest.raises(CaptureError, match="no prompts"):
        lens.capture(bridge, lm, [])
