"""Hooks on targets: they start the graph, and collect counted inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.covariance import InputRows, Sums
from kfac.collection.finite import first_not_finite_row, not_finite, not_finite_row_error
from kfac.experts import observe_experts
from kfac.target import Target, TargetRecord
from lirefs.errors import KfacError, NonFiniteError, TargetError
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.traits import PROBING


@dataclass(eq=False)
class _Call:
    """One use of a target in a forward pass."""

    tensor: Tensor | None  # the input, until its rows are read
    version: int  # its version counter, which shows later changes in place
    positions: Tensor | None  # of each row in the batch; None when the rows are all positions
    key: int  # identity of the input, to find targets that read the same one
    chosen: Tensor | None = None  # indices of the counted rows, once read; None when all are
    rows: InputRows = field(init=False)  # the counted rows, once read


class TargetTracker:
    """Passes the counted rows of targets' inputs and output gradients, in a dtype, to their sums.

    For each batch: `begin`, the forward pass, `read`, the backward passes, `add`. Nothing is added
    to the sums before `add`, so a batch that fails on the way leaves them unchanged. With all
    weights frozen the graph begins at the output of the first target: nothing before it is
    backpropagated, and no weight gradient is computed.
    """

    def __init__(self, targets: Sequence[Target], dtype: torch.dtype, sums: Sums) -> None:
        self.targets = {target.name: target for target in targets}
        self.dtype = dtype
        self.sums = sums
        self.counts = dict.fromkeys(self.targets, 0)  # counted positions
        self.sources: dict[str, str] = {}  # under which target each target's input is summed
        self._calls: dict[str, list[_Call]] = {}  # in the order of the forward pass
        self._gradients: list[tuple[str, _Call, Tensor]] = []  # in the order of the backward passes
        self._open = False
        self._mask = self._reached = torch.empty(0, dtype=torch.bool)
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch every target inside the context."""
        stacks: dict[nn.Module, str] = {}
        with undone() as steps:
            with interrupts_held():
                for name, target in self.targets.items():
                    if target.expert is not None:
                        stacks[target.module] = name.rpartition(".")[0]
                        continue
                    hook: Callable[..., Any] = partial(self._on_forward, name)
                    handle = target.module.register_forward_hook(hook, with_kwargs=True)
                    steps.append(handle.remove)
                for module, owner in stacks.items():
                    steps.append(observe_experts(module, partial(self._on_expert, owner)))
            # A forward pass that failed leaves calls whose tensors hold the graph, whose hooks hold
            # this object: a cycle through autograd, which no collector sees.
            steps.append(self._forget)
            yield

    def begin(self) -> None:
        """Forget the last batch, and record the calls of the next forward pass."""
        self._forget()
        self._open = True

    def read(self, mask: Tensor, reached: Tensor, place: str) -> None:
        """Take the rows of all inputs since `begin` that the sums need; all finite.

        Those are the counted ones, where the bool mask is true. Sums over whole sequences need all
        that a counted loss may reach, where the mask `reached` is true.
        """
        # From here to `begin` a forward call is the recomputation of an activation checkpoint.
        self._open = False
        self._mask = mask
        self._reached = mask | reached.to(mask.device) if self.sums.whole_sequences else mask
        known = set(self.sources)
        read: dict[str, list[int]] = {}
        common: dict[torch.device, Tensor | None] = {}
        for name in filter(self._calls.get, self.targets):
            calls = self._calls[name]
            read[name] = [call.key for call in calls]
            source = self._source(name, known, read)
            for call, shared in zip(calls, self._calls[source], strict=True):
                if source == name:
                    self._read_input(name, call, common)
                call.chosen, call.rows, call.tensor = shared.chosen, shared.rows, None
        inputs = [
            (name, call.rows)
            for name, calls in self._calls.items()
            if self.sources[name] == name
            for call in calls
        ]
        for index in not_finite([rows.values for _, rows in inputs])[:1]:
            name, rows = inputs[index]
            raise _not_finite(name, rows, rows.values, "input", place)

    def check_gradients(self, place: str) -> None:
        """Verify that all gradients are finite; of several, name the one nearest to the logits."""
        for index in not_finite([gradient for _, _, gradient in self._gradients])[:1]:
            name, call, gradient = self._gradients[index]
            raise _not_finite(name, call.rows, gradient, "output gradient", place)

    def add(self, draws: int) -> None:
        """Add the rows of this batch to the sums; `draws` is the number of backward passes."""
        for name in self.targets:
            for call in self._calls.get(name, []):
                if self.sources[name] == name:
                    self.sums.add_input(name, call.rows)
                self.counts[name] += call.rows.count
        for name, call, gradient in self._gradients:
            self.sums.add_gradient(name, gradient, call.rows, 1.0 / draws)
        self._forget()

    def records(self, digests: Mapping[str, str]) -> dict[str, TargetRecord]:
        """Return the record of every target; all must have been called."""
        plain = [name for name, target in self.targets.items() if target.expert is None]
        if unused := [name for name in plain if not self.counts[name]]:
            raise TargetError(f"targets never called by the forward pass: {unused}")
        apart = [name for name, s in self.sources.items() if self.counts[name] != self.counts[s]]
        if apart:
            raise KfacError(f"targets that shared their input in some batches only: {apart}")
        return {
            name: target.record(self.counts[name], self.sources.get(name, name), digests[name])
            for name, target in self.targets.items()
        }

    def _source(self, name: str, known: set[str], read: dict[str, list[int]]) -> str:
        if name not in known:
            # Only a target that is new as well has an A with the same history.
            same = (n for n in read if n not in known and read[n] == read[name])
            self.sources[name] = self.sources.get(next(same), name)
        source = self.sources[name]
        if read.get(source) != read[name]:
            raise KfacError(
                f"targets {source!r} and {name!r} shared their input in earlier batches, but "
                "not in this one; collect them separately"
            )
        return source

    def _on_forward(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        return self._watch(name, first_argument(args, kwargs), output, None)

    def _on_expert(
        self, owner: str, expert: str, rows: Tensor, output: Tensor, positions: Tensor
    ) -> Tensor:
        name = f"{owner}.{expert}"
        return self._watch(name, rows, output, positions) if name in self.targets else output

    def _watch(self, name: str, tensor: Tensor, output: Tensor, positions: Tensor | None) -> Tensor:
        if PROBING.get():
            return output
        if not torch.is_grad_enabled():
            raise TargetError(
                f"target {name!r} runs with gradients disabled (under no_grad, or in a re-entrant "
                "activation checkpoint: use use_reentrant=False)"
            )
        if not output.requires_grad:
            output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        if self._open:
            call = _Call(tensor, tensor._version, positions, id(tensor))
            self._calls.setdefault(name, []).append(call)
            output.register_hook(partial(self._on_gradient, name, call))  # type: ignore[no-untyped-call]
        return output

    def _on_gradient(self, name: str, call: _Call, gradient: Tensor) -> None:
        # A copy, because autograd may overwrite the gradient later in the backward pass.
        rows = self._pick(gradient, call.chosen)
        self._gradients.append((name, call, rows.clone() if call.chosen is None else rows))

    def _forget(self) -> None:
        self._calls, self._gradients = {}, []

    def _read_input(
        self, name: str, call: _Call, common: dict[torch.device, Tensor | None]
    ) -> None:
        tensor = call.tensor
        assert tensor is not None
        if tensor._version != call.version:
            raise KfacError(
                f"target {name!r}: the model changed its input in place after use; collection "
                "needs it unchanged until the end of the forward pass"
            )
        rows, device = tensor.numel() // tensor.shape[-1], tensor.device
        positions = call.positions
        if positions is not None:
            call.chosen = _true(self._reached.flatten().to(device)[positions])
        elif rows != self._mask.numel():
            raise KfacError(
                f"target {name!r} was given {rows} rows, but the mask has {self._mask.numel()} "
                "positions: it sees only part of the positions (an expert?), or the mask of "
                "`forward` has another shape than its input"
            )
        else:
            if device not in common:
                common[device] = _true(self._reached.flatten().to(device))
            call.chosen = common[device]
            positions = torch.arange(rows, device=device)
        if call.chosen is not None:
            positions = positions[call.chosen]
        counted = None
        if self.sums.whole_sequences:
            counted = _true(self._mask.flatten().to(device)[positions])
        values = self._pick(tensor, call.chosen)
        call.rows = InputRows(values, positions, self._mask.shape, counted)

    def _pick(self, tensor: Tensor, chosen: Tensor | None) -> Tensor:
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        if chosen is not None:
            # With device_map an output can be on another device than its input.
            flat = flat[chosen.to(flat.device)]
        return flat.to(self.dtype)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first argument of a call, positional or not: the input of a target."""
    return args[0] if args else next(iter(kwargs.values()))


def _true(mask: Tensor) -> Tensor | None:
    """Return the indices of the true entries; None when all are."""
    return None if bool(mask.all()) else mask.nonzero()[:, 0]


def _not_finite(
    name: str, rows: InputRows, values: Tensor, what: str, place: str
) -> NonFiniteError:
    position = int(rows.positions[first_not_finite_row(values)])
    return not_finite_row_error(place, position, rows.shape, f"the {what} of target {name!r} holds")


class _Root(torch.autograd.Function):
    """Make a tensor require a gradient, not as a leaf: the model may still change it in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
