import dataclasses
import json

import numpy as np
import pytest
import torch
from steering_tools import IDS, direction, logits, logits_of, states
from tiny import FAMILIES, fresh_model, tiny_model, tiny_tokenizer
from torch import nn

from lirefs import Direction, Directions, Gate, Schedule, Steer, compose, wrap
from lirefs.errors import InterventionError, LayoutError, SettingError


def hooks_of(model):
    return {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_ablate_leaves_no_component_at_the_next_block(family):
    model = wrap(tiny_model(family), tiny_tokenizer()).model
    one = direction(layer=1, site="resid_post")
    before = states(model)[2] @ one.unit
    with Steer(one, "ablate").apply(model):
        after = states(model)[2] @ one.unit
    assert before.abs().max() > 0.01
    assert after.abs().max() < 1e-5 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "falcon", "opt"])
def test_operators_do_what_their_formulas_say(family, site):
    model = wrap(tiny_model(family), tiny_tokenizer()).model
    one = direction(layer=2, site=site)
    clean = logits(model)
    amplified = {}
    for operator, strength in [("add", 0.7), ("amplify", 0.7), ("ablate", 1.0)]:
        with Steer(one, operator, strength).apply(model):
            amplified[operator] = logits(model)
        assert (amplified[operator] - clean).abs().max() > 1e-4
    if site == "resid_pre":  # reference: the change written out, without the library
        v, d = one.unit, one.vector
        formulas = {
            "add": lambda h: h + 0.7 * d,
            "amplify": lambda h: h + 0.7 * (h @ v)[..., None] * v,
            "ablate": lambda h: h - (h @ v)[..., None] * v,
        }
        block = wrap(model, tiny_tokenizer()).layout.block(model, 2)
        for operator, formula in formulas.items():
            hook = block.register_forward_pre_hook(lambda _, a, f=formula: (f(a[0]), *a[1:]))
            expected = logits(model)
            hook.remove()
            torch.testing.assert_close(amplified[operator], expected, atol=1e-5, rtol=1e-5)


def test_amplify_by_minus_one_is_ablate(lm):
    one = direction()
    with Steer(one, "amplify", -1.0).apply(lm.model):
        first = logits(lm.model)
    with Steer(one, "ablate").apply(lm.model):
        second = logits(lm.model)
    assert torch.equal(first, second)


@pytest.mark.parametrize("operator", ["add", "amplify"])
def test_zero_strength_changes_no_bit(lm, operator):
    clean = logits(lm.model)
    with Steer(direction(), operator, 0.0, layers="all").apply(lm.model):
        assert torch.equal(logits(lm.model), clean)


def test_all_layers_and_chosen_layers(lm):
    one = direction(layer=0)
    with Steer(one, "ablate", layers="all").apply(lm.model):
        names = [name for name, (_, pre) in hooks_of(lm.model).items() if "layers." in name and pre]
        assert len(names) == lm.n_layers
    with Steer(one, "ablate", layers=[3, 1]).apply(lm.model):
        names = [name for name, (_, pre) in hooks_of(lm.model).items() if "layers." in name and pre]
    assert names == ["model.layers.1", "model.layers.3"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma2"])
def test_cached_generation_agrees_with_uncached_under_left_padding(family):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    prompts = ["short", "a considerably longer prompt"]
    with Steer(direction(layer=2), "add", 2.0).apply(lm.model):
        cached = lm.generate(prompts, max_new_tokens=8, min_new_tokens=8)
        for prompt, text in zip(prompts, cached):
            ids = lm.encode([prompt])
            for _ in range(8):  # one row, no padding, no cache
                with torch.no_grad():
                    step = lm.model(torch.tensor(ids), use_cache=False).logits[0, -1].clone()
                step[lm.tokenizer.eos_token_id] = -torch.inf
                ids[0].append(int(step.argmax()))
            assert text == lm.tokenizer.decode(ids[0][-8:], skip_special_tokens=True)
    assert cached != lm.generate(prompts, max_new_tokens=8, min_new_tokens=8)


def test_everything_is_restored_after_an_exception():
    model = fresh_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clean, hooks = logits(model), hooks_of(model)
    steer = Steer(direction(), "ablate", layers="all")
    with pytest.raises(RuntimeError), steer.apply(model):
        model(IDS.float() / 0)
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), clean)


def test_attach_returns_a_handle(lm):
    clean = logits(lm.model)
    handle = Steer(direction(), "add").attach(lm.model)
    assert not torch.equal(logits(lm.model), clean)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(lm.model), clean)


def test_composition_is_in_order_and_flat(lm):
    one, two = direction(seed=1), direction(seed=2)
    both = Steer(one, "add") + Steer(two, "ablate")
    assert len(compose(both, Steer(one, "add")).members) == 3
    with both.apply(lm.model):
        assert (states(lm.model)[1] @ two.unit).abs().max() < 1e-5
    with (Steer(two, "ablate") + Steer(one, "add")).apply(lm.model):
        assert (states(lm.model)[1] @ two.unit).abs().max() > 1e-3


def test_a_failing_member_takes_the_others_off(lm):
    hooks = hooks_of(lm.model)
    with pytest.raises(InterventionError):
        (Steer(direction(), "add") + Steer(direction(width=7), "add")).attach(lm.model)
    assert hooks_of(lm.model) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype):
    model = fresh_model("llama").to(dtype)
    one = direction(layer=1, site="resid_post")
    with Steer(one, "ablate").apply(model):
        state = states(model)[2]
    assert state.dtype == dtype
    scale = float(state.double().norm(dim=-1).max())
    unit = one.vector.double() / one.vector.double().norm()
    assert float((state.double() @ unit).abs().max()) < torch.finfo(dtype).eps * scale * 4


def test_zero_direction_does_nothing_harmful(lm):
    zero = Direction(torch.zeros(32), 1)
    for operator in ("add", "ablate", "amplify"):
        with Steer(zero, operator).apply(lm.model):
            assert torch.isfinite(logits(lm.model)).all()


def test_named_errors(lm):
    for arguments in [("turn",), ("ablate", 0.5), ("add", float("nan"))]:
        with pytest.raises(InterventionError):
            Steer(direction(), *arguments)
    with pytest.raises(InterventionError, match="layers must be"):
        Steer(direction(), "add", layers="some")
    for wrong in [
        direction(width=8),
        direction(layer=4),
        Direction(torch.full((32,), torch.nan), 0),
    ]:
        with pytest.raises(InterventionError):
            Steer(wrong, "add").attach(lm.model)
    with pytest.raises(InterventionError, match=r"give lm\.model"):
        Steer(direction(), "add").attach(lm)
    with pytest.raises(InterventionError, match="must be an Intervention, got 'no'"):
        compose("no")
    assert Steer(direction(), "add").describe()["directions"][0]["layer"] == 1


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "gpt_neox", "falcon"])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_what_is_added_at_a_site_arrives_in_the_stream(family, site):
    # On post-norm models too: the site is what is added to the stream, behind the norm.
    model = wrap(tiny_model(family), tiny_tokenizer()).model
    one = direction(layer=3, site=site)
    before = last_output(model)
    with Steer(one, "add", 2.0).apply(model):
        after = last_output(model)
    moved = after - before
    if site == "mlp_out":
        torch.testing.assert_close(moved, (2 * one.vector).expand(moved.shape), atol=1e-4, rtol=0)
    else:  # the MLP answers to it as well
        assert float((moved @ one.unit).mean()) > 0


def last_output(model):
    seen = []
    block = wrap(model, tiny_tokenizer()).layout.block(model, 3)
    hook = block.register_forward_hook(
        lambda _, args, out: seen.append((out if isinstance(out, torch.Tensor) else out[0]).clone())
    )
    logits(model)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_composition_is_in_order_at_every_site(lm, site):
    one, two = direction(site=site, seed=1), direction(site=site, seed=2)
    module, side = lm.layout.module(lm.model, site, 1)
    seen = []

    def record(*given):
        found = given[2 if side == "output" else 1]
        seen.append((found[0] if isinstance(found, tuple) else found).clone())

    with (Steer(one, "add", 3.0) + Steer(two, "ablate")).apply(lm.model):
        hook = (
            module.register_forward_hook(record)
            if side == "output"
            else module.register_forward_pre_hook(record)
        )
        logits(lm.model)
        hook.remove()
    assert (seen[0] @ two.unit).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_a_batch_holds_differently_steered_rows(family, site):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    one = direction(layer=2, site=site)
    prompts = ["the same", "a rather longer text", "the same", "third"]
    strengths = [None, 1.5, -2.0, 0.0]
    with Steer(one, "add", strengths).apply(lm.model):
        together = lm.generate(prompts, max_new_tokens=6)
        beams = lm.generate(prompts, max_new_tokens=6, num_beams=2)
        with torch.no_grad():
            batch = lm.model(**lm.pad(lm.encode(prompts))).logits[:, -1]
    with Steer(one, "add", torch.tensor([0.0, 1.5, -2.0, 0.0])).apply(lm.model):
        assert lm.generate(prompts, max_new_tokens=6) == together
    for index, (prompt, strength) in enumerate(zip(prompts, strengths)):
        with Steer(one, "add", strength or 0.0).apply(lm.model), torch.no_grad():
            assert lm.generate(prompt, max_new_tokens=6) == together[index]
            assert lm.generate(prompt, max_new_tokens=6, num_beams=2) == beams[index]
            alone = lm.model(**lm.pad(lm.encode([prompt]))).logits[0, -1]
        torch.testing.assert_close(batch[index], alone, atol=1e-5, rtol=1e-5)
    with Steer(one, "clamp", [1.0, None]).apply(lm.model), pytest.raises(InterventionError):
        lm.generate(prompts[:3], max_new_tokens=1)


def test_strength_by_layer(lm):
    one = direction(layer=0)
    with Steer(one, "add", {0: 1.0, 2: -2.0}, layers=[0, 2]).apply(lm.model):
        found = logits(lm.model)
    steps = Steer(one, "add", 1.0, layers=[0]) + Steer(one, "add", -2.0, layers=[2])
    with steps.apply(lm.model):
        assert torch.equal(found, logits(lm.model))
    with pytest.raises(InterventionError, match="no strength for layer 1"):
        Steer(one, "add", {0: 1.0}, layers="all").attach(lm.model)


@pytest.mark.parametrize("more", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_a_schedule_steers_generated_tokens_in_turn(lm, more):
    one, values = direction(layer=1), [0.0, 3.0, -3.0]
    prompts = ["short", "a longer prompt"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **more}
    with Steer(one, "add", Schedule(values)).apply(lm.model):
        found = lm.generate(prompts, **settings)
    asked = []

    def function(index):
        asked.append(index)
        return values[index] if index < 3 else 0.0

    with Steer(one, "add", function).apply(lm.model):
        assert lm.generate(prompts, **settings) == found
    assert asked == sorted(set(asked))  # each index once, none before its turn
    if not more:
        for prompt, text in zip(prompts, found):
            ids = lm.encode([prompt])[0]
            length = len(ids)
            for _ in range(6):
                marks = torch.zeros(len(ids), 1)
                for age, value in enumerate(values):
                    marks[length + age : length + age + 1] = value
                hook = lm.layout.block(lm.model, 1).register_forward_pre_hook(
                    lambda _, a, marks=marks: (a[0] + marks * one.vector, *a[1:])
                )
                step = logits_of(lm, ids)
                hook.remove()
                step[lm.tokenizer.eos_token_id] = -torch.inf
                ids.append(int(step.argmax()))
            assert text == lm.tokenizer.decode(ids[length:], skip_special_tokens=True)


def test_more_named_errors(lm):
    one = direction()
    for wrong in [
        lambda: Steer(one, "add", []),
        lambda: Steer(one, "add", [1.0, float("inf")]),
        lambda: Steer(one, "add", torch.ones(2, 2)),
        lambda: Steer(one, "add", "strong"),
        lambda: Steer(one, "add", "1"),
        lambda: Steer(one, "add", {0: "1"}),
        lambda: Steer(one, "add", {1: float("nan")}),
        lambda: Steer(one, "add", {"a": 1.0}),
        lambda: Steer(one, "add", layers=[]),
        lambda: Steer(one, "add", sites=[]),
        lambda: Steer(one, "add", scope=["prompt"]),
        lambda: Steer(one, "ablate", [1.0, 2.0]),
        lambda: Steer(one, "add", Schedule([])),
        lambda: Steer(one, "add", gate=0.5),
        lambda: Gate(None, 0.5),
        lambda: Gate(one),
        lambda: Gate(one, float("nan")),
        lambda: Gate(one, 0.0, per="batch"),
        lambda: Steer(Directions({}), "add"),
        lambda: Steer(one, "add", gate=Gate(direction(layer=3), 0.0)).attach(lm.model),
        lambda: Steer(one, "add", gate=Gate(direction(width=8), 0.0)).attach(lm.model),
        lambda: Steer(one, "add", gate=Gate(direction(site="mlp_out"), 0.0)).attach(lm.model),
    ]:
        with pytest.raises(InterventionError):
            wrong()
    for layers in (3, ["1"]):
        with pytest.raises(SettingError, match="list of integers"):
            Steer(one, "add", layers=layers)
    assert Steer(one, "add", layers=np.array([2, 1])).layers == [1, 2]
    with pytest.raises(SettingError, match="site must be"):
        Steer(direction(site="resid_mid"), "add").attach(lm.model)
    layout = dataclasses.replace(lm.layout, attention=(None,) * lm.n_layers)
    with pytest.raises(LayoutError, match="attn_out is not available"):
        layout.module(lm.model, "attn_out", 0)


def test_operators_come_in_the_order_of_the_forward_pass(lm):
    sites = ("resid_post", "mlp_out", "resid_pre", "attn_out")
    found = Steer(direction(2), "add", 1.0, layers=[3, 1], sites=sites).operators(lm.layout)
    order = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    assert [one[:2] for one in found] == [(layer, site) for layer in (1, 3) for site in order]
    assert Steer(direction(2), "add", 0.0).operators(lm.layout) == []
    assert len(Steer(direction(2), "ablate").operators(lm.layout)) == 1


def test_a_steering_says_what_it_does():
    assert str(Steer(direction(2), "ablate")) == "ablate at layers [2], scope 'all'"
    assert repr(Schedule([1.0, 0.5])) == "Schedule([1.0, 0.5])"
    assert repr(Schedule([1.0, 2.0, 3.0, 4.0, 5.0])) == "Schedule([1.0, 2.0, 3.0, 4.0, ...])"


def test_describe_is_json(lm):
    gate = Gate(direction(), 0.5, per="row")
    for strength in (1.0, {1: 2.0}, [1.0, None], Schedule([1.0]), lambda index: 1.0):
        steer = Steer(direction(layer=1), "add", strength, scope="generated", gate=gate)
        assert json.loads(json.dumps(steer.describe()))["scope"] == {"name": "generated"}


def test_hooks_are_gone_after_every_kind_of_steering(lm):
    hooks = hooks_of(lm.model)
    gate = Gate(direction(layer=0), 0.0)
    steer = Steer(direction(layer=1), "add", [1.0, 2.0, 3.0], scope="generated", gate=gate)
    with pytest.raises(InterventionError), steer.apply(lm.model):
        lm.generate(["a", "b"])
    assert hooks_of(lm.model) == hooks
    assert "generate" not in vars(lm.model)


@pytest.mark.gpu
def test_steering_on_a_gpu_agrees_with_the_cpu():
    model = fresh_model("llama")
    with Steer(direction(), "amplify", 0.5).apply(model):
        expected = logits(model)
    model.cuda()
    with Steer(direction(), "amplify", 0.5).apply(model), torch.no_grad():
        found = model(IDS.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_steering_needs_a_decoder():
    with pytest.raises(Exception, match="blocks"):
        Steer(direction(), "add").attach(nn.Linear(2, 2))
