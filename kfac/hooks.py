"""Hooks that sum a aᵀ and g gᵀ while a model runs, and the rules of a guest in a user's model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac.errors import KfacError, NonFiniteError, TargetError
from kfac.factors import TargetRecord
from kfac.targets import Target


@contextmanager
def as_guest(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and switch to evaluation mode; restore both, whatever happens."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


class CovarianceSums:
    """Running sums of a aᵀ and g gᵀ over the counted positions of some targets.

    With all weights frozen no tensor requires a gradient, so the graph begins where this class
    makes it begin: at the output of the first target. Nothing before it is backpropagated, and no
    weight gradient is formed.

    Args:
        targets: At least one.
        dtype: Of the sums.
    """

    def __init__(self, targets: Sequence[Target], dtype: torch.dtype) -> None:
        self.targets = {target.name: target for target in targets}
        self.dtype = dtype
        self.sources: dict[str, str] = {}
        self.counts = dict.fromkeys(self.targets, 0)
        self._a: dict[str, Tensor] = {}
        self._g: dict[str, Tensor] = {}
        self._inputs: dict[str, list[tuple[Tensor, int]]] = {}
        self._positions = torch.empty(0, dtype=torch.int64)
        self._anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep a forward hook on every target for the time of the context."""
        handles = []
        try:
            for name, target in self.targets.items():
                hook: Callable[..., Any] = partial(self._on_forward, name)
                handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._inputs.clear()

    def begin(self) -> None:
        """Forget the inputs of the last batch."""
        self._inputs = {name: [] for name in self.targets}

    def add_inputs(self, mask: Tensor) -> None:
        """Add the counted positions of all inputs seen since `begin`.

        Args:
            mask: bool; its number of entries is that of the inputs' rows.
        """
        self._positions = mask.flatten().nonzero()[:, 0]
        known = set(self.sources)
        read: dict[str, list[int]] = {}
        for name, calls in self._inputs.items():
            if not calls:
                continue
            read[name] = [id(tensor) for tensor, _ in calls]
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
            self.counts[name] += len(self._positions) * len(calls)
            if source == name:
                for tensor, version in calls:
                    self._check_unchanged(name, tensor, version)
                    self._add(self._a, name, tensor, mask.numel())
        self._inputs = {name: [] for name in self.targets}

    def check_finite(self, index: int) -> None:
        """Raise if a sum is not finite; a square on the diagonal shows any NaN or overflow.

        Raises:
            NonFiniteError: Naming target and batch.
        """
        sums = [("activation", *item) for item in self._a.items()]
        sums += [("output gradient", *item) for item in self._g.items()]
        traces = torch.stack([total.diagonal().sum().to(sums[0][2].device) for *_, total in sums])
        if bool(traces.isfinite().all()):
            return
        what, name, _ = sums[int((~traces.isfinite()).nonzero()[0])]
        raise NonFiniteError(
            f"batch {index}: an {what} of target {name!r} is NaN or infinite, or its square "
            f"overflows {self.dtype}"
        )

    def finish(
        self, digests: Mapping[str, str]
    ) -> tuple[dict[str, TargetRecord], dict[str, Tensor], dict[str, Tensor]]:
        """Return records, sums of a aᵀ and sums of g gᵀ, on CPU.

        Raises:
            TargetError: A target was never called, or its output never reached the logits.
        """
        unused = [name for name, count in self.counts.items() if not count]
        if unused:
            raise TargetError(f"targets never called by the forward pass: {unused}")
        apart = [name for name, s in self.sources.items() if self.counts[name] != self.counts[s]]
        if apart:
            raise KfacError(f"targets that shared their input in some batches only: {apart}")
        cut = [name for name in self.targets if name not in self._g]
        if cut:
            raise TargetError(f"targets whose output never reaches the logits: {cut}")
        records = {
            name: TargetRecord(
                out_features=target.out_features,
                in_features=target.in_features,
                count=self.counts[name],
                source=self.sources[name],
                digest=digests[name],
            )
            for name, target in self.targets.items()
        }
        return (
            records,
            {name: total.cpu() for name, total in self._a.items()},
            {name: total.cpu() for name, total in self._g.items()},
        )

    def _on_forward(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        if not torch.is_grad_enabled():
            raise TargetError(f"target {name!r} runs with gradients disabled (no_grad)")
        tensor = args[0] if args else next(iter(kwargs.values()))
        self._inputs[name].append((tensor, tensor._version))
        if not output.requires_grad:
            output = _Root.apply(output, self._anchor)  # type: ignore[no-untyped-call]
        output.register_hook(partial(self._on_gradient, name))  # type: ignore[no-untyped-call]
        return output

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        self._add(self._g, name, gradient, None)

    def _add(self, table: dict[str, Tensor], name: str, rows: Tensor, expected: int | None) -> None:
        flat = rows.detach().reshape(-1, rows.shape[-1])
        if expected is not None and len(flat) != expected:
            raise KfacError(
                f"target {name!r} was given {len(flat)} rows, but the mask has {expected} "
                "positions: it sees only part of the positions (an expert?), or the mask of "
                "`forward` has another shape than its input"
            )
        positions = self._positions.to(flat.device)
        if len(positions) < len(flat):
            flat = flat[positions]
        flat = flat.to(self.dtype)
        if name not in table:
            size = flat.shape[1]
            table[name] = torch.zeros(size, size, dtype=self.dtype, device=flat.device)
        table[name].addmm_(flat.T, flat)

    @staticmethod
    def _check_unchanged(name: str, tensor: Tensor, version: int) -> None:
        if tensor._version != version:
            raise KfacError(
                f"target {name!r}: the model changed its input in place after use; collection "
                "needs it unchanged until the end of the forward pass"
            )


class _Root(torch.autograd.Function):
    """Make a tensor require a gradient without copying it and without making it a leaf.

    A leaf could not be changed in place by the model afterwards; this output can.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
