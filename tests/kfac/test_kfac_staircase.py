import heapq
import time

import numpy as np
import pytest
import torch

from kfac import eigenbasis, staircase
from lirefs.errors import KeepError, SpectrumError

KINDS = ("smooth", "ties", "zeros", "one", "rank_one", "huge_range", "flat")


def spectrum(rng, kind, size):
    if kind == "smooth":
        values = rng.random(size)
    elif kind == "ties":
        values = rng.integers(1, 5, size).astype(float)
    elif kind == "zeros":
        values = rng.integers(0, 3, size).astype(float)
        values[0] = 2.0
    elif kind == "one":
        values = rng.random(1) + 0.1
    elif kind == "rank_one":
        values = np.zeros(size)
        values[0] = 3.0
    elif kind == "huge_range":
        values = 10.0 ** rng.uniform(-30, 3, size)
    else:
        values = np.full(size, 2.0)
    return np.sort(values)[::-1].copy()


def brute_force(lam, mu, keep):
    """Sort all pairs, stably, and take the shortest beginning that holds enough."""
    mass = np.outer(lam, mu)
    order = np.argsort(-mass.ravel(), kind="stable")
    running = np.cumsum(mass.ravel()[order])
    needed = int(np.searchsorted(running, keep * running[-1], side="left")) + 1
    kept = np.zeros(mass.size, dtype=bool)
    kept[order[:needed]] = True
    return kept.reshape(mass.shape)


@pytest.mark.parametrize("case", range(210))
def test_staircase_equals_brute_force(case):
    rng = np.random.default_rng(case)
    lam = spectrum(rng, KINDS[case % 7], int(rng.integers(1, 30)))
    mu = spectrum(rng, KINDS[(case // 7) % 7], int(rng.integers(1, 30)))
    keep = float(rng.choice([0.05, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99]))
    chosen = staircase(lam, mu, keep)
    np.testing.assert_array_equal(chosen.mask(), brute_force(lam, mu, keep))
    mass = np.outer(lam, mu)
    kept = mass[chosen.mask()]
    assert chosen.pairs == kept.size
    assert chosen.threshold == kept.min()
    assert kept.sum() >= keep * mass.sum() * (1 - 1e-15)
    assert np.sort(kept)[1:].sum() < keep * mass.sum()
    assert chosen.mass == pytest.approx(kept.sum(), rel=1e-12)
    assert chosen.kept_mass >= keep


def by_heap(lam, mu, keep):
    """Take one pair after the other from a heap until their mass suffices; return the counts."""
    goal, held = keep * float(np.outer(lam, mu).sum()), 0.0
    heap = [(-float(value * mu[0]), row, 0) for row, value in enumerate(lam)]
    heapq.heapify(heap)
    counts = np.zeros(len(lam), dtype=np.int64)
    while held < goal:
        mass, row, column = heapq.heappop(heap)
        held -= mass
        counts[row] += 1
        if column + 1 < len(mu):
            heapq.heappush(heap, (-float(lam[row] * mu[column + 1]), row, column + 1))
    return counts


@pytest.mark.parametrize("case", range(21))
def test_staircase_equals_a_heap(case):
    rng = np.random.default_rng(1000 + case)
    lam, mu = spectrum(rng, KINDS[case % 7], 40), spectrum(rng, KINDS[case // 7], 60)
    for keep in (0.1, 0.6, 0.9):
        np.testing.assert_array_equal(staircase(lam, mu, keep).counts, by_heap(lam, mu, keep))


@pytest.mark.parametrize("seed", range(20))
def test_rank_bound_is_attained_by_random_values(seed):
    rng = np.random.default_rng(seed)
    lam, mu = spectrum(rng, "smooth", 12), spectrum(rng, "huge_range", 9)
    chosen = staircase(lam, mu, 0.9)
    table = rng.normal(size=(12, 9)) * chosen.mask()
    assert np.linalg.matrix_rank(table, tol=1e-9) == chosen.rank_bound


def test_keep_one_takes_every_pair_also_without_mass():
    chosen = staircase([2.0, 1.0, 0.0], [1.0, 0.0], 1)
    assert chosen.pairs == chosen.total_pairs == 6
    assert chosen.kept_mass == 1.0


def test_no_mass_takes_no_pair():
    assert staircase([0.0, 0.0], [1.0], 0.5).pairs == 0


def test_products_do_not_underflow():
    chosen = staircase([3e-200, 1e-200], [1e-200, 1e-200], 0.7)
    assert chosen.counts.tolist() == [2, 0]


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, float("nan"), float("inf"), True, "0.5", None])
def test_bad_keep(keep):
    with pytest.raises(KeepError):
        staircase([1.0], [1.0], keep)


@pytest.mark.parametrize(
    "lam", [[], [[1.0]], [1.0, 2.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]]
)
def test_bad_spectrum(lam):
    with pytest.raises(SpectrumError):
        staircase(lam, [1.0], 0.5)


def test_large_staircase_is_fast():
    rng = np.random.default_rng(0)
    lam, mu = spectrum(rng, "smooth", 4096), spectrum(rng, "huge_range", 11008)
    begin = time.perf_counter()
    staircase(lam, mu, 0.6)
    assert time.perf_counter() - begin < 0.5  # about 0.015 s on one idle core


def test_eigenbasis():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, generator=generator)
    matrix = rows.T @ rows
    values, vectors = eigenbasis(matrix + torch.triu(torch.ones(8, 8), 1) * 1e-7)
    assert values.dtype == vectors.dtype == torch.float64
    assert (values.diff() <= 0).all()
    assert (values >= 0).all()
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("matrix", [torch.ones(2, 3), torch.ones(2), torch.full((2, 2), torch.nan)])
def test_eigenbasis_refuses(matrix):
    with pytest.raises(SpectrumError):
        eigenbasis(matrix)
