import pytest
import torch
from tiny import FAMILIES, fresh_model, tiny_model, tiny_tokenizer
from torch import nn

from lirefs import Direction, compose, wrap
from lirefs.errors import InterventionError
from lirefs.intervention import Steer

IDS = torch.tensor([[0, 40, 50, 60, 70, 80]])


def direction(layer=1, site="resid_pre", width=32, seed=0):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, layer, site)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def states(model, n=4):
    """The input of every block, seen by hooks of our own."""
    seen = {}
    blocks = wrap(model, tiny_tokenizer()).layout
    hooks = [
        blocks.block(model, i).register_forward_pre_hook(
            lambda _, args, i=i: seen.__setitem__(i, args[0].clone())
        )
        for i in range(n)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


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
    with one.steer("ablate").apply(model):
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
        with one.steer(operator, strength).apply(model):
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
    with one.steer("amplify", -1.0).apply(lm.model):
        first = logits(lm.model)
    with one.steer("ablate").apply(lm.model):
        second = logits(lm.model)
    assert torch.equal(first, second)


@pytest.mark.parametrize("operator", ["add", "amplify"])
def test_zero_strength_changes_no_bit(lm, operator):
    clean = logits(lm.model)
    with direction().steer(operator, 0.0, layers="all").apply(lm.model):
        assert torch.equal(logits(lm.model), clean)


def test_all_layers_and_chosen_layers(lm):
    one = direction(layer=0)
    with one.steer("ablate", layers="all").apply(lm.model):
        assert sum(len(pre) for _, pre in hooks_of(lm.model).values()) == lm.n_layers
    with one.steer("ablate", layers=[3, 1]).apply(lm.model):
        names = [name for name, (_, pre) in hooks_of(lm.model).items() if pre]
    assert names == ["model.layers.1", "model.layers.3"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma2"])
def test_cached_generation_agrees_with_uncached_under_left_padding(family):
    lm = wrap(tiny_model(family), tiny_tokenizer())
    prompts = ["short", "a considerably longer prompt"]
    with direction(layer=2).steer("add", 2.0).apply(lm.model):
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
    steer = direction().steer("ablate", layers="all")
    with pytest.raises(RuntimeError), steer.apply(model):
        model(IDS.float() / 0)
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), clean)


def test_attach_returns_a_handle(lm):
    clean = logits(lm.model)
    handle = direction().steer("add").attach(lm.model)
    assert not torch.equal(logits(lm.model), clean)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(lm.model), clean)


def test_composition_is_in_order_and_flat(lm):
    one, two = direction(seed=1), direction(seed=2)
    both = one.steer("add") + two.steer("ablate")
    assert len(compose(both, one.steer("add")).members) == 3
    with both.apply(lm.model):
        assert (states(lm.model)[1] @ two.unit).abs().max() < 1e-5
    with (two.steer("ablate") + one.steer("add")).apply(lm.model):
        assert (states(lm.model)[1] @ two.unit).abs().max() > 1e-3


def test_a_failing_member_takes_the_others_off(lm):
    hooks = hooks_of(lm.model)
    with pytest.raises(InterventionError):
        (direction().steer("add") + direction(width=7).steer("add")).attach(lm.model)
    assert hooks_of(lm.model) == hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype):
    model = fresh_model("llama").to(dtype)
    one = direction(layer=1, site="resid_post")
    with one.steer("ablate").apply(model):
        state = states(model)[2]
    assert state.dtype == dtype
    scale = float(state.double().norm(dim=-1).max())
    unit = one.vector.double() / one.vector.double().norm()
    assert float((state.double() @ unit).abs().max()) < torch.finfo(dtype).eps * scale * 4


def test_zero_direction_does_nothing_harmful(lm):
    zero = Direction(torch.zeros(32), 1)
    for operator in ("add", "ablate", "amplify"):
        with zero.steer(operator).apply(lm.model):
            assert torch.isfinite(logits(lm.model)).all()


def test_named_errors(lm):
    for arguments in [("turn",), ("ablate", 0.5), ("add", float("nan")), ("add", 1.0, "some")]:
        with pytest.raises(InterventionError):
            direction().steer(*arguments)
    for wrong in [
        direction(width=8),
        direction(layer=4),
        Direction(torch.full((32,), torch.nan), 0),
    ]:
        with pytest.raises(InterventionError):
            wrong.steer("add").attach(lm.model)
    with pytest.raises(InterventionError, match=r"give lm\.model"):
        direction().steer("add").attach(lm)
    with pytest.raises(InterventionError, match="str is not an intervention"):
        compose("no")
    assert Steer(direction(), "add").describe()["directions"][0]["layer"] == 1


@pytest.mark.gpu
def test_steering_on_a_gpu_agrees_with_the_cpu():
    model = fresh_model("llama")
    with direction().steer("amplify", 0.5).apply(model):
        expected = logits(model)
    model.cuda()
    with direction().steer("amplify", 0.5).apply(model), torch.no_grad():
        found = model(IDS.cuda()).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_steering_needs_a_decoder():
    with pytest.raises(Exception, match="blocks"):
        direction().steer("add").attach(nn.Linear(2, 2))
