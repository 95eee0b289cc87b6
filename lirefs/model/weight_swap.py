"""Swap weights of a model for new ones, and restore its own bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lirefs.errors import ChangedWeightsError, EditOrderError

# For each edited parameter the attached edits, oldest first: the handle's token, and the tensor
# that was replaced. Nothing here refers to the parameter, so a model dropped while edited is freed.
_STACKS: Any = WeakIdKeyDictionary()


class SwappedWeight:
    """A parameter of a module, whose data is swapped for a new tensor.

    Args:
        name: Its name, for messages.
        module: The module that holds the parameter.
        attribute: Its name in the module.
        new: The new tensor, of the same shape, dtype and device; no one else writes to it.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str, new: Tensor) -> None:
        self.name = name
        self.parameter: nn.Parameter = getattr(module, attribute)
        self._module, self._attribute = module, attribute
        self._original, self._new = self.parameter.data, new
        self._digest = _digest(new)

    def swap(self, token: object) -> None:
        """Put the new tensor in place; the parameter stays the same object, so ties hold."""
        _STACKS.setdefault(self.parameter, []).append((token, self._original))
        self.parameter.data = self._new

    def is_changed(self, parts: set[int]) -> bool:
        """Whether the values have been changed since; moving or casting them does not count.

        `parts` are the ids of the model's modules: a copy in place of one keeps edited weights.
        """
        if id(self._module) not in parts:
            return True
        current = getattr(self._module, self._attribute, None)
        if not isinstance(current, nn.Parameter) or current.is_meta:
            return True
        moved = current.data_ptr() != self._new.data_ptr() or current.dtype != self._new.dtype
        if moved and not torch.equal(current, self._new.to(current.device, current.dtype)):
            return True
        # Not the version counter, which misses changes of `parameter.data`.
        return _digest(self._new) != self._digest

    def restore(self) -> None:
        """Put the original back, on the device and in the dtype that the parameter has now."""
        # Loading and casting may have replaced the parameter itself.
        current = getattr(self._module, self._attribute, None)
        for parameter in (self.parameter, current):
            if isinstance(parameter, nn.Parameter):
                like = self._original if parameter.is_meta else parameter
                with torch.inference_mode(parameter.is_inference()):
                    parameter.data = self._original.to(like.device, like.dtype)
        _STACKS[self.parameter].pop()
        if not _STACKS[self.parameter]:
            del _STACKS[self.parameter]


class EditHandle:
    """An edit that is in place. Remove it with `remove()` or by leaving a `with` block.

    Args:
        weights: The weights to swap.
        release: Called once, when the original tensors are back.
        model: The model that they are part of.
    """

    def __init__(
        self, weights: Sequence[SwappedWeight], release: Callable[[], None], model: nn.Module
    ) -> None:
        self._token = object()
        self._model = model
        self._weights: list[SwappedWeight] = []
        self._release = release
        try:
            for weight in weights:
                self._weights.append(weight)
                weight.swap(self._token)
        except BaseException:
            self.remove(discard=True)
            raise

    def remove(self, discard: bool = False) -> None:
        """Restore the original tensors; does nothing the second time.

        If the model was moved or cast meanwhile, the originals are moved and cast as well.

        Args:
            discard: Also if the edited weights were changed meanwhile, by training, by
                `load_state_dict` or otherwise. What was done to them is lost; changes of other
                weights stay.

        Raises:
            EditOrderError: A later edit of the same weight is still in place. Nothing is changed.
            ChangedWeightsError: The edited weights were changed meanwhile. Nothing is changed.
        """
        for weight in self._weights:
            if _STACKS[weight.parameter][-1][0] is not self._token:
                raise EditOrderError(
                    "a later edit of the same weight is still attached; remove that one first"
                )
        parts = set(map(id, self._model.modules()))
        changed = [one.name for one in self._weights if one.is_changed(parts)]
        if changed and not discard:
            raise ChangedWeightsError(changed, self)
        for weight in self._weights:
            weight.restore()
        self._weights = []
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


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data
    return hashlib.sha256(data).digest()
