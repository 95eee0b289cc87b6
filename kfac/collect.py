"""One pass over data, with labels sampled from the model: from batches to factors."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.errors import BatchError, NonFiniteError, TargetError
from kfac.factors import Factors, weight_digest
from kfac.hooks import CovarianceSums, as_guest
from kfac.sampling import RowSeeds, attended, fisher_gradient
from kfac.targets import Target

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    *,
    seed: int = 0,
    forward: Forward | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Factors:
    """Collect the K-FAC factors of some targets over some data.

    Labels are sampled from the model's own softmax: the true Fisher, not the empirical one
    (Merullo et al. 2025, arXiv 2510.24256, section 7). The draw of a position depends on `seed`, on
    the tokens of its sequence and on how often that sequence came before, never on batching,
    padding or order. The loss is summed over counted positions, so sums of any batches add up.

    The model is left as it was found: hooks removed, `requires_grad` flags and training mode
    restored, no gradient stored, also after an error or an interrupt.

    Args:
        model: Any module; its own device and dtype are used.
        batches: Mappings with input_ids (B, T), optional attention_mask (B, T), optional labels
            (B, T) whose -100 marks tokens that are not predicted. Position t is counted if t and
            t+1 are attended and label t+1 is not -100. With `forward`: mappings or sequences of
            tensors with B first, or one such tensor.
        targets: From `find_targets` or `named_targets`.
        seed: Seed of the sampled labels.
        forward: For models that are not causal language models: called as forward(model, batch),
            returns logits (B, ..., C) and a bool mask of the counted positions. The mask has the
            shape of the targets' input without its last axis: (B,) for an MLP, (B, T) for
            a transformer. If the logits have that shape too, a label is drawn for each counted
            position; otherwise (a ViT: one row of logits for each image) for each row of logits.
        dtype: Of the sums, float32 or float64.
        progress: Show a bar with tokens (counted positions) per second.
        provenance: JSON values to keep with the factors: where the data came from.

    Returns:
        The factors, on CPU.

    Raises:
        BatchError: No batch, a malformed batch, or no counted position at all.
        NonFiniteError: NaN or infinity in logits, activations or gradients.
        TargetError: No targets, one that is never called, or one that cannot reach the logits.
        KfacError: A target's input does not have the positions of the mask.
    """
    if not targets:
        raise TargetError("no targets were given")
    digests = {target.name: weight_digest(target.weight) for target in targets}
    sums = CovarianceSums(targets, dtype)
    seeds = RowSeeds(seed)
    tokens = done = 0
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(as_guest(model))
        stack.enter_context(sums.hooked())
        bar = tqdm(batches, desc="factors", unit="batch", disable=not progress)
        for batch in stack.enter_context(bar):
            if forward is None:
                _check_tokens(batch, done)
            ready = _to_device(batch, _device(model))
            sums.begin()
            logits, mask = (forward or language_model_forward)(model, ready)
            tokens += _add_batch(logits, mask, ready, sums, seeds, done)
            done += 1
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    if not done:
        raise BatchError("the iterable of batches is empty")
    if not tokens:
        raise BatchError(f"none of the {done} batches has a counted position")
    records, a_sums, g_sums = sums.finish(digests)
    return Factors(records, a_sums, g_sums, seeds=[seed], tokens=tokens, provenance=provenance)


def language_model_forward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model; the default `forward` of `collect`.

    Args:
        model: Takes input_ids and the batch's other tensors; returns logits or an output with
            a `logits` field.
        batch: As described in `collect`.

    Returns:
        Logits (B, T, vocabulary) and the bool mask (B, T) of positions that predict a counted
        token.
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


def _add_batch(
    logits: Tensor, mask: Tensor, batch: Any, sums: CovarianceSums, seeds: RowSeeds, index: int
) -> int:
    """Draw labels, backpropagate, add to the sums; return the number of counted positions."""
    shape = logits.shape[:-1]
    if not shape or mask.ndim == 0 or mask.shape[0] != shape[0]:
        raise BatchError(
            f"batch {index}: logits {tuple(logits.shape)} and mask {tuple(mask.shape)} must both "
            "begin with the number of sequences"
        )
    mask = mask.bool()
    labelled = mask if mask.shape == shape else torch.ones(shape, dtype=torch.bool)
    real = attended(batch)
    # Drawing at every real token, counted or not, makes a label independent of the labels mask.
    drawn = real if real is not None and real.shape == shape else labelled
    uniforms = seeds.draw(batch, drawn | labelled.to(drawn.device))
    counted = int(mask.sum())
    if not counted:
        return 0
    if not logits.requires_grad:
        raise TargetError("the logits depend on no target: the forward pass calls none of them")
    rows = labelled.flatten().nonzero()[:, 0]
    gradient = fisher_gradient(logits.detach(), rows, uniforms[labelled.cpu()])
    if gradient is None:
        raise NonFiniteError(f"batch {index}: the logits hold NaN or infinity")
    sums.add_inputs(mask)
    torch.autograd.backward(logits, gradient)
    sums.check_finite(index)
    return counted


def _check_tokens(batch: Any, index: int) -> None:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise BatchError(
            f"batch {index} must be a mapping with input_ids as a tensor, not a "
            f"{type(batch).__name__}; for other models pass `forward`"
        )
    shape = batch["input_ids"].shape
    if len(shape) != 2:
        raise BatchError(f"batch {index}: input_ids must have shape (B, T), not {tuple(shape)}")
    for key in ("attention_mask", "labels"):
        value = batch.get(key)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(
                f"batch {index}: {key} must be a tensor of shape {tuple(shape)}, not {found}"
            )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to_device(value, device) for value in batch]
    return batch
