"""Batches: what a language model can be given, which tokens count, and how it is run on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import BatchError
from lirefs.model.batching import batches_by_tokens
from lirefs.model.language_model import BATCH_TOKENS, LanguageModel

Forward = Callable[[nn.Module, Any], tuple[Tensor, ...]]
"""What `collect` takes as `forward`: model and batch to logits, mask and, where asked, labels."""


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
    real = attended(batch)
    if real is None:
        raise BatchError("a batch of a language model needs input_ids as a tensor")
    inputs: dict[str, Any] = {
        k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"
    }
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "position_ids" in accepted and "position_ids" not in inputs and not bool(real.all()):
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"the model returned a {type(output).__name__} without logits; pass `forward`"
        )
    counted = torch.zeros_like(real)
    torch.logical_and(real[:, :-1], real[:, 1:], out=counted[:, :-1])
    if isinstance(batch.get("labels"), Tensor):
        counted[:, :-1].logical_and_(batch["labels"][:, 1:] != -100)
    return logits, counted


def module_and_batches(
    model: nn.Module | LanguageModel, batches: Iterable[Any]
) -> tuple[nn.Module, Iterable[Any]]:
    """Return the bare module, and texts as batches of similar length, longest first.

    Args:
        model: A module, or an `lm`.
        batches: Batches as `collect` takes them; with an `lm` they may be texts.

    Raises:
        BatchError: One string alone, texts without a tokenizer, or texts among other batches.
    """
    if isinstance(batches, str):
        raise BatchError("a list of texts is needed, got one string: use [text]")
    if not isinstance(model, LanguageModel):
        return model, batches
    given = list(batches)
    texts = [one for one in given if isinstance(one, str)]
    if not texts:
        return model.model, given
    if len(texts) < len(given):
        raise BatchError("texts and other batches cannot be mixed")
    ids = model.encode(texts)
    groups = batches_by_tokens([len(row) for row in ids], BATCH_TOKENS)
    return model.model, [model.pad([ids[row] for row in rows], side="right") for rows in groups]


def attended(batch: Any) -> Tensor | None:
    """Return the bool mask (B, T) of real tokens of a token batch; None for other batches."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def data_labels(batch: Mapping[str, Any]) -> Tensor:
    """Return the token that follows each position, shape (B, T); the last column is unused."""
    given = batch.get("labels")
    following: Tensor = given if isinstance(given, Tensor) else batch["input_ids"]
    return following.roll(-1, 1)


def check_tokens(model: nn.Module, batch: Any, place: str) -> None:
    """Verify that a batch is one that a causal language model can be given.

    Args:
        model: If it names its embedding, as those of transformers do, ids must lie within it.
        batch: What was given as a batch.
        place: Name of the batch, for messages.

    Raises:
        BatchError: No mapping with integer input_ids (B, T), a mask or labels of another shape, or
            an id outside the vocabulary.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        if isinstance(batch, str):
            raise BatchError(f"{place} is a text: give the lm, which has the tokenizer")
        raise BatchError(
            f"{place} must be a mapping with input_ids as a tensor, not a "
            f"{type(batch).__name__}; for other models pass `forward`"
        )
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    if len(shape) != 2 or not ids.numel() or ids.dtype not in (torch.int32, torch.int64):
        raise BatchError(
            f"{place}: input_ids must be integers of shape (B, T), not empty, but are "
            f"{ids.dtype} of {tuple(shape)}"
        )
    for key in ("attention_mask", "labels"):
        value = batch.get(key)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(
                f"{place}: {key} must be a tensor of shape {tuple(shape)}, not {found}"
            )
    size = _vocabulary(model)
    if size is not None and bool(((ids < 0) | (ids >= size)).any()):
        raise BatchError(f"{place}: an id in input_ids is not in the model's vocabulary of {size}")


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that a model of transformers can embed."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def on_its_device(batch: Any, model: nn.Module) -> Any:
    """Return a batch with all its tensors on the device of the model's first weight."""
    parameter = next(model.parameters(), None)
    # Offloaded weights are on the meta device; accelerate's hooks then move the inputs.
    if parameter is None or parameter.is_meta:
        return _moved(batch, torch.device("cpu"))
    return _moved(batch, parameter.device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch
