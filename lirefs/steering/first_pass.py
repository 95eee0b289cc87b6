"""A steering that never fires is an error: the first whole forward pass must run every hook."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from lirefs.errors import InterventionError
from lirefs.model.traits import PROBING
from lirefs.steering.hook_chain import NotCopied, Place, has_run


class FirstPass(NotCopied):
    """Judges the first forward pass of a model under a steering, and steps aside.

    A pass that ends early by an exception is not judged, nor are the draft passes of
    `generate(assistant_early_exit=...)`, which leave out layers on purpose.

    Args:
        model: The steered model.
        owner: The module that owns its blocks, which may be called without the model.
        places: Where the hooks are, each with its name for the message.

    Raises:
        InterventionError: From the forward pass, if it ended and a hook did not run.
    """

    def __init__(self, model: nn.Module, owner: nn.Module, places: Mapping[Place, str]) -> None:
        self._places = places
        modules = [model] if model is owner else [model, owner]
        self._hooks = [one.register_forward_hook(self._after) for one in modules]

    def end(self) -> None:
        """Judge no further pass."""
        for hook in self._hooks:
            hook.remove()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if PROBING.get():
            return
        idle = [name for place, name in self._places.items() if not has_run(place)]
        if not idle:
            self.end()
        elif not _is_draft():
            raise InterventionError(
                f"the steering did not act in this forward pass: nothing ran at {idle[0]}"
                f"{f' and {len(idle) - 1} more' if len(idle) > 1 else ''}; layers were skipped, or "
                "a module was replaced or is called other than by module(...). Undo that, or load "
                "or wrap the model again, and attach the steering after it"
            )


def _is_draft() -> bool:
    """Whether a draft pass of the model itself is under way; only asked if a hook did not run."""
    return any(frame.function == "get_candidates" for frame in inspect.stack(context=0))
