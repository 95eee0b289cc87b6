"""NaN and infinity: found by one pass over the memory, and named by their position."""

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


def not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Return the indices of the tensors that hold NaN or infinity."""
    if not tensors:
        return []
    # Finite sums show that there are none, with one wait for the device. A sum of finite entries
    # can overflow too, so after that the entries decide.
    fine = torch.stack([one.sum().isfinite().to(tensors[0].device) for one in tensors])
    if bool(fine.all()):
        return []
    return [index for index, one in enumerate(tensors) if not bool(one.isfinite().all())]


def first_not_finite_row(rows: Tensor) -> int:
    """Return the index of the first row (n, width) that holds NaN or infinity."""
    return int((~rows.isfinite().all(-1)).nonzero()[0])


def not_finite_row_error(
    place: str, position: int, shape: Sequence[int], what: str, advice: str = ADVICE
) -> NonFiniteError:
    """Return the error for one index into flattened (B, ...); `what` ends with "holds"."""
    row, inside = divmod(position, math.prod(shape[1:]))
    where = f"row {row}" if len(shape) == 1 else f"row {row}, position {inside}"
    return NonFiniteError(f"{place}, {where}: {what} NaN or infinity; {advice}")


def not_finite_logits_error(logits: Tensor, counted: Tensor, place: str) -> NonFiniteError:
    """Return the error for logits (B, ..., C) of which a counted row, (B, ...), is not finite.

    A single logit of minus infinity only excludes a class, so the largest of each row decides.
    """
    bad = ~logits.detach().amax(-1).isfinite() & counted.to(logits.device)
    return not_finite_row_error(
        place, int(bad.flatten().nonzero()[0]), counted.shape, "the logits hold"
    )
