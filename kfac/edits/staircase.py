"""The choice of the eigenvector pairs that carry the curvature: arrays in and out.

A pair (i, j) joins output eigenvector i and input eigenvector j. Its mass is lam[i] * mu[j], the
eigenvalue that K-FAC gives to it (Merullo et al. 2025, arXiv 2510.24256). Both spectra are sorted,
so the pairs of largest mass fill the first `counts[i]` columns of each row: a staircase. One
integer for each row describes the whole set, which can be found without listing pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lirefs.errors import KeepError, SpectrumError
from lirefs.statistics.intervals import Floats, Ints


@dataclass(frozen=True, eq=False)
class Staircase:
    """A set of pairs that holds the first `counts[i]` columns of each row i.

    Attributes:
        counts: int64, shape (rows,), never increasing.
        columns: Number of columns of the full table.
        mass: Mass of the kept pairs.
        total: Mass of all pairs.
        threshold: Smallest mass among kept pairs; infinity when none is kept.
        kept_mass: Kept mass as a share of the total; 1 without any mass at all. It is correct
            even where the masses themselves are out of the range of a float.
    """

    counts: Ints
    columns: int
    mass: float
    total: float
    threshold: float
    kept_mass: float

    def __repr__(self) -> str:
        return f"Staircase({self.pairs} of {self.total_pairs} pairs, mass {self.kept_mass:.4g})"

    @property
    def pairs(self) -> int:
        """Number of kept pairs."""
        return int(self.counts.sum())

    @property
    def total_pairs(self) -> int:
        """Number of pairs of the full table."""
        return len(self.counts) * self.columns

    @property
    def rank_bound(self) -> int:
        """Largest rank that a matrix with zeros outside the kept pairs can have.

        This is the least number of rows and columns that cover the staircase (König): the first k
        rows, and then the columns that row k still needs.
        """
        needed = np.append(self.counts, 0)
        return int((np.arange(len(needed)) + needed).min())

    def mask(self) -> NDArray[np.bool_]:
        """Return the set as a bool table of shape (rows, columns)."""
        return np.arange(self.columns)[None, :] < self.counts[:, None]


def check_keep(keep: float) -> float:
    """Return `keep` as a float, after checking that it is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise KeepError(f"keep={keep!r} must be a number in (0, 1]")
    return float(keep)


def staircase(lam: ArrayLike, mu: ArrayLike, keep: float) -> Staircase:
    """Select the fewest pairs whose mass reaches `keep` of the total.

    This is the choice of Merullo et al. 2025 (arXiv 2510.24256), section 5. Pairs are taken in
    descending mass lam[i] * mu[j]; among equal masses (equal as rounded float64 products) the lower
    row comes first, then the lower column. `keep=1` takes every pair, also those of zero mass, so
    that nothing is changed. With no mass at all and `keep<1` no pair is taken.

    The smallest kept mass is found by bisection over the float64 numbers themselves (at most 62
    steps); each step is one `searchsorted` for all rows and one dot product with prefix sums.

    Args:
        lam: Row eigenvalues, shape (rows,), non-negative and descending.
        mu: Column eigenvalues, shape (columns,), non-negative and descending.
        keep: Fraction of the total mass, in (0, 1].

    Raises:
        KeepError: `keep` is outside (0, 1].
        SpectrumError: A spectrum is empty, negative, not finite or not sorted.
    """
    keep = check_keep(keep)
    rows, row_scale = _spectrum(lam, "lam")
    columns, column_scale = _spectrum(mu, "mu")
    prefix = np.concatenate([[0.0], np.cumsum(columns)])

    def mass(counts: Ints) -> float:
        return float(rows @ prefix[counts])

    def result(counts: Ints, threshold: float) -> Staircase:
        share = mass(counts) / total if total > 0 else 1.0
        with np.errstate(over="ignore"):
            numbers = np.ldexp([mass(counts), total, threshold], row_scale + column_scale)
        kept, every, smallest = numbers.tolist()
        return Staircase(counts, len(columns), kept, every, smallest, share)

    full = np.full(len(rows), len(columns), dtype=np.int64)
    total = mass(full)
    if keep == 1.0:
        return result(full, float(rows[-1] * columns[-1]))
    if total == 0.0:
        return result(np.zeros_like(full), math.inf)
    goal = max(keep * total, math.ulp(0.0))  # the product underflows where keep is tiny

    # Bisection: `low` is the largest threshold known to keep enough. Non-negative floats are
    # ordered as their bit patterns, so halving the bits ends at neighbouring numbers.
    low, high = 1, int(np.float64(rows[0] * columns[0]).view(np.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if mass(_at_least(rows, columns, _from_bits(middle))) >= goal:
            low = middle
        else:
            high = middle
    threshold = _from_bits(low)
    above = _at_least(rows, columns, _from_bits(low + 1))
    ties = _at_least(rows, columns, threshold) - above

    # Only pairs of mass exactly `threshold` remain to choose from; rows are filled in order.
    before = mass(above)
    needed = max(1, math.ceil(min((goal - before) / threshold, float(ties.sum()))))
    while needed > 1 and before + (needed - 1) * threshold >= goal:
        needed -= 1
    while before + needed * threshold < goal and needed < ties.sum():
        needed += 1
    earlier = np.cumsum(ties) - ties
    return result(above + np.clip(needed - earlier, 0, ties), threshold)


def _spectrum(values: ArrayLike, name: str) -> tuple[Floats, int]:
    """Check a spectrum and scale it by a power of two; return it with the exponent taken out.

    The scaling is exact and avoids needless over- and underflow of products.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise SpectrumError(f"{name} must be a non-empty vector, not of shape {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise SpectrumError(f"{name} must be finite and non-negative")
    if (np.diff(array) > 0).any():
        raise SpectrumError(f"{name} must be sorted in descending order")
    exponent = math.frexp(float(array[0]))[1]
    return np.ldexp(array, -exponent), exponent


def _from_bits(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def _at_least(rows: Floats, columns: Floats, threshold: float) -> Ints:
    """Count for each row the columns whose product with it is at least `threshold` (> 0)."""
    with np.errstate(divide="ignore", over="ignore"):
        limits = threshold / rows
    ascending = columns[::-1]
    counts = len(columns) - np.searchsorted(ascending, limits, side="left").astype(np.int64)
    # The quotient is rounded, so it may be off by a few neighbouring values: the product decides.
    padded = np.concatenate([[np.inf], columns, [0.0]])
    while True:
        with np.errstate(invalid="ignore"):
            too_many = (counts > 0) & (rows * padded[counts] < threshold)
            too_few = rows * padded[counts + 1] >= threshold
        if not (too_many.any() or too_few.any()):
            return counts
        # A count moves by a whole run of equal columns, so that long ties cost one step.
        fewer = np.searchsorted(ascending, padded[counts[too_many]], side="right")
        more = np.searchsorted(ascending, padded[counts[too_few] + 1], side="left")
        counts[too_many], counts[too_few] = len(columns) - fewer, len(columns) - more
