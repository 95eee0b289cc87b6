"""Directions, states and questions for the tests of steering."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from tiny import tiny_tokenizer

from lirefs import Direction, Question, Questions, wrap

IDS = torch.tensor([[0, 40, 50, 60, 70, 80]])


def direction(layer=1, site="resid_pre", width=32, seed=0):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, layer, site)


def logits(model, **kwargs):
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def logits_of(lm, ids):
    with torch.no_grad():
        return lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].clone()


def states(model, n=4):
    """The input of every block, recorded by independent hooks."""
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


def split(n=24, seed=0):
    """Memory questions are digits and reasoning questions letters, which a tiny model can tell."""
    generator = np.random.default_rng(seed)
    items = [
        Question(
            "".join(generator.choice(list("0123456789" if label == "memory" else "abcdefgh"), 8))
            + f"{'.' * i}",
            label,
            f"{label}-{i}",
        )
        for label in ("memory", "reasoning")
        for i in range(n)
    ]
    return Questions(items).split(seed=0)


@contextmanager
def touched(lm, layer):
    """The tokens of each forward pass that a steering changes at the input of a block."""
    marks, before, after = [], [], []
    previous = lm.layout.block(lm.model, layer - 1).register_forward_hook(
        lambda _, args, out: before.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    block = lm.layout.block(lm.model, layer).register_forward_pre_hook(
        lambda _, args, kwargs: after.append(
            (args[0] if args else kwargs["hidden_states"]).clone()
        ),
        with_kwargs=True,
    )
    try:
        yield marks
    finally:
        previous.remove()
        block.remove()
        for one, other in zip(before, after, strict=True):
            marks.append((one - other).abs().amax(dim=-1).gt(1e-3).int().tolist())
