"""Hooks on the modules of a model that change hidden states, one after the other."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lirefs.model.hidden_states import hidden_input, hidden_of, with_hidden, with_hidden_input
from lirefs.model.layout import Side

Change = Callable[[Tensor], Tensor]

_CHAINS: weakref.WeakKeyDictionary[nn.Module, dict[Side, _Chain]] = weakref.WeakKeyDictionary()


class _Chain:
    # With a hook for each change, those at an output would run in reverse: hooks are prepended
    # there, so that hooks which record the output see what is steered.

    def __init__(self, module: nn.Module, side: Side) -> None:
        self.changes: list[Change] = []
        self.hook = (
            module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            if side == "input"
            else module.register_forward_hook(self._on_output, prepend=True)
        )

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_input(args, kwargs)
        for change in self.changes:
            hidden = change(hidden)
        return with_hidden_input(args, kwargs, hidden)

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = hidden_of(output)
        for change in self.changes:
            hidden = change(hidden)
        return with_hidden(output, hidden)


def chain_hook_at(module: nn.Module, side: Side, change: Change) -> Callable[[], None]:
    """Let `change` act on hidden states after those already there, until the result is called."""
    chains = _CHAINS.setdefault(module, {})
    if side not in chains:
        chains[side] = _Chain(module, side)
    chain = chains[side]
    chain.changes.append(change)

    def remove() -> None:
        if change in chain.changes:
            chain.changes.remove(change)
        if not chain.changes and chains.get(side) is chain:
            chain.hook.remove()
            del chains[side]

    return remove
