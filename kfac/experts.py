"""Mixtures of experts that are stored as stacked parameters, run expert by expert.

transformers keeps the experts of a block as parameters of shape (experts, ., .) and multiplies them
in one call, so no hook on a module sees one expert's rows. While factors are collected, the forward
pass of such a module is replaced by the same computation in a loop that reports the input and the
output of every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import TargetError

# Called as observe(parameter name, expert, its input rows, its output rows, positions of the rows);
# returns the output to go on with.
Observe = Callable[[str, int, Tensor, Tensor, Tensor], Tensor]

_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")


def stacked(module: nn.Module) -> list[str]:
    """Return the names of the expert stacks that a module holds itself."""
    held = {name: module._parameters.get(name) for name in _STACKS}
    return [name for name, stack in held.items() if stack is not None and stack.ndim == 3]


def check_stack(name: str, module: nn.Module) -> None:
    """Verify that the module computes its experts in the way of transformers' interface.

    Raises:
        TargetError: It does not, or its experts are spread over processes.
    """
    if missing := [attribute for attribute in _INTERFACE if not hasattr(module, attribute)]:
        raise TargetError(
            f"module {name!r} ({type(module).__name__}) holds stacked experts, but does not follow "
            f"the experts interface of transformers (it lacks {missing}), so what one expert reads "
            "and writes is unknown"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise TargetError(
            f"module {name!r}: its experts are sharded over processes (expert parallelism); load "
            "the model without it"
        )


@contextmanager
def observed(module: nn.Module, observe: Observe) -> Iterator[None]:
    """Run a module's experts one by one inside the context, and show each to `observe`."""
    own = module.__dict__.get("forward")
    # Assigned on the instance: the class, and other models that use it, stay as they are.
    module.forward = partial(_forward, module, observe)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _forward(
    module: Any, observe: Observe, hidden: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Compute what transformers' experts compute.

    Args:
        module: Holds the stacks.
        observe: Sees every matrix product.
        hidden: Shape (positions, width).
        experts: Chosen experts of each position, shape (positions, chosen).
        weights: Their routing weights, shape (positions, chosen).
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate = module._apply_gate if module.has_gate else module.act_fn
    result = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    for expert in range(module.num_experts):
        positions, slots = torch.where(experts == expert)
        if not len(positions):
            continue
        rows = hidden[positions]
        inner = gate(observe(first, expert, rows, _product(module, first, expert, rows), positions))
        outer = _product(module, "down_proj", expert, inner)
        outer = observe("down_proj", expert, inner, outer, positions)
        if getattr(module, "has_post_expert_norm", False):
            outer = module.post_expert_norm(outer)
        result = result.index_add(
            0, positions, (outer * weights[positions, slots, None]).to(result.dtype)
        )
    return result.to(hidden.dtype)


def _product(module: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, name + "_bias")[expert] if module.has_bias else None
    return nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)
