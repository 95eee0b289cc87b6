"""Activation checkpoints: the recomputation sees the steering of its own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import InterventionError
from lirefs.model.interrupts import undone
from lirefs.steering.hook_chain import (
    WITH_GRADIENTS,
    Change,
    NotCopied,
    Place,
    chained,
    rechained,
    runs_again,
)
from lirefs.steering.token_mask import PassMask, TokenMask, current_backward

_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where `transformers`, and torch's `CheckpointWrapper`, keep the function that checkpoints."""


class Checkpoints:
    """Stands before the checkpointing functions of a steered model.

    A checkpoint runs its part of the model a second time in the backward pass. By then the steering
    may be gone, or the model may have seen other tokens. So each checkpoint remembers the changes
    and masks of its forward pass, and puts them in place while it recomputes. What calls
    `torch.utils.checkpoint` itself cannot be taught that: its backward pass must come while the
    same steering is attached, or InterventionError is raised there.

    Args:
        owner: The module that owns the blocks.
        modules: Where checkpointing functions may be.
        masks: The masks of the attached steerings, kept up to date by the caller.
    """

    def __init__(
        self, owner: nn.Module, modules: Sequence[nn.Module], masks: list[TokenMask]
    ) -> None:
        self._owner = owner
        self._modules = modules
        self._masks = masks
        self._state: _State | None = None

    def begin(self) -> None:
        """A forward pass begins; its masks are prepared."""
        self._state = None
        WITH_GRADIENTS.set(torch.is_grad_enabled())
        if not torch.is_grad_enabled():
            return
        for module in self._modules:
            for name in _NAMES:
                own = module.__dict__.get(name)
                if own is not None and not isinstance(own, _Checkpointing):
                    module.__dict__[name] = _Checkpointing(own, self.state)

    def watch_backward(self, output: Any) -> None:
        """A forward pass has ended: what will run again must then be steered as it was now."""
        if not (WITH_GRADIENTS.get() and runs_again(self._owner)):
            return
        changes = chained(self._owner)

        def check(gradient: Tensor) -> None:
            if chained(self._owner) != changes:
                raise InterventionError(
                    "torch.utils.checkpoint is about to run steered blocks again, and the steering "
                    "of their forward pass is not attached any more; call backward inside the "
                    "`with`, or checkpoint with model.gradient_checkpointing_enable()"
                )

        hidden = output if isinstance(output, Tensor) else output[0]
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(check)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Step aside; graphs that are still to be backpropagated keep what they need."""
        for module in self._modules:
            for name in _NAMES:
                while isinstance(own := module.__dict__.get(name), _Checkpointing):
                    module.__dict__[name] = own.own

    def state(self) -> _State:
        """The steering of the forward pass that is under way."""
        if self._state is None:
            masks = [(mask, mask.now) for mask in self._masks]
            self._state = _State(self._owner, chained(self._owner), masks)
        return self._state


class _State:
    def __init__(
        self,
        owner: nn.Module,
        changes: dict[Place, tuple[Change, ...]],
        masks: list[tuple[TokenMask, PassMask | None]],
    ) -> None:
        self._owner = owner
        self._changes = changes
        self._masks = masks

    @contextmanager
    def again(self) -> Iterator[None]:
        before = [(mask, mask.now) for mask, _ in self._masks]

        def restore() -> None:
            for mask, now in before:
                mask.now = now

        with undone() as steps, rechained(self._owner, self._changes):
            steps.append(restore)
            for mask, now in self._masks:
                mask.now = None if now is None else replace(now, backward=current_backward())
            yield


class _Checkpointing(NotCopied):
    """A function that checkpoints, called with the function to run and its arguments."""

    def __init__(self, own: Callable[..., Any], state: Callable[[], _State]) -> None:
        self.own = own
        self._state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state, runs = self._state(), 0

        def run(*inputs: Any, **named: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return function(*inputs, **named)
            with state.again():
                return function(*inputs, **named)

        return self.own(run, *args, **kwargs)
