"""Labels sampled from a model's softmax, reproducible for each sequence, and their gradient."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Elements of softmax worked on at a time: 16 MB in float32, about what a processor cache holds.
# On one core and a vocabulary of 49,152 this takes 0.15 s for 1,016 positions; 2**26 takes 0.32 s.
_CHUNK = 2**22
_BLOCK = 256


class RowSeeds:
    """Uniform random numbers that depend on what a sequence is, not on where it stands.

    The generator of a sequence is seeded with SHA-256 of the seed, the sequence's content and how
    often the same content came before, so batching, padding and order change no label.

    Args:
        seed: Seed of the whole collection.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._seen: Counter[bytes] = Counter()

    def draw(self, batch: Any, where: Tensor) -> Tensor:
        """Draw one number for each true entry of `where`, in row order.

        Args:
            batch: The batch; its tensors have the sequences first.
            where: bool, shape (B, ...).

        Returns:
            float64 on CPU, shape of `where`; NaN where it is false.
        """
        where = where.cpu()
        result = torch.full(where.shape, float("nan"), dtype=torch.float64)
        for row, content in enumerate(_row_contents(batch, where.shape[0])):
            repeat = self._seen[content]
            self._seen[content] += 1
            key = hashlib.sha256(f"{self.seed} {repeat} ".encode() + content).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
            # One dimension is kept so that rows of (B,) and (B, T) are filled alike.
            chosen = where[row : row + 1]
            count = int(chosen.sum())
            result[row : row + 1][chosen] = torch.rand(
                count, generator=generator, dtype=torch.float64
            )
        return result


def attended(batch: Any) -> Tensor | None:
    """Return the bool mask (B, T) of real tokens of a token batch; None for other batches."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.bool()
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def fisher_gradient(logits: Tensor, rows: Tensor, uniforms: Tensor) -> Tensor | None:
    """Sample labels and return the gradient of their summed negative log-likelihood.

    The gradient with respect to a row of logits is softmax minus one-hot, so no loss graph is
    needed: one softmax serves the draw and the gradient.

    Args:
        logits: Shape (..., C), any floating dtype.
        rows: int64 (n,), the counted rows of the flattened logits.
        uniforms: float64 (n,), one draw for each of these rows.

    Returns:
        Shape and dtype of `logits`, zero outside `rows`; None if a counted row is not finite.
    """
    classes = logits.shape[-1]
    flat = logits.reshape(-1, classes)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    rows, uniforms = rows.to(flat.device), uniforms.to(_wide(flat.device)).to(flat.device)
    gradient = torch.zeros_like(flat)
    finite = torch.ones((), dtype=torch.bool, device=flat.device)
    step = max(1, _CHUNK // classes)
    for start in range(0, len(rows), step):
        index = rows[start : start + step]
        chunk = torch.softmax(flat[index], dim=-1, dtype=dtype)
        labels = sample_labels(chunk, uniforms[start : start + step])
        finite &= chunk[:, 0].isfinite().all()
        chunk.scatter_add_(1, labels[:, None], chunk.new_full((len(labels), 1), -1.0))
        gradient[index] = chunk.to(flat.dtype)
    return gradient.reshape(logits.shape) if bool(finite) else None


def sample_labels(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a class for each row by inverting its cumulative distribution.

    The sum is first taken over blocks of classes, then inside the block that holds the draw: the
    table is read once, and the sums are more exact than one long running sum.

    Args:
        probabilities: Shape (n, C), non-negative.
        uniforms: Shape (n,), in [0, 1).

    Returns:
        int64, shape (n,).
    """
    classes = probabilities.shape[1]
    whole = classes // _BLOCK * _BLOCK
    sums = torch.cat(
        [
            probabilities[:, :whole].reshape(len(probabilities), whole // _BLOCK, _BLOCK).sum(-1),
            probabilities[:, whole:].sum(-1, keepdim=True),
        ],
        dim=1,
    ).to(uniforms.dtype)
    running = sums.cumsum(1)
    goal = uniforms[:, None] * running[:, -1:]
    block = torch.minimum((running <= goal).sum(1), _last_positive(sums))[:, None]
    inside = goal - (running - sums).gather(1, block)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=probabilities.device)
    values = probabilities.gather(1, columns.clamp(max=classes - 1)).to(uniforms.dtype)
    values = values.masked_fill(columns >= classes, 0.0)
    offset = (values.cumsum(1) <= inside).sum(1)
    return block[:, 0] * _BLOCK + torch.minimum(offset, _last_positive(values))


def _last_positive(table: Tensor) -> Tensor:
    """Return the last positive column of each row: rounding must not carry a draw past it."""
    places = torch.arange(table.shape[1], device=table.device)
    return torch.where(table > 0, places, torch.zeros_like(places)).amax(1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _row_contents(batch: Any, rows: int) -> list[bytes]:
    """Return the bytes that identify each row: its real tokens, or all its tensors."""
    mask = attended(batch)
    if mask is not None:
        real = mask.cpu().numpy()
        ids = batch["input_ids"].cpu().numpy().astype(np.int64)
        return [ids[row][real[row]].tobytes() for row in range(rows)]
    if isinstance(batch, Mapping):
        parts: Sequence[Any] = [batch[key] for key in sorted(batch)]
    else:
        parts = [batch] if isinstance(batch, Tensor) else batch
    tensors = [
        part.detach().cpu().contiguous()
        for part in parts
        if isinstance(part, Tensor) and part.ndim and part.shape[0] == rows
    ]
    return [
        b"".join(tensor[row].reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
        for row in range(rows)
    ]
