"""Batches of a language model: what they may hold, which tokens count, how the model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lirefs.errors import BatchError, must_be
from lirefs.model.batching import check_length, position_limit
from lirefs.model.guest import accepts, input_device, maybe_call
from lirefs.model.language_model import BATCH_TOKENS, LanguageModel
from lirefs.model.traits import traits_of

Forward = Callable[[nn.Module, Any], tuple[Tensor, ...]]
"""A `forward` of `collect`: model and batch to logits, mask and, if asked for, labels."""


def language_model_forward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model; the default `forward` of `collect`.

    Args:
        model: Takes input_ids and the batch's other tensors; returns logits or an output with
            a `logits` field.
        batch: As described in `collect`.

    Returns:
        Logits (B, T, vocabulary) and the bool mask (B, T) of positions that predict a counted
        token.

    Raises:
        BatchError: The batch has no input_ids, or the model returned no logits.
    """
    must_be(model, nn.Module, "model", BatchError)
    real = attended(batch)
    if real is None:
        raise BatchError("a batch of a language model needs input_ids as a tensor")
    inputs: dict[str, Any] = {
        k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"
    }
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    padded = not bool(real.all())
    if padded and "position_ids" not in inputs and accepts(model, "position_ids"):
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"the model returned a {type(output).__name__} without logits; pass `forward`"
        )
    if logits.ndim != 3 or logits.shape[:2] != real.shape:
        raise BatchError(
            f"the logits have shape {tuple(logits.shape)} for tokens of shape {tuple(real.shape)}, "
            "so the model is not a causal language model; pass `forward`"
        )
    return logits, counted_positions(batch)


def counted_positions(batch: Mapping[str, Any]) -> Tensor:
    """Return the bool mask (B, T) of positions that predict a counted token."""
    real = attended(batch)
    assert real is not None  # callers have checked that there are input_ids
    counted = torch.zeros_like(real)
    torch.logical_and(real[:, :-1], real[:, 1:], out=counted[:, :-1])
    if isinstance(batch.get("labels"), Tensor):
        counted[:, :-1].logical_and_(batch["labels"][:, 1:] != -100)
    return counted


def module_and_batches(
    model: nn.Module | LanguageModel, batches: Iterable[Any], tokens: int = BATCH_TOKENS
) -> tuple[nn.Module, Iterable[Any]]:
    """Return the module, and texts of an `lm` as batches of similar length, longest first."""
    must_be(model, (nn.Module, LanguageModel), "model", BatchError)
    _check_batches(batches)
    if not isinstance(model, LanguageModel):
        return model, batches
    given = list(batches)
    texts = [one for one in given if isinstance(one, str)]
    if not texts:
        return model.model, given
    if len(texts) < len(given):
        raise BatchError("texts and other batches cannot be mixed")
    ids = model.encode(texts)
    for index, row in enumerate(ids):
        check_length(model.model, len(row), f"text {index}", BatchError)
    lengths = [len(row) for row in ids]
    groups = model.traits.within(max(lengths)).groups(lengths, tokens, "right")
    return model.model, [model.pad([ids[row] for row in rows], side="right") for rows in groups]


def check_model_and_batches(model: Any, *sets: Any) -> None:
    """Raise BatchError unless these can be a module and sets of its batches."""
    must_be(model, nn.Module, "model", BatchError)
    for batches in sets:
        _check_batches(batches)


def _check_batches(batches: Any) -> None:
    if isinstance(batches, str):
        raise BatchError("a list of texts is needed, got one string: use [text]")
    if isinstance(batches, Mapping):
        raise BatchError("a list of batches or texts is needed, got one mapping: use [batch]")
    must_be(batches, Iterable, "batches", BatchError)


def attended(batch: Any) -> Tensor | None:
    """Return the bool mask (B, T) of real tokens of a token batch; None for other batches."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def must_be_causal(model: nn.Module) -> None:
    """Raise BatchError for a language model whose positions see the tokens that they would predict.

    Only families that also have masked language models are tried out, by a few forward passes.
    """
    family, kind = getattr(getattr(model, "config", None), "model_type", ""), type(model).__name__
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(family)
    if masked is None or kind not in (masked, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)):
        return
    if not traits_of(model).causal:
        raise BatchError(
            f"{kind} is not a causal language model; pass `forward` to kfac.collect: its tokens "
            "see later ones, so a position does not predict the next token"
        )


def check_tokens(model: nn.Module, batch: Any, place: str) -> None:
    """Raise BatchError unless a batch can be given to a causal language model."""
    if isinstance(batch, str):
        raise BatchError(f"{place} is a text; make batches of texts with lm.batches(texts)")
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise BatchError(
            f"{place} must be a mapping with input_ids as a tensor, not a "
            f"{type(batch).__name__}; for other models pass `forward`"
        )
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    if len(shape) != 2 or not ids.numel() or ids.dtype not in (torch.int32, torch.int64):
        raise BatchError(
            f"{place}: input_ids must be integers of shape (B, T), not empty; they have "
            f"{ids.dtype} and shape {tuple(shape)}"
        )
    for key in ("attention_mask", "labels"):
        value = batch.get(key)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(
                f"{place}: {key} must be a tensor of shape {tuple(shape)}, not {found}"
            )
    mask: Any = batch.get("attention_mask")
    checked = isinstance(mask, Tensor) and hasattr(model, "config")
    for side, column in (("left", 0), ("right", -1)) if checked else ():
        padded = not bool(mask[:, column].all())
        if padded and not getattr(traits_of(model).within(shape[1]), side):
            raise BatchError(
                f"{place} is padded on the {side}, which changes the rows of this model "
                f"({type(model).__name__}): give texts and an `lm`, or batches of one length"
            )
    limit = position_limit(model)
    if limit is not None and shape[1] > limit:  # asked first: a sum waits for the device
        tokens = shape[1] if mask is None else int(mask.sum(1).max())
        check_length(model, tokens, place, BatchError)
    size = getattr(maybe_call(model, "get_input_embeddings"), "num_embeddings", None)
    if size is not None and bool(((ids < 0) | (ids >= size)).any()):
        raise BatchError(f"{place}: an id in input_ids is not in the model's vocabulary of {size}")


def on_its_device(batch: Any, model: nn.Module) -> Any:
    """Return a batch with all its tensors on the device that the model expects its input on."""
    device = input_device(model)
    # Offloaded weights are on the meta device; accelerate's hooks then move the inputs.
    return _moved(batch, torch.device("cpu") if device.type == "meta" else device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        # No gradient passes through tensors that were made in inference mode; a copy is made here.
        return batch.to(device, copy=batch.is_inference())
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch
