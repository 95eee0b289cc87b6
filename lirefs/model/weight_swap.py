"""Swap weights of a model for new ones, and restore its own bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lirefs.errors import EditOrderError

# For each edited parameter the attached edits, oldest first: the handle's token, and the tensor
# that was replaced. Nothing here refers to the parameter, so a model dropped while edited is freed.
_STACKS: Any = WeakIdKeyDictionary()


class EditHandle:
    """An edit that is in place. Remove it with `remove()` or by leaving a `with` block.

    Args:
        changes: Each parameter with its new tensor. The parameters stay the same objects, so tied
            weights stay tied.
        release: Called once, when the original tensors are back.
    """

    def __init__(
        self, changes: Sequence[tuple[nn.Parameter, Tensor]], release: Callable[[], None]
    ) -> None:
        self._token = object()
        self._originals = [(parameter, parameter.data) for parameter, _ in changes]
        self._release = release
        for parameter, original in self._originals:
            _STACKS.setdefault(parameter, []).append((self._token, original))
        try:
            for parameter, stored in changes:
                parameter.data = stored
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the original tensors; does nothing the second time.

        Raises:
            EditOrderError: A later edit of the same weight is still in place. Nothing is changed.
        """
        for parameter, _ in self._originals:
            if _STACKS[parameter][-1][0] is not self._token:
                raise EditOrderError(
                    "a later edit of the same weight is still attached; remove that one first"
                )
        for parameter, original in self._originals:
            parameter.data = original
            _STACKS[parameter].pop()
            if not _STACKS[parameter]:
                del _STACKS[parameter]
        self._originals = []
        self._release()

    def __enter__(self) -> EditHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def originals_of(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors of a parameter that attached edits have replaced, oldest first."""
    return [original for _, original in _STACKS.get(parameter, [])]


def is_edited(model: nn.Module) -> bool:
    """Whether a removable weight edit is attached to a model."""
    return any(parameter in _STACKS for parameter in model.parameters())
