"""Texts as a language model meets them: losses, recall, and what goes into the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac.batches import (
    Forward,
    attended,
    check_tokens,
    language_model_forward,
    on_its_device,
)
from kfac.errors import BatchError, NonFiniteError, TargetError
from kfac.finite import ADVICE, logits_error, where
from kfac.guest import widened
from kfac.target import Target


def position_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of every counted position of a batch, in nats, shape (positions,).

    Raises:
        BatchError: The batch is malformed, or a text has no counted position.
    """
    logits, counted, following = _predictions(model, batch)
    return nn.functional.cross_entropy(
        widened(logits[counted]), following[counted], reduction="none"
    )


def passage_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of each text of a batch, in nats per position, shape (B,).

    Counted are the positions of `kfac.collect`: those that predict an attended token whose label,
    where there are labels, is not -100.

    Raises:
        BatchError: The batch is malformed, or a text has no counted position.
    """
    logits, counted, following = _predictions(model, batch)
    losses = nn.functional.cross_entropy(
        widened(logits.flatten(0, 1)), following.flatten(), reduction="none"
    ).view(counted.shape)
    return (losses * counted).sum(1) / counted.sum(1)


@torch.no_grad()
def recitation(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Find the texts that a model recites (Merullo et al. 2025, appendix B).

    A text is recited when every counted token is the model's first choice given the true tokens
    before it; this is the same as greedy generation that repeats the text exactly. Set `labels` to
    -100 on the prefix.

    Args:
        model: A causal language model, under whatever edit is in place.
        batches: Mappings with input_ids (B, T), optional attention_mask and labels (B, T), see
            `kfac.collect`.

    Returns:
        1 for a text that is recited, 0 for one that is not: float64 on CPU, shape (texts,).

    Raises:
        BatchError: No batch, a malformed one, or a text has no counted position.
        NonFiniteError: A logit of a counted position is NaN, or a row of logits infinite.
    """
    parts = []
    for index, batch in enumerate(batches):
        logits, counted, following = _predictions(model, batch, f"batch {index}")
        if not bool(logits[counted].amax(-1).isfinite().all()):
            raise logits_error(logits, counted, f"batch {index}")
        right = (logits.argmax(-1) == following) | ~counted
        parts.append(right.all(1).double().cpu())
    if not parts:
        raise BatchError("the iterable of batches is empty")
    return torch.cat(parts)


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


def _predictions(
    model: nn.Module, batch: Any, place: str = "the batch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, T, V), the counted positions and the token after each, all (B, T)."""
    check_tokens(model, batch, place)
    ready = on_its_device(batch, model)
    logits, counted = language_model_forward(model, ready)
    if not bool(counted.any(1).all()):
        raise BatchError(
            f"{place}: a text has no position to predict: one token only, or all labels -100"
        )
    ids = ready["input_ids"]
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).to(logits.device)
    return logits, counted.to(logits.device), following
