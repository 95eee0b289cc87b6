"""Compiled models are steered, and keep nothing of it; so are hooks that read them."""

import copy
import gc

import pytest
import torch
from steering_tools import IDS, direction
from tiny import fresh_model, tiny_tokenizer
from transformers import CompileConfig

import kfac
from lirefs import Steer, bake, capture, wrap
from lirefs.model.guest import eagerly, start_eager
from lirefs.steering import scope as scopes


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def whole(model):
    model.compile(backend="eager")
    return model


def blocks(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def one_part(model):
    model.model.layers[1].mlp.compile(backend="eager")
    model.model.layers[1].self_attn.compile(backend="eager")
    return model


def owner(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def wrapper(model):
    return torch.compile(model, backend="eager")


def step(model):
    """A compiled function of the caller's own around the model."""
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend="eager")


HOW = {f.__name__: f for f in (whole, blocks, one_part, owner, forward, wrapper, step)}
STEER = {
    "all": {"sites": ["resid_pre", "mlp_out"]},
    "generated": {"sites": ["attn_out"], "scope": scopes.from_position(3)},
}


def logits(call):
    with torch.no_grad():
        return call(IDS, use_cache=False).logits


@pytest.mark.parametrize("order", ["before", "before, with a run", "inside"])
@pytest.mark.parametrize("how", HOW)
def test_compiled_in_any_order(how, order):
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    plain = logits(model)
    for settings in STEER.values():
        steer = Steer(direction(1), "add", 3.0, **settings)
        with steer.apply(model):
            wanted = logits(model)
        assert not torch.allclose(wanted, plain)
        other = copy.deepcopy(model)
        call = None if order == "inside" else HOW[how](other)
        if order == "before, with a run":
            assert torch.allclose(logits(call), plain)
        if how == "owner" and call is None:
            continue  # puts a module around those that are steered, after the steering
        with steer.apply(other):
            call = HOW[how](other) if call is None else call
            torch.testing.assert_close(logits(call), wanted)
        torch.testing.assert_close(logits(call), plain)
        torch.testing.assert_close(logits(call), plain)
        left = [n for n, m in other.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not left


@pytest.mark.parametrize("scope", ["all", "generated"])
@pytest.mark.parametrize("order", ["compiled plain", "compiled steered", "in turns"])
def test_a_static_cache_that_compiles_inside_generate(order, scope):
    model = fresh_model("llama")
    wrap(model, tiny_tokenizer())
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    static = {"cache_implementation": "static", "compile_config": config}
    steer = Steer(direction(1), "add", 3.0, scope=scope)

    def run(**more):
        return model.generate(IDS, **settings, **more)[0].tolist()

    plain = run()
    with steer.apply(model):
        wanted = run()
    assert plain != wanted
    for turn in {"compiled plain": "ps", "compiled steered": "sp", "in turns": "spsp"}[order]:
        if turn == "p":
            assert run(**static) == plain
        else:
            with steer.apply(model):
                assert run(**static) == wanted
    for left in ("generate", "get_compiled_call", "__call__"):
        assert left not in vars(model)


def test_a_compiled_wrapper_as_the_model_itself():
    plain = wrap(fresh_model("llama"), tiny_tokenizer())
    lm = wrap(torch.compile(plain.model, backend="eager"), tiny_tokenizer())
    assert lm.layout.blocks == "_orig_mod.model.layers"
    prompts = ["abc", "a longer one"]
    for scope in ("all", "generated", "last_prompt_token"):
        steer = Steer(direction(1), "add", 3.0, scope=scope)
        found = []
        for one in (plain, lm, plain):
            with steer.apply(one.model):
                found.append(one.generate(prompts, max_new_tokens=4))
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("how", ["whole", "blocks", "forward", "wrapper"])
def test_what_reads_a_model_reads_a_compiled_one(how):
    model = fresh_model("llama")
    lm = wrap(model, tiny_tokenizer())
    prompts = ["abc", "a longer one"]
    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    states = capture(lm, prompts, sites=sites, progress=False).values
    factors = kfac.collect(lm, prompts, layers=[1], progress=False)
    compiled = HOW[how](copy.deepcopy(model))
    logits(compiled)
    lm = wrap(compiled, tiny_tokenizer())
    torch.testing.assert_close(capture(lm, prompts, sites=sites, progress=False).values, states)
    again = kfac.collect(lm, prompts, layers=[1], progress=False)
    for name, other in zip(factors.names, again.names, strict=True):
        torch.testing.assert_close(again.A(other), factors.A(name))
        torch.testing.assert_close(again.G(other), factors.G(name))


def test_a_steered_model_that_is_dropped_leaves_the_process_as_it_was():
    model = fresh_model("llama")
    Steer(direction(), "add").attach(model)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del model
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_the_stance_of_the_caller_comes_back():
    def now():
        return torch._dynamo.eval_frame._stance.stance

    with torch.compiler.set_stance("eager_on_recompile"):
        first, second = start_eager(), start_eager()
        assert now() == "force_eager"
        first()
        first()
        assert now() == "force_eager"
        second()
        assert now() == "eager_on_recompile"
    with pytest.raises(KeyError), eagerly():
        raise KeyError
    assert now() == "default"


def test_a_baked_copy_runs_compiled_and_takes_other_strengths_without_a_new_graph():
    model = fresh_model("llama")

    def steer(strength):
        return Steer(direction(1), "add", strength)

    baked = bake(steer(1.0), model)
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(graph) or graph(*args)

    compiled = torch.compile(baked, backend=backend)
    for strength in (1.0, 3.0, -2.0):
        baked.load_state_dict(bake(steer(strength), model).state_dict())
        with steer(strength).apply(model):
            wanted = logits(model)
        torch.testing.assert_close(logits(compiled), wanted)
    assert len(ran) == 3
    assert all(graph is ran[0] for graph in ran)
