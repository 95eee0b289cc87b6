"""Which pairs are kept: a staircase over two spectra, or the largest entries of any table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kfac.edits.staircase import Staircase, check_keep, staircase
from lirefs.errors import SpectrumError
from lirefs.statistics.intervals import Floats, Ints

# By dtype: the integer type whose order is that of the scores, and how many low bits to drop to get
# the bin of a score.
_LEADING = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 46)}

SHAPES = ("pairs", "rectangle", "output", "input")


class Selection(Protocol):
    """A set of kept pairs of one target."""

    @property
    def pairs(self) -> int:
        """Number of kept pairs."""

    @property
    def total_pairs(self) -> int:
        """Number of all pairs."""

    @property
    def kept_mass(self) -> float:
        """Kept share of the total score."""

    @property
    def rank_bound(self) -> int:
        """Largest rank that a matrix with zeros outside the kept pairs can have."""

    def mask(self, device: torch.device) -> Tensor:
        """Return the set as a bool table (rows, columns) on a device."""


@dataclass(frozen=True, eq=False)
class OrderedSelection:
    """A staircase over rows and columns in the order of their eigenvalues.

    Attributes:
        stairs: The staircase, largest eigenvalues first.
        row_ranks: int64 (rows,), rank of each row in that order, from 0.
        column_ranks: int64 (columns,), rank of each column.
    """

    stairs: Staircase
    row_ranks: Ints
    column_ranks: Ints

    def __repr__(self) -> str:
        return (
            f"OrderedSelection({self.pairs} of {self.total_pairs} pairs, mass {self.kept_mass:.4g})"
        )

    @property
    def pairs(self) -> int:
        """Number of kept pairs."""
        return self.stairs.pairs

    @property
    def total_pairs(self) -> int:
        """Number of all pairs."""
        return self.stairs.total_pairs

    @property
    def kept_mass(self) -> float:
        """Kept share of the total mass."""
        return self.stairs.kept_mass

    @property
    def rank_bound(self) -> int:
        """See `Staircase.rank_bound`."""
        return self.stairs.rank_bound

    def mask(self, device: torch.device) -> Tensor:
        """Return the set as a bool table (rows, columns) on a device."""
        counts = torch.from_numpy(self.stairs.counts[self.row_ranks]).to(device)
        ranks = torch.from_numpy(self.column_ranks).to(device)
        return ranks[None, :] < counts[:, None]


@dataclass(frozen=True, eq=False)
class TableSelection:
    """A set of pairs given as a bool table on CPU.

    Attributes:
        table: Shape (rows, columns).
        kept_mass: Kept share of the total score.
    """

    table: Tensor
    kept_mass: float

    def __repr__(self) -> str:
        return (
            f"TableSelection({self.pairs} of {self.total_pairs} pairs, mass {self.kept_mass:.4g})"
        )

    @property
    def pairs(self) -> int:
        """Number of kept pairs."""
        return int(self.table.sum())

    @property
    def total_pairs(self) -> int:
        """Number of all pairs."""
        return self.table.numel()

    @property
    def rank_bound(self) -> int:
        """Number of rows or of columns that hold a kept pair, the smaller of the two."""
        return min(int(self.table.any(0).sum()), int(self.table.any(1).sum()))

    def mask(self, device: torch.device) -> Tensor:
        """Return the set as a bool table (rows, columns) on a device."""
        return self.table.to(device)


def select_separable(
    rows: Tensor, columns: Tensor, keep: float, shape: str = "pairs"
) -> OrderedSelection:
    """Select pairs that hold `keep` of all scores rows[i] * columns[j]; spectra are in any order.

    The shapes are "pairs": the fewest pairs; "output" or "input": the fewest output (input)
    eigenvectors, each with all its pairs; "rectangle": the fewest of both sides, each holding the
    square root of `keep` of its own sum.
    """
    lam, mu = rows.double().cpu().numpy(), columns.double().cpu().numpy()
    row_order, column_order = (np.argsort(-one, kind="stable") for one in (lam, mu))
    lam, mu = lam[row_order], mu[column_order]
    if shape == "pairs":
        stairs = staircase(lam, mu, keep)
    else:
        share = keep**0.5 if shape == "rectangle" else keep
        kept_rows = len(lam) if shape == "input" else int(staircase(lam, [1.0], share).pairs)
        kept_columns = len(mu) if shape == "output" else int(staircase([1.0], mu, share).pairs)
        stairs = _rectangle(lam, mu, kept_rows, kept_columns)
    return OrderedSelection(stairs, np.argsort(row_order), np.argsort(column_order))


def select_largest(scores: Tensor, keep: float, weights: Tensor | None = None) -> TableSelection:
    """Select the fewest entries of largest score that hold `keep` of the sum of weights.

    Scores (rows, columns) and weights (None: the scores) are non-negative. Among equal scores the
    lower row comes first, then the lower column; a keep of 1 takes every entry.

    Non-negative floats are ordered like their bit patterns, so a weighted histogram of the leading
    bits finds the bin where the goal is reached, and only that bin is sorted.
    """
    keep = check_keep(keep)
    flat = _flat(scores, "scores")
    summed = flat if weights is None else _flat(weights, "weights")
    if keep == 1:
        return TableSelection(torch.ones(scores.shape, dtype=torch.bool), 1.0)
    integers, shift = _LEADING[flat.dtype]
    bins = flat.view(integers) >> shift
    sums = torch.bincount(bins, summed.double())
    total = float(sums.sum())
    if total == 0:
        return TableSelection(torch.zeros(scores.shape, dtype=torch.bool), 1.0)
    goal = max(keep * total, math.ulp(0.0))  # the product underflows where keep is tiny
    above = sums.flip(0).cumsum(0).flip(0)  # mass of a bin and of all larger ones
    edge = max(int((above >= goal).sum()) - 1, 0)
    kept = bins > edge
    before = float(sums[edge + 1 :].sum())
    inside = (bins == edge).nonzero()[:, 0]
    order = inside[torch.sort(flat[inside], descending=True, stable=True).indices]
    running = before + summed[order].double().cumsum(0)
    needed = min(int((running < goal).sum()) + 1, len(order))
    kept[order[:needed]] = True
    mass = float(running[needed - 1])
    return TableSelection(kept.reshape(scores.shape), min(mass / total, 1.0))


def _flat(values: Tensor, name: str) -> Tensor:
    flat = values.detach().cpu().reshape(-1)
    if flat.dtype not in _LEADING:
        flat = flat.float()
    if not bool(flat.isfinite().all()) or bool((flat < 0).any()):
        raise SpectrumError(f"{name} must be finite and non-negative")
    return flat + 0.0  # turns -0.0, whose bit pattern is negative, into 0.0


def _rectangle(lam: Floats, mu: Floats, rows: int, columns: int) -> Staircase:
    counts = np.zeros(len(lam), dtype=np.int64)
    counts[:rows] = columns
    mass, total = (float(a.sum() * b.sum()) for a, b in ((lam[:rows], mu[:columns]), (lam, mu)))
    smallest = float(lam[rows - 1] * mu[columns - 1]) if rows and columns else float("inf")
    return Staircase(counts, len(mu), mass, total, smallest, mass / total if total > 0 else 1.0)
