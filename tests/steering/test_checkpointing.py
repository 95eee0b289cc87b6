"""Recomputation in the backward pass sees the steering of its own forward pass."""

import functools

import pytest
import torch
from steering_tools import direction
from tiny import fresh_model, tiny_tokenizer
from torch.utils.checkpoint import checkpoint

from lirefs import Gate, Schedule, Steer, prompt_lengths, wrap
from lirefs.errors import InterventionError, ScopeError
from lirefs.model.intervention import applied
from lirefs.steering import scope as scopes

A = {"input_ids": torch.tensor([[0, 40, 50, 60, 70, 80, 90]])}
B = {
    "input_ids": torch.tensor([[2, 2, 0, 33, 44, 55, 66]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]]),
}
WAYS = {
    "all, attn_out": {"sites": ["attn_out"]},
    "all, every site": {"sites": ["resid_pre", "attn_out", "mlp_out", "resid_post"]},
    "from_position, mlp_out": {"sites": ["mlp_out"], "scope": scopes.from_position(4)},
    "generated, attn_out": {"sites": ["attn_out"], "scope": "generated"},
    "rows": {"sites": ["attn_out"], "strength": [0.5]},
    "schedule": {"sites": ["mlp_out"], "strength": Schedule([1.0, 0.0, 2.0])},
    "token gate": {"sites": ["attn_out"], "gate": Gate(direction(0, seed=3), 0.0)},
    "row gate": {"sites": ["mlp_out"], "gate": Gate(direction(0, seed=3), 0.0, per="row")},
}
WHEN = ["inside", "after", "two batches", "after, under another steering", "turned on inside"]


def gradient(model, way, when, reentrant=None):
    """The gradient of two steered batches, or one; checkpointed unless `reentrant` is None."""
    lm = wrap(model, tiny_tokenizer())
    model.train().zero_grad()
    torch.manual_seed(0)  # for dropout
    steer = Steer(direction(1), "amplify", **{"strength": 3.0, **WAYS[way]})
    other = Steer(direction(1, seed=7), "add", 5.0, sites=["attn_out", "mlp_out"])
    enable = functools.partial(
        model.gradient_checkpointing_enable, {"use_reentrant": bool(reentrant)}
    )

    def loss(batch):
        with prompt_lengths([4]):
            return model(**batch, use_cache=False).logits.log_softmax(-1)[0, -1, 5]

    if reentrant is not None and when != "turned on inside":
        enable()
    try:
        with steer.apply(lm.model):
            if reentrant is not None and when == "turned on inside":
                enable()
            found = loss(A)
            if when == "two batches":
                found = found + loss(B)
            if "after" not in when:
                found.backward()
        if when == "after":
            found.backward()
        elif when == "after, under another steering":
            with other.apply(model):
                found.backward()
    finally:
        model.gradient_checkpointing_disable()
    model.eval()
    blocks = model.get_submodule(lm.layout.blocks)
    assert not [m for m in blocks.modules() if m._forward_hooks or m._forward_pre_hooks]
    for module in model.modules():
        kept = vars(module).get("_gradient_checkpointing_func")
        assert not type(kept).__module__.startswith("lirefs")
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_is_the_one_without_checkpoints(family, when):
    model = fresh_model(family)
    for way in WAYS:
        right = gradient(model, way, when)
        for reentrant in (False, True):
            found = gradient(model, way, when, reentrant)
            torch.testing.assert_close(found, right, msg=f"{way}, re-entrant: {reentrant}")


def test_the_gradient_under_a_composition():
    model = fresh_model("olmo2")
    wrap(model, tiny_tokenizer())
    both = Steer(direction(1), "add", 3.0, sites=["attn_out"], scope=scopes.from_position(2))
    both = both + Steer(direction(1, seed=4), "ablate", sites=["attn_out"])
    found = []
    for checkpoints in (False, True):
        model.train().zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with both.apply(model):
            loss = model(**A, use_cache=False).logits.log_softmax(-1)[0, -1, 5]
        loss.backward()
        found.append(model.model.layers[1].mlp.down_proj.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


class Recomputing(torch.nn.Module):
    """A block that checkpoints by itself."""

    def __init__(self, block, reentrant=False):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, *args, **kwargs):
        if self.reentrant:  # which takes no keywords
            run = functools.partial(self.block, **kwargs)
            return checkpoint(run, *args, use_reentrant=True)
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def test_checkpoints_of_the_callers_own_are_refused_where_tokens_matter():
    model = fresh_model("llama")
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Recomputing(block)
    lm = wrap(model, tiny_tokenizer())
    site = {"layers": [1], "sites": ["attn_out"]}
    layout = {"attention": "block.self_attn", "mlp": "block.mlp"}
    lm = wrap(model, tiny_tokenizer(), layout=layout)
    with Steer(direction(1), "add", scope="prompt", **site).apply(lm.model):
        loss = model(**A, use_cache=False).logits[0, -1, 5]
        with pytest.raises(ScopeError, match="gradient_checkpointing_enable"):
            loss.backward()
    grads = []
    for _ in range(2):
        model.zero_grad()
        with Steer(direction(1), "add", **site).apply(lm.model):  # acts on every token alike
            model(**A, use_cache=False).logits[0, -1, 5].backward()
        grads.append(model.lm_head.weight.grad.clone())
        for index, block in enumerate(model.model.layers):
            model.model.layers[index].forward = block.block.forward
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_checkpoints_of_the_callers_own_are_refused_after_the_steering(reentrant, scope):
    model = fresh_model("llama")
    layout = {"attention": "block.self_attn", "mlp": "block.mlp"}
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Recomputing(block, reentrant)
    lm = wrap(model, tiny_tokenizer(), layout=layout)
    steer = Steer(direction(1), "add", layers=[1], sites=["attn_out"], scope=scope)
    other = Steer(direction(1, seed=7), "add", 5.0, layers=[1], sites=["attn_out"])

    def loss():
        return model(**A, use_cache=False).logits[0, -1, 5]

    for around in (None, other):
        with steer.apply(lm.model):
            found = loss()
        with applied(around, lm.model), pytest.raises(InterventionError, match="call backward ins"):
            found.backward()
    with torch.no_grad(), steer.apply(lm.model):
        loss()
    loss().backward()  # not steered: nothing to refuse
    if scope == "all":
        with steer.apply(lm.model):
            loss().backward()
        model.zero_grad()
        with steer.apply(lm.model):
            found = loss()
        with steer.apply(lm.model), pytest.raises(InterventionError):
            found.backward()  # attached again: other hooks
    for block in model.model.layers:
        block.forward = block.block.forward
    with steer.apply(lm.model):
        found = loss()
    found.backward()
