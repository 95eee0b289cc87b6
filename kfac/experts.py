"""Mixtures of experts that are stored as stacked parameters, run one expert at a time.

transformers keeps the experts of a block as parameters of shape (experts, ., .) and multiplies them
in one call, so no module hook sees one expert's rows. While factors are collected, the forward pass
of such a module is replaced by the same computation in a loop that reports every expert's input and
output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import TargetError

Observe = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""An expert, as "up_proj[3]", its input rows, output rows and positions to the output to use."""

_STACKS = ("gate_up_proj", "up_proj", "down_proj")
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")


def stacked_experts(module: nn.Module) -> list[str]:
    """Return the names of the expert stacks that a module holds itself."""
    held = {name: module._parameters.get(name) for name in _STACKS}
    return [name for name, stack in held.items() if stack is not None and stack.ndim == 3]


def check_expert_stack(name: str, module: nn.Module) -> None:
    """Raise TargetError unless a module follows the experts interface, in one process."""
    if missing := [attribute for attribute in _INTERFACE if not hasattr(module, attribute)]:
        raise TargetError(
            f"module {name!r} ({type(module).__name__}) holds stacked experts, but does not follow "
            f"the experts interface of transformers (it lacks {missing}), so the input and output "
            "of one expert are unknown"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise TargetError(
            f"module {name!r}: its experts are sharded over processes (expert parallelism); load "
            "the model without it"
        )


def observe_experts(module: nn.Module, observe: Observe) -> Callable[[], None]:
    """Run a module's experts one by one, and call `observe` with each, until the result is called.

    Interrupts must be held, here and then.
    """
    own = module.__dict__.get("forward")
    # Assigned on the instance, so the class and other models that use it do not change.
    module.forward = partial(_forward, module, observe)

    def end() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    return end


def _forward(
    module: Any, observe: Observe, hidden: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Compute what the experts of transformers compute, and observe every matrix product.

    `hidden` is (positions, width); `experts` and router `weights` are (positions, chosen).
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate = module._apply_gate if module.has_gate else module.act_fn
    result = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, weights.dtype))
    for expert in range(module.num_experts):
        positions, slots = torch.where(experts == expert)
        if not len(positions):
            continue
        rows = hidden[positions]
        inner = _product(module, first, expert, rows)
        inner = gate(observe(f"{first}[{expert}]", rows, inner, positions))
        outer = _product(module, "down_proj", expert, inner)
        outer = observe(f"down_proj[{expert}]", inner, outer, positions)
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
