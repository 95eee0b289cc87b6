"""What goes into the targets of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.batches import (
    Forward,
    attended,
    check_tokens,
    language_model_forward,
    on_its_device,
)
from kfac.collection.finite import ADVICE, where
from kfac.target import Target
from lirefs.errors import BatchError, NonFiniteError, TargetError


def target_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    forward: Forward | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Run a model on batches and yield what each target read, batch by batch.

    Args:
        model: A causal language model, or what `forward` runs; nothing after the last target
            matters.
        batches: Mappings with input_ids (B, T) and an optional attention_mask (B, T); with
            `forward`, whatever it takes.
        targets: Linear or Conv1D targets; an expert sees only some positions and is refused.
        forward: As in `kfac.collect`; its mask says which positions are attended.

    Yields:
        Target name to its inputs (B, T, in), and the bool mask (B, T) of attended positions.

    Raises:
        BatchError: No batch, a malformed one, or a text without an attended position.
        NonFiniteError: An input at an attended position is NaN or infinite.
        TargetError: A target is an expert, is never called, or its input is not (B, T, in).
    """
    experts = [target.name for target in targets if target.expert is not None]
    if experts:
        raise TargetError(f"inputs of single experts cannot be read text by text: {experts}")
    seen: dict[str, Tensor] = {}
    empty = True
    with ExitStack() as stack:
        for target in targets:
            hook: Callable[..., None] = partial(_keep_input, seen, target.name)
            handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        for index, batch in enumerate(batches):
            empty = False
            seen.clear()
            real = _attended_run(model, batch, f"batch {index}", forward)
            wrong = [t.name for t in targets if t.name not in seen]
            if wrong:
                raise TargetError(f"targets never called by the forward pass: {wrong}")
            wrong = [name for name, read in seen.items() if read.shape[:-1] != real.shape]
            if wrong:
                raise TargetError(f"targets whose input does not have the batch's shape: {wrong}")
            if not bool(real.any(1).all()):
                raise BatchError(f"batch {index}: a text has no attended token")
            for name, read in seen.items():
                bad = ~read.isfinite().all(-1) & real.to(read.device)
                if bool(bad.any()):
                    at = where(int(bad.flatten().nonzero()[0]), bad.shape)
                    raise NonFiniteError(
                        f"batch {index}, {at}: the input of target {name!r} holds NaN or infinity; "
                        f"{ADVICE}"
                    )
            yield dict(seen), real
    if empty:
        raise BatchError("the iterable of batches is empty")


@torch.no_grad()
def _attended_run(model: nn.Module, batch: Any, place: str, forward: Forward | None) -> Tensor:
    """Run a batch for what hooks see of it, and return the mask of attended positions."""
    if forward is not None:
        return forward(model, on_its_device(batch, model))[1].bool()
    check_tokens(model, batch, place)
    language_model_forward(model, on_its_device(batch, model))
    real = attended(batch)
    assert real is not None  # check_tokens has refused such a batch
    return real


def _keep_input(
    seen: dict[str, Tensor], name: str, module: nn.Module, args: Any, kwargs: Any
) -> None:
    seen[name] = (args[0] if args else next(iter(kwargs.values()))).detach()
