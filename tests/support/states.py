"""States of models that must not be taken for one another, each as a `with`."""

from __future__ import annotations

import contextlib

import peft
import torch
import transformers
from tiny import build, fresh_model, tiny_tokenizer

import kfac
import lirefs

TOKENIZER = tiny_tokenizer()


def lora(**settings):
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings
    )


def with_adapters():
    """A model with two adapters, the first of them active."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(fresh_model("llama"), lora(), adapter_name="one")
        model.add_adapter("two", lora())
    return lirefs.wrap(model.eval(), TOKENIZER)


def integrated():
    """A model with two adapters that transformers has added itself, the second of them active."""
    model = fresh_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("one", "two"):
            model.add_adapter(lora(), adapter_name=name)
    return lirefs.wrap(model.eval(), TOKENIZER)


def experts():
    """A model with a saved buffer that chooses among its experts."""
    config = transformers.DeepseekV3Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=1, first_k_dense_replace=1, n_group=1, topk_group=1,
        n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    return lirefs.wrap(build(config), TOKENIZER)


def direction(seed=0, layer=1):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return lirefs.Direction(vector * 3, layer)


@contextlib.contextmanager
def set_to(owner, name, value):
    """An attribute at another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextlib.contextmanager
def entry_of(mapping, key, value):
    """An entry of a mapping at another value."""
    before = mapping[key]
    mapping[key] = value
    yield
    mapping[key] = before


@contextlib.contextmanager
def added_to(tensor, amount):
    """A tensor changed in place."""
    with torch.no_grad():
        before = tensor.clone()
        tensor.add_(amount)
    yield
    with torch.no_grad():
        tensor.copy_(before)


@contextlib.contextmanager
def adapter(model, name, back):
    """Another adapter active."""
    model.set_adapter(name)
    yield
    model.set_adapter(back)


@contextlib.contextmanager
def disabled(model):
    """Adapters off, as transformers does it."""
    model.disable_adapters()
    yield
    model.enable_adapters()


@contextlib.contextmanager
def calling(act, undo):
    """What a call does, until another undoes it."""
    act()
    yield
    undo()


def weight_edit(model, keep=0.5):
    names = [one.name for one in kfac.find_targets(model, layers=[1])]
    return kfac.SVDEdit(names, keep)


def steerings():
    """Steerings of one model that differ in one thing each."""
    one, scope = direction(), lirefs.steering.scope
    steer = lirefs.Steer
    return {
        "steered": steer(one, "add", 1.0),
        "stronger": steer(one, "add", 2.0),
        "operator": steer(one, "norm_preserving_add", 1.0),
        "direction": steer(direction(1), "add", 1.0),
        "layer": steer(one, "add", 1.0, layers=[2]),
        "site": steer(one, "add", 1.0, sites=["resid_post"]),
        "scope": steer(one, "add", 1.0, scope="last_prompt_token"),
        "mask": steer(one, "add", 1.0, scope=scope.mask([True, False, True])),
        "mask elsewhere": steer(one, "add", 1.0, scope=scope.mask([True, True])),
        "gate": steer(one, "add", 1.0, gate=lirefs.Gate(direction(2, 0), 0.0)),
        "gate below": steer(one, "add", 1.0, gate=lirefs.Gate(direction(2, 0), 0.0, above=False)),
        "by layer": steer(one, "add", {1: 0.5}),
    }


def states_of(lm):
    """What can be changed on a plain model, by name; the first changes nothing."""
    model = lm.model
    block = model.model.layers[1]
    found = {
        "as it is": contextlib.nullcontext,
        "a weight": lambda: added_to(block.mlp.up_proj.weight, 0.1),
        "a norm": lambda: added_to(block.input_layernorm.weight, 0.5),
        "configuration": lambda: set_to(model.config, "rms_norm_eps", 7.0),
        "module setting": lambda: set_to(block.self_attn, "scaling", 0.01),
        "epsilon": lambda: set_to(block.input_layernorm, "variance_epsilon", 3.0),
        "rotary": lambda: added_to(model.model.rotary_emb.inv_freq, 0.3),
        "activation": lambda: set_to(block.mlp, "act_fn", torch.nn.ReLU()),
        "edit": lambda: weight_edit(model).apply(model),
        "other edit": lambda: weight_edit(model, 0.7).apply(model),
        "two": lambda: (steerings()["steered"] + weight_edit(model)).apply(model),
    }
    for name, one in steerings().items():
        found[name] = lambda one=one: one.apply(model)
    return found


def states_of_adapters(lm):
    """What can be changed on `with_adapters()`."""
    model = lm.model
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    return {
        "as it is": contextlib.nullcontext,
        "the other": lambda: adapter(model, "two", "one"),
        "off": model.disable_adapter,
        "scale": lambda: entry_of(layer.scaling, "one", 3.0),
        "its weight": lambda: added_to(layer.lora_A["one"].weight, 0.5),
        "below it": lambda: added_to(layer.base_layer.weight, 0.1),
        "steered": lambda: steerings()["steered"].apply(model),
        "merged": lambda: calling(model.merge_adapter, model.unmerge_adapter),  # last: it rounds
    }


def states_of_integrated(lm):
    """What can be changed on `integrated()`."""
    model = lm.model
    return {
        "as it is": contextlib.nullcontext,
        "the other": lambda: adapter(model, "one", "two"),
        "both": lambda: adapter(model, ["one", "two"], "two"),
        "off": lambda: disabled(model),
        "scale": lambda: entry_of(model.model.layers[0].self_attn.q_proj.scaling, "two", 0.1),
    }


def states_of_experts(lm):
    """What can be changed on `experts()`."""
    router = lm.model.model.layers[1].mlp.gate
    amount = torch.tensor([9.0, 0.0, 0.0, -9.0])
    return {
        "as it is": contextlib.nullcontext,
        "a buffer": lambda: added_to(router.e_score_correction_bias, amount),
        "the reverse": lambda: added_to(router.e_score_correction_bias, -amount),
    }


KINDS = {
    "plain": (lambda: lirefs.wrap(fresh_model("llama"), TOKENIZER), states_of),
    "adapters": (with_adapters, states_of_adapters),
    "integrated": (integrated, states_of_integrated),
    "experts": (experts, states_of_experts),
}
