"""Hooks on the modules of a model that change hidden states, one after the other."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any, NoReturn, SupportsIndex, TypeAlias

from torch import Tensor, nn

from lirefs.errors import InterventionError
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.layout import Side
from lirefs.model.observe import hidden_input, hidden_of, with_hidden, with_hidden_input
from lirefs.model.traits import PROBING

WITH_GRADIENTS: ContextVar[bool] = ContextVar("with_gradients", default=False)
"""Whether the forward pass under way began with gradients enabled."""
Change = Callable[[Tensor], Tensor]
Place: TypeAlias = tuple[nn.Module, Side]


class NotCopied:
    """Owner of a hook: whatever holds the hook cannot be copied or pickled with it.

    A copy would keep the hooks for good, and what they share with the original.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Raise InterventionError: a steered model was to be copied."""
    raise InterventionError(
        "a steered model cannot be copied or pickled, as the copy would stay steered for good; "
        "remove the steering first (leave the `with`, or call the handle's remove)"
    )


class _Chain(NotCopied):
    # With a hook for each change, those at an output would run in reverse: hooks are prepended
    # there, so that hooks which record the output see what is steered.

    def __init__(self, module: nn.Module, side: Side) -> None:
        self.changes: tuple[Change, ...] = ()
        self.ran = False
        self.runs_again = False  # in a checkpoint of the caller's own
        self.hook = (
            module.register_forward_pre_hook(self._on_input, with_kwargs=True)
            if side == "input"
            else module.register_forward_hook(self._on_output, prepend=True)
        )

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if PROBING.get():
            return None
        self._note()
        hidden = hidden_input(args, kwargs)
        for change in self.changes:
            hidden = change(hidden)
        return with_hidden_input(args, kwargs, hidden)

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if PROBING.get():
            return None
        self._note()
        hidden = hidden_of(output)
        for change in self.changes:
            hidden = change(hidden)
        return with_hidden(output, hidden)

    def _note(self) -> None:
        self.ran = True
        self.runs_again = WITH_GRADIENTS.get() and _in_checkpoint()


def _in_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` runs this part of the model, other than through our own.

    Not by the hooks that it sets for saved tensors: re-entrant ones have none.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__")
        if name in ("torch.utils.checkpoint", "lirefs.steering.recompute"):
            return bool(name == "torch.utils.checkpoint")
        frame = frame.f_back
    return False


_CHAINS: weakref.WeakKeyDictionary[nn.Module, dict[Side, _Chain]] = weakref.WeakKeyDictionary()


def chain_hook_at(module: nn.Module, side: Side, change: Change) -> Callable[[], None]:
    """Let `change` act on hidden states after those already there, until the result is called.

    Args:
        module: A module of the model, as `layout.module(model, site, layer)` gives it.
        side: Whether the states are its `"input"` or its `"output"`; the same call gives it.
        change: From hidden states, (batch, tokens, width), to new ones of the same shape and dtype.
    """
    _set((module, side), (*_changes(module, side), change))
    _CHAINS[module][side].ran = False

    def remove() -> None:
        rest = [one for one in _changes(module, side) if one is not change]
        _set((module, side), tuple(rest))

    return remove


def has_run(place: Place) -> bool:
    """Whether the hook at a place has run since the last change was chained there."""
    chain = _CHAINS.get(place[0], {}).get(place[1])
    return chain is None or chain.ran


def runs_again(owner: nn.Module) -> bool:
    """Whether a checkpoint of the caller's own will run a place inside a module once more."""
    chains = (_CHAINS.get(module, {}).values() for module in owner.modules())
    return any(chain.runs_again for each in chains for chain in each)


def chained(owner: nn.Module) -> dict[Place, tuple[Change, ...]]:
    """The changes at each place inside a module."""
    return {
        (module, side): chain.changes
        for module in owner.modules()
        for side, chain in _CHAINS.get(module, {}).items()
    }


@contextmanager
def rechained(owner: nn.Module, wanted: dict[Place, tuple[Change, ...]]) -> Iterator[None]:
    """Inside the `with`, the changes are those that `chained` has returned before."""
    now = chained(owner)

    def put(changes: dict[Place, tuple[Change, ...]]) -> None:
        with interrupts_held():
            for place in now | wanted:
                _set(place, changes.get(place, ()))

    with undone() as steps:
        steps.append(partial(put, now))
        put(wanted)
        yield


def _changes(module: nn.Module, side: Side) -> tuple[Change, ...]:
    chain = _CHAINS.get(module, {}).get(side)
    return () if chain is None else chain.changes


def _set(place: Place, changes: tuple[Change, ...]) -> None:
    module, side = place
    chains = _CHAINS.setdefault(module, {})
    if changes:
        if side not in chains:
            chains[side] = _Chain(module, side)
        chains[side].changes = changes
    elif side in chains:
        chains.pop(side).hook.remove()
