"""Read and replace hidden states in the arguments and outputs of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lirefs.errors import LayoutError


def hidden_of(output: Any, batch: int | None = None) -> Tensor:
    """Return the hidden states in the output of a module.

    Args:
        output: A tensor, or a tuple or list that begins with one (Bloom, Falcon).
        batch: If given, a flattened ``(batch * tokens, width)`` is returned with three axes.

    Returns:
        ``(batch, tokens, width)``; a view, not a copy.

    Raises:
        LayoutError: The output neither is nor begins with a tensor.
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
    """Return the hidden states in the arguments of a module, ``(batch, tokens, width)``.

    Args:
        args: Positional arguments, from a forward pre-hook.
        kwargs: Keyword arguments; read only if there are no positional ones.

    Raises:
        LayoutError: Neither holds hidden states.
    """
    return hidden_of(args[0] if args else kwargs.get("hidden_states"))


def with_hidden_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with their hidden states replaced."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}
