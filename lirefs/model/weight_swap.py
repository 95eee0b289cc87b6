"""Swap weights of a model for new ones, and restore its own bit for bit.

The weights may be sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`), as
DTensors. What gathers them is done by all processes together, one weight at a time.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lirefs.errors import ChangedWeightsError, EditOrderError
from lirefs.model.interrupts import interrupts_held
from lirefs.model.intervention import one_at_a_time

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
        if is_sharded(new):  # it will be written over
            self._original = self.parameter.detach().clone()
        self._digest = _digest(new)

    def swap(self, token: object) -> None:
        """Put the new tensor in place; the parameter stays the same object, so ties hold."""
        _STACKS.setdefault(self.parameter, []).append((token, self._original))
        put(self.parameter, self._new)

    def is_changed(self, parts: set[int]) -> bool:
        """Whether the values have been changed since; moving or casting them does not count.

        `parts` are the ids of the model's modules: a copy in place of one keeps edited weights.
        """
        if id(self._module) not in parts:
            return True
        current = getattr(self._module, self._attribute, None)
        if not isinstance(current, nn.Parameter) or current.is_meta:
            return True
        if is_sharded(current):
            return _digest(current) != self._digest
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
                    put(parameter, self._original.to(like.device, like.dtype))
        _STACKS[self.parameter].pop()
        if not _STACKS[self.parameter]:
            del _STACKS[self.parameter]


class EditHandle:
    """An edit, once `put` has put it in place. `remove()`, or leaving a `with` block, removes it.

    Under activation checkpoints, call `backward` before it is removed: what they run again uses the
    weights that are there then.

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
        self._new = weights
        self._weights: list[SwappedWeight] = []
        self._release = release
        self._lock = threading.Lock()

    def put(self) -> None:
        """Put the new tensors in place; an error or an interrupt restores the original ones."""
        try:
            with interrupts_held():
                for weight in self._new:
                    self._weights.append(weight)
                    weight.swap(self._token)
        except BaseException:
            self.remove(discard=True)
            raise

    def remove(self, discard: bool = False) -> None:
        """Restore the original tensors; does nothing the second time.

        If the model was moved or cast meanwhile, the originals are moved and cast as well. An
        interrupt waits until they are back.

        Args:
            discard: Also if the edited weights were changed meanwhile, by training, by
                `load_state_dict` or otherwise. What was done to them is lost; changes of other
                weights stay.

        Raises:
            EditOrderError: A later edit of the same weight is still in place. Nothing is changed.
            ChangedWeightsError: The edited weights were changed meanwhile. Nothing is changed.
            InterventionError: Another thread is removing it.
        """
        with one_at_a_time(self._lock):
            self._restore(discard)

    def _restore(self, discard: bool) -> None:
        reshard(self._model)
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
    reshard(model)
    return any(parameter in _STACKS for parameter in model.parameters())


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor: one of which this process holds a part."""
    return type(tensor).__name__ == "DTensor"


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, which all processes must ask for; others as they are."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    # What is offloaded to the CPU cannot be sent from there by NCCL.
    whole: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return whole


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the shard of this process, of a tensor that all have whole; sends nothing."""
    from torch.distributed.tensor import distribute_tensor  # takes seconds

    sharded: Any = like
    mesh, placements = sharded.device_mesh, sharded.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@torch.no_grad()
def put(parameter: nn.Parameter, data: Tensor) -> None:
    """Make a tensor, sharded if the parameter is, the data of a parameter."""
    if is_sharded(parameter):  # in place: FSDP2 gathers from the memory that it knows
        local_part(parameter).copy_(local_part(data))
    else:
        parameter.data = data


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards, outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [one for one in model.modules() if fsdp and isinstance(one, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 has kept gathered after a forward pass, so that parameters are shards."""
    for module in fsdp_modules(model):
        module.reshard()


def must_be_readable(model: nn.Module, error: Callable[[str], Exception]) -> None:
    """Reshard a model; raise an error if its weights are sharded, but not by FSDP2 alone."""
    if problem := _sharding_problem(model):
        raise error(problem)
    reshard(model)


def _sharding_problem(model: nn.Module) -> str:
    """Say why the weights of a model cannot be read one by one; empty if they can."""
    fsdp, modules = sys.modules.get("torch.distributed.fsdp"), dict(model.named_modules())
    by_fsdp: set[str] = set()
    for name, module in modules.items():
        if fsdp and isinstance(module, fsdp.FullyShardedDataParallel):
            return (
                f"module {name or type(model).__name__!r} is wrapped in FullyShardedDataParallel "
                "(FSDP1), which joins its weights into one flat tensor; shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2), or load it in one process"
            )
        parent = name.rpartition(".")[0]
        if (fsdp and isinstance(module, fsdp.FSDPModule)) or (parent in by_fsdp and name):
            by_fsdp.add(name)
        for key, parameter in module._parameters.items():
            if is_sharded(parameter):
                sharded: Any = parameter
                parts = [one for one in sharded.placements if not one.is_replicate()]
                if name not in by_fsdp or len(parts) > 1:
                    called = f"{name}.{key}".strip(".")
                    return (
                        f"parameter {called} is sharded, and not by FSDP2 alone (tensor "
                        "parallelism?), so a process sees a part of each output; load the model "
                        "without tp_plan, and shard it with torch.distributed.fsdp.fully_shard"
                    )
    return ""


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def _digest(tensor: Tensor) -> bytes:
    data = local_part(tensor.detach()).contiguous().cpu().view(torch.uint8).numpy().data
    return hashlib.sha256(data).digest()
