"""Hidden states in what a module takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lirefs.errors import LayoutError


def hidden_of(output: Any, batch: int | None = None) -> Tensor:
    """Return the hidden states in what a module returned.

    Args:
        output: A tensor, or a tuple or list that begins with one (Bloom, Falcon).
        batch: Where given, a flattened ``(batch * tokens, width)`` is returned with three axes.

    Returns:
        ``(batch, tokens, width)``; a view, not a copy.

    Raises:
        LayoutError: There is no tensor where one is expected.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise LayoutError(f"expected a tensor of hidden states, found {type(hidden).__name__}")
    if batch is not None and hidden.dim() == 2:
        return hidden.view(batch, -1, hidden.shape[-1])
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` rebuilt around ``hidden``, in the shape and the container it came in."""
    shaped = hidden.reshape(hidden_of(output).shape)
    if isinstance(output, tuple | list):
        return type(output)([shaped, *output[1:]])
    return shaped


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states with which a module was called, ``(batch, tokens, width)``.

    Args:
        args: Positional arguments, from a forward pre-hook.
        kwargs: Keyword arguments; read only where there are no positional ones.

    Raises:
        LayoutError: Neither holds hidden states.
    """
    return hidden_of(args[0] if args else kwargs.get("hidden_states"))


def with_hidden_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with ``hidden`` in the place of its hidden states."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}
