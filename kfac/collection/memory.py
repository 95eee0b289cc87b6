"""The memory of a collection beside its sums, from a rehearsal with tensors that have no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac.collection.head import Head
from kfac.collection.hooks import first_argument
from kfac.target import Target
from lirefs.errors import KfacError
from lirefs.model.guest import accepts, as_guest
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.weight_swap import fsdp_modules

_SOFTMAX = 3 * 4 * 2**22
"""Bytes of a softmax that is worked on at a time, and of what a draw derives from it."""


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; those that are tied count once."""
    tensors = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def activation_bytes(
    model: nn.Module, targets: Sequence[Target], rows: torch.dtype, shape: tuple[int, int]
) -> dict[str, int]:
    """Return the bytes at the peak of one batch: "graph", "logits" and "rows".

    The model runs forward and backward as in a collection, with tensors that have shapes and no
    data, so it may be on any device, the meta device included.

    Raises:
        KfacError: The model cannot run on tensors without data: what it does depends on them (a
            mixture of experts does).
    """
    if fsdp_modules(model):
        raise KfacError(
            "a sharded model does not run on tensors without data, so its memory cannot be "
            "planned; plan it from its configuration (torch.device('meta')), before it is sharded"
        )
    head = Head.find(model, targets, planned=True)
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    if head is not None and not head.is_needed({"input_ids": ids}):
        head = None
    try:
        with as_guest(model), FakeTensorMode(allow_non_fake_inputs=True):
            return _rehearse(model, targets, rows, shape, head)
    except KfacError:
        raise
    except Exception as error:  # of many kinds, because it comes from inside the model
        raise KfacError(
            f"the memory of {type(model).__name__} cannot be planned, because it does not run on "
            f"tensors without data ({type(error).__name__}: {str(error)[:200]}); plan without "
            "model, and give batch_tokens as a number"
        ) from error


def _rehearse(
    model: nn.Module,
    targets: Sequence[Target],
    rows: torch.dtype,
    shape: tuple[int, int],
    head: Head | None,
) -> dict[str, int]:
    copies: dict[int, Tensor] = {}

    def copy(one: Tensor) -> Tensor:
        if id(one) not in copies:
            copies[id(one)] = torch.empty(one.shape, dtype=one.dtype)
        return copies[id(one)]

    named = [*model.named_parameters(remove_duplicate=False)]
    state = {name: copy(one) for name, one in [*named, *model.named_buffers()]}
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def keep(gradient: Tensor) -> None:
        kept.append(gradient.to(rows).clone())

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        kept.append(first_argument(args, kwargs).detach())
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    live = _Live(copies.values())
    with undone() as steps:
        with interrupts_held():
            for one in dict.fromkeys(target.module for target in targets):
                steps.append(one.register_forward_hook(watch, with_kwargs=True).remove)
        with live:
            if head is None:
                output = functional_call(model, state, (), inputs)
                end = output if isinstance(output, Tensor) else output.logits
                del output
            else:
                with head.watching(seen):
                    functional_call(model, state, (), inputs)
                end = seen.pop()
            logits = end.numel() * end.element_size() if head is None else 0
            graph = live.now - logits
            kept[:] = [one.to(rows) for one in kept]
            gradient = torch.empty_like(end)
            softmax = min(_SOFTMAX, 3 * 4 * end.numel())
            if head is not None:
                # Logits and their gradient, and both again behind a scale or cap.
                softmax = _SOFTMAX + head.bytes_at_once(end.numel() // end.shape[-1])
            live.peak = max(live.peak, live.now + softmax)
            logits += softmax + gradient.numel() * gradient.element_size()
            torch.autograd.backward(end, gradient)
    return {"graph": graph, "logits": logits, "rows": max(0, live.peak - graph - logits)}


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {one.untyped_storage()._cdata for one in before}  # which are not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
