"""A small comparison for the tests of interrupted and shared runs."""

from __future__ import annotations

import torch

from lirefs import Direction, MultipleChoice, ShortAnswer, Steer


def variants():
    one = Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), 2)
    return {"weak": Steer(one, "add", 1.0), "strong": Steer(one, "add", 20.0)}


def tasks():
    choices = [(str(i), f"q{i}" * (1 + i % 5), [" a", " b"], 0) for i in range(30)]
    questions = [(str(i), f"what {i}", ["x"]) for i in range(20)]
    return [MultipleChoice("choose", choices), ShortAnswer("answer", questions)]


def hooks(lm):
    """Number of hooks on the model; other tests may have left some."""
    modules = list(lm.model.modules())
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules)
