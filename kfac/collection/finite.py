"""NaN and infinity: found by one pass over the memory, and named by where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lirefs.errors import NonFiniteError

ADVICE = (
    "if other sequences are fine, leave this one out; if not, the model's weights or its dtype "
    "are at fault (float16 overflows)"
)


def broken(tensors: Sequence[Tensor]) -> list[int]:
    """Return the indices of those tensors that hold NaN or infinity.

    Sums show that there is none, with one wait for the device. A sum can also overflow by itself,
    so the entries decide.
    """
    if not tensors:
        return []
    fine = torch.stack([one.sum().isfinite().to(tensors[0].device) for one in tensors])
    if bool(fine.all()):
        return []
    return [index for index, one in enumerate(tensors) if not bool(one.isfinite().all())]


def first_row(rows: Tensor) -> int:
    """Return the index of the first row (n, width) that holds NaN or infinity."""
    return int((~rows.isfinite().all(-1)).nonzero()[0])


def where(position: int, shape: Sequence[int]) -> str:
    """Say which row of a batch, and which position in it, an index into (B, ...) flattened is."""
    row, inside = divmod(position, math.prod(shape[1:]))
    return f"row {row}" if len(shape) == 1 else f"row {row}, position {inside}"


def logits_error(logits: Tensor, counted: Tensor, place: str) -> NonFiniteError:
    """Return the error for logits (B, ..., C) of which a counted row, (B, ...), is not finite.

    A single logit of minus infinity excludes a class; the largest of a row shows all else.
    """
    bad = ~logits.detach().amax(-1).isfinite() & counted.to(logits.device)
    at = where(int(bad.flatten().nonzero()[0]), counted.shape)
    return NonFiniteError(f"{place}, {at}: the logits hold NaN or infinity; {ADVICE}")
