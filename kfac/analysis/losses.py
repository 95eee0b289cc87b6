"""Losses of a language model on texts, and the texts whose every token it predicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfac.collection.batches import (
    check_model_and_batches,
    check_tokens,
    language_model_forward,
    must_be_causal,
    on_its_device,
)
from kfac.collection.finite import not_finite_logits_error
from lirefs.errors import BatchError
from lirefs.model.guest import widened, without_gradients


def position_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the losses (positions,) of counted positions in nats, and their bool mask (B, T)."""
    logits, counted, following = _predictions(model, batch)
    chosen = widened(logits[counted])
    return nn.functional.cross_entropy(chosen, following[counted], reduction="none"), counted


def passage_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of each text of a batch, in nats per position, shape (B,).

    Counted are the positions of `kfac.collect`: those that predict an attended token whose label,
    where there are labels, is not -100.
    """
    losses, counted = position_losses(model, batch)
    table = losses.new_zeros(counted.shape).masked_scatter(counted, losses)
    return table.sum(1) / counted.sum(1)


@without_gradients()
def teacher_forced_matches(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Find the texts whose every token a model puts first (Merullo et al. 2025, appendix B).

    Teacher forcing: each counted token must be the model's first choice given the true tokens
    before it. Greedy generation then recites the text, up to rounding. Set `labels` to -100 on the
    prefix.

    Args:
        model: A causal language model, with any edit that is attached.
        batches: Mappings with input_ids (B, T), optional attention_mask and labels (B, T), see
            `kfac.collect`.

    Returns:
        1 for a text that matches, 0 for one that does not: float64 on CPU, shape (texts,).

    Raises:
        BatchError: No batch, one is malformed, or a text has no counted position.
        NonFiniteError: A logit of a counted position is NaN, or a row of logits infinite.
    """
    check_model_and_batches(model, batches)
    must_be_causal(model)
    parts = []
    for index, batch in enumerate(batches):
        logits, counted, following = _predictions(model, batch, f"batch {index}")
        if not bool(logits[counted].amax(-1).isfinite().all()):
            raise not_finite_logits_error(logits, counted, f"batch {index}")
        right = (logits.argmax(-1) == following) | ~counted
        parts.append(right.all(1).double().cpu())
    if not parts:
        raise BatchError("the iterable of batches is empty")
    return torch.cat(parts)


def _predictions(
    model: nn.Module, batch: Any, where: str = "the batch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (B, T, V), the mask of counted positions (B, T) and the next tokens (B, T)."""
    check_tokens(model, batch, where)
    ready = on_its_device(batch, model)
    logits, counted = language_model_forward(model, ready)
    if not bool(counted.any(1).all()):
        raise BatchError(
            f"{where}: a text has no position to predict: it has one token, or all labels are -100"
        )
    ids = ready["input_ids"]
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).to(logits.device)
    return logits, counted.to(logits.device), following
