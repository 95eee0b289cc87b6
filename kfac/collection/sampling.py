"""Labels sampled from a model's softmax, reproducible for each sequence, and their gradients."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac.collection.batches import attended
from lirefs.errors import BatchError
from lirefs.model.untrusted.digest import tensor_bytes

# Elements of softmax worked on at a time. On a CPU 16 MB in float32, about what its cache holds: on
# one core and a vocabulary of 49,152 this takes 0.15 s for 1,016 positions; 2**26 takes 0.32 s. On
# a GPU few large kernels are faster than many small ones.
_CHUNK = {"cpu": 2**22, "cuda": 2**26}
_BLOCK = 256

EXACT_CLASSES = 256
"""Most classes whose labels are all enumerated: each costs a backward pass at each position."""


class RowSeeds:
    """Uniform random numbers for sequences, unaffected by batching, padding and order.

    A sequence's generator is seeded with SHA-256 of the collection's seed, the sequence's content
    and how often the same content came before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._seen: Counter[bytes] = Counter()

    def draw(self, contents: Sequence[bytes], where: Tensor, draws: int = 1) -> Tensor:
        """Return float64 numbers (draws, B, ...) on CPU, NaN where the mask `where` is false.

        `contents` are the `row_contents`. The first draws do not depend on how many follow.
        """
        where = where.cpu()
        result = torch.full((draws, *where.shape), float("nan"), dtype=torch.float64)
        for row, content in enumerate(contents):
            repeat = self._seen[content]
            self._seen[content] += 1
            key = hashlib.sha256(f"{self.seed} {repeat} ".encode() + content).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little"))
            # One dimension is kept so that rows of (B,) and (B, T) are filled alike.
            chosen = where[row : row + 1]
            result[:, row : row + 1][:, chosen] = torch.rand(
                draws, int(chosen.sum()), generator=generator, dtype=torch.float64
            )
        return result

    def skip(self, contents: Sequence[bytes]) -> None:
        """Count sequences that are drawn elsewhere: earlier, or by another process."""
        self._seen.update(contents)


def label_gradients(
    logits: Tensor,
    rows: Tensor,
    uniforms: Tensor | None,
    labels: Tensor | None,
    *,
    in_place: bool = False,
) -> Iterator[Tensor] | None:
    """Return the gradients of the summed negative log-likelihood of labels, one for each draw.

    Labels are int64 (n,), or sampled with `uniforms`, float64 (draws, n), for the `rows`, int64
    (n,), of the flattened logits (..., C). Gradients are softmax minus one-hot, like the logits and
    zero outside `rows`; each is valid until the next. None if a counted row is not finite.
    `in_place` writes them over the logits, of which all rows must be counted.
    """
    classes = logits.shape[-1]
    flat = logits.reshape(-1, classes)
    dtype = torch.promote_types(flat.dtype, torch.float32)
    rows = rows.to(flat.device)
    every = len(rows) == len(flat)
    gradient = flat if in_place else torch.empty_like(flat) if every else torch.zeros_like(flat)
    finite = torch.ones((), dtype=torch.bool, device=flat.device)
    if uniforms is not None:
        on_mps = flat.device.type == "mps"  # which has no float64
        uniforms = uniforms.to(torch.float32 if on_mps else torch.float64).to(flat.device)
        drawn = torch.empty(uniforms.shape, dtype=torch.int64, device=flat.device)
    else:
        assert labels is not None
        drawn = labels.to(flat.device)[None]
    chances = torch.empty(drawn.shape, dtype=dtype, device=flat.device)
    step = max(1, _CHUNK.get(flat.device.type, _CHUNK["cpu"]) // classes)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        index = part if every else rows[part]
        chunk = torch.softmax(flat[index], dim=-1, dtype=dtype)
        finite &= chunk[:, 0].isfinite().all()
        if uniforms is not None:
            for number, uniform in enumerate(uniforms):
                drawn[number, part] = sample_labels(chunk, uniform[part])
        chances[:, part] = chunk.gather(1, drawn[:, part].T).T
        gradient[index] = chunk.to(flat.dtype)
    if not bool(finite):
        return None

    def with_labels() -> Iterator[Tensor]:
        for label, chance in zip(drawn, chances, strict=True):
            gradient[rows, label] = (chance - 1).to(gradient.dtype)
            yield gradient.reshape(logits.shape)
            gradient[rows, label] = chance.to(gradient.dtype)

    return with_labels()


def exact_gradients(logits: Tensor, labelled: Tensor, place: str) -> Iterator[Tensor] | None:
    """Return the gradients whose outer products sum to the expectation over all labels.

    There is one for each class y and each position of a sequence: √p(y) · (softmax − one-hot of y)
    at this position of all sequences, and zero elsewhere. So no two positions of a sequence mix, as
    they do not in expectation, because their labels are drawn independently. Arguments and result
    are as for `label_gradients`, `labelled` is the bool mask (...) of rows.

    Raises:
        BatchError: There are more than `EXACT_CLASSES` classes.
    """
    classes = logits.shape[-1]
    if classes > EXACT_CLASSES:
        raise BatchError(
            f"{place}: labels='exact' needs a backward pass for each of {classes} classes at each "
            f"position, and takes at most {EXACT_CLASSES}; use labels='sampled' with more samples"
        )
    # (sequences, positions of one sequence, classes)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chances = torch.softmax(logits, dim=-1, dtype=dtype).reshape(len(logits), -1, classes)
    rows = labelled.to(logits.device).reshape(chances.shape[:2])
    if not bool(chances[rows].isfinite().all()):
        return None

    def each() -> Iterator[Tensor]:
        for position in rows.any(0).nonzero()[:, 0].tolist():
            chance = chances[:, position] * rows[:, position, None]
            for label in range(classes):
                gradient = torch.zeros_like(chances)
                gradient[:, position] = chance
                gradient[:, position, label] -= rows[:, position].to(dtype)
                gradient[:, position] *= chance[:, label, None].sqrt()
                yield gradient.reshape(logits.shape).to(logits.dtype)

    return each()


def sample_labels(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an int64 class (n,) from each row of probabilities (n, C) by uniforms (n,) in [0, 1).

    The cumulative distribution is inverted over blocks of classes, then inside the block that holds
    the draw: the table is read once, and sums are more exact than one long running sum.
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


def row_contents(batch: Any) -> list[bytes]:
    """Return the bytes that identify each sequence: its real tokens, or its part of all tensors."""
    mask = attended(batch)
    if mask is not None:
        real = mask.cpu().numpy()
        ids = batch["input_ids"].cpu().numpy().astype(np.int64)
        return [ids[row][real[row]].tobytes() for row in range(len(ids))]
    if isinstance(batch, Mapping):
        parts: Sequence[Any] = [batch[key] for key in sorted(batch)]
    else:
        parts = [batch] if isinstance(batch, Tensor) else batch
    tensors = [part.detach().cpu() for part in parts if isinstance(part, Tensor) and part.ndim]
    if not tensors:
        return []
    # The size that most tensors begin with is the batch's; another table in the batch is left out.
    rows = Counter(len(tensor) for tensor in tensors).most_common(1)[0][0]
    tensors = [tensor.contiguous() for tensor in tensors if len(tensor) == rows]
    return [
        b"".join(tensor[row].reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
        for row in range(rows)
    ]


def batch_digest(batch: Any, contents: Sequence[bytes]) -> bytes:
    """Return the SHA-256 of everything that the sums of a batch depend on, without padding.

    Added to `row_contents` are labels, on which a draw must not depend, and all other tensors.
    """
    sha = hashlib.sha256(str(len(contents)).encode())
    for content in contents:
        sha.update(hashlib.sha256(content).digest())
    real = attended(batch)
    if real is not None:
        real = real.cpu()
        # Which tokens follow each other without a gap, wherever the padding is.
        rows, places = real.nonzero(as_tuple=True)
        sha.update(tensor_bytes(places - real.long().argmax(1)[rows]))
        for key, value in sorted(batch.items()):
            if isinstance(value, Tensor) and key not in ("input_ids", "attention_mask"):
                read = value.cpu()[real] if value.shape == real.shape else value
                sha.update(f" {key} {read.dtype} {tuple(read.shape)} ".encode())
                sha.update(tensor_bytes(read))
    return sha.digest()
