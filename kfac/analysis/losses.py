"""Texts as a language model meets them: losses, recall, and what goes into the targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.batches import (
    check_tokens,
    language_model_forward,
    on_its_device,
)
from kfac.collection.finite import logits_error
from lirefs.errors import BatchError
from lirefs.model.guest import widened


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
