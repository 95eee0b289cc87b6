"""The settings of a collection that do not depend on what is summed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from kfac.collection.batches import Forward
from lirefs.errors import KfacError, checked_seed, must_be, whole_number

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """How to run the passes; `collect` explains each field."""

    seed: int
    labels: str
    samples: int
    forward: Forward | None
    dtype: torch.dtype | None
    head_dtype: torch.dtype | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: float
    progress: bool

    def __post_init__(self) -> None:
        if self.labels not in ("sampled", "data", "exact"):
            raise KfacError(f"labels={self.labels!r}: use 'sampled', 'data' or 'exact'")
        object.__setattr__(self, "seed", checked_seed(self.seed, KfacError))
        whole_number(self.samples, "samples", error=KfacError)
        if self.samples < 1 or (self.labels != "sampled" and self.samples != 1):
            raise KfacError(f"samples={self.samples}: at least 1, and 1 unless labels are sampled")
        if self.head_dtype is not None:
            must_be(self.head_dtype, torch.dtype, "head_dtype", KfacError)
            if self.head_dtype not in _FLOATS:
                raise KfacError(f"head_dtype={self.head_dtype}: use a floating-point type")
            if self.forward is not None or self.labels == "exact":
                raise KfacError("head_dtype cannot be used with `forward` or labels='exact'")
