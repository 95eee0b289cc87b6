"""Read and replace hidden states in the arguments and outputs of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lirefs.errors import LayoutError


def hidden_of(output: Any, batch: int | None = None) -> Tensor:
    """Return the hidden states in the output of a module, a view; LayoutError if there are none.

    With ``batch``, a flattened ``(batch * tokens, width)`` becomes ``(batch, tokens, width)``.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise LayoutError(f"expected a tensor of hidden states, found {type(hidden).__name__}")
    if batch is not None and hidden.dim() == 2:
        return hidden.view(batch, -1, hidden.shape[-1])
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` with its hidden states replaced; shape and container stay the same."""
    shaped = hidden.reshape(hidden_of(output).shape)
    return type(output)([shaped, *output[1:]]) if isinstance(output, tuple | list) else shaped


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states in the arguments that a forward pre-hook gets."""
    return hidden_of(args[0] if args else kwargs.get("hidden_states"))


def with_hidden_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with their hidden states replaced."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}
