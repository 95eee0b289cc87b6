"""Bootstrap resamples: how often each item is drawn, in blocks that need not fit in memory."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lirefs.errors import checked_seed

Floats = npt.NDArray[np.float64]
T = TypeVar("T")

CHUNK = 1 << 20
"""Numbers that a bootstrap or permutation test holds in memory at once."""
WAITING = 1 << 24
"""Numbers of items that wait for one pass over the resamples."""


def resample_counts(n: int, resamples: int, seed: int | np.random.Generator) -> Floats:
    """How often each of n items is drawn in each bootstrap resample, shape (resamples, n).

    All at once: `Resamples` is the same for any number of items.
    """
    drawn = seed if isinstance(seed, np.random.Generator) else checked_seed(seed)
    generator = np.random.default_rng(drawn)
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class Resamples:
    """The matrix of `resample_counts`, shape (resamples, n), made whenever it is multiplied.

    Attributes:
        n: Number of items.
        resamples: Number of bootstrap resamples.
        seed: Seed of the counts.
    """

    n: int
    resamples: int
    seed: int

    def __matmul__(self, columns: Floats) -> Floats:
        """Sums over the items of each resample: (n,) to (resamples,), (n, k) to (resamples, k)."""
        return np.concatenate([counts @ columns for counts in self.blocks()])

    def blocks(self) -> Iterator[Floats]:
        """Its rows in order, as many at once as `CHUNK` allows.

        Whole eights, because the rows that are left over in a product are rounded otherwise.
        """
        generator = np.random.default_rng(self.seed)
        step = max(8, CHUNK // self.n // 8 * 8)
        for begin in range(0, self.resamples, step):
            yield resample_counts(self.n, min(step, self.resamples - begin), generator)


Draws = Floats | Resamples
"""How often each item is drawn in each resample: of shape (resamples, n), or made in blocks."""

Resampled = Generator[Sequence[Floats], Floats, T]
"""A result in the making. It yields, at most once, some numbers of the items, shape (k, n), is sent
their sums over each resample, shape (k, resamples), and returns the result."""


def finished(draws: Draws, results: Iterable[Resampled[T]]) -> list[T]:
    """The results, which share a pass over the resamples: making these takes most of the time."""
    found: dict[int, T] = {}
    waiting: dict[int, tuple[Resampled[T], Sequence[Floats]]] = {}
    for index, one in enumerate(results):
        try:
            waiting[index] = one, next(one)
        except StopIteration as end:  # it needs no resamples
            found[index] = end.value
        if sum(len(row) for _, table in waiting.values() for row in table) >= WAITING:
            found |= _answered(draws, waiting)
            waiting = {}
    found |= _answered(draws, waiting)
    return [found[index] for index in sorted(found)]


def _answered(
    draws: Draws, waiting: dict[int, tuple[Resampled[T], Sequence[Floats]]]
) -> dict[int, T]:
    rows = [row for _, table in waiting.values() for row in table]
    if not rows:
        return {}
    blocks = draws.blocks() if isinstance(draws, Resamples) else [draws]
    sums = iter(np.hstack([np.stack([counts @ row for row in rows]) for counts in blocks]))
    found = {}
    for index, (one, table) in waiting.items():
        try:
            one.send(np.stack([next(sums) for _ in table]))
        except StopIteration as end:
            found[index] = end.value
    return found
