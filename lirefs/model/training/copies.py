"""Train copies of a model's weights, and put its own back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lirefs.errors import EditError
from lirefs.model.guest import as_guest
from lirefs.model.interrupts import undone
from lirefs.model.weight_swap import is_sharded

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def trained_weights(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters be trained or moved inside a `with` block; then restore data and gradients."""
    must_be_whole(parameters)
    before = [(parameter, parameter.data, parameter.grad) for parameter in parameters]

    def restore() -> None:
        for parameter, data, gradient in before:
            parameter.data, parameter.grad = data, gradient

    with undone() as steps:
        steps.append(restore)
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield


@contextmanager
def trainable(model: nn.Module, parameters: Sequence[nn.Parameter] | None = None) -> Iterator[None]:
    """Let parameters of a model (None: all) be trained on copies, in evaluation mode.

    Half-precision weights are copied to float32, since rounding would swallow a step of 1e-5; so
    are those that are not trained, for a forward pass needs one dtype. After the context the model
    holds its original tensors, gradients, flags and modes again.
    """
    every = list(model.parameters())
    chosen = {id(one) for one in (every if parameters is None else parameters)}
    widens = any(one.dtype in _HALF for one in every if id(one) in chosen)
    copied = [one for one in every if id(one) in chosen or (widens and one.dtype in _HALF)]
    with as_guest(model), trained_weights(copied):
        for one in copied:
            one.data = one.data.float() if one.dtype in _HALF else one.data.clone()
            one.requires_grad_(id(one) in chosen)
        yield


def must_be_whole(parameters: Iterable[nn.Parameter]) -> None:
    """Raise EditError if a parameter is sharded over processes."""
    if any(map(is_sharded, parameters)):
        raise EditError(
            "the weights are sharded over processes: factors can be collected and edits applied, "
            "but single weights cannot be trained or moved; load the model in one process"
        )
