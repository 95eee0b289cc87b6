import time

import numpy as np
import pytest
import torch

from kfac.edits.selection import select_largest, select_separable
from lirefs.errors import KeepError, SpectrumError


def by_sorting(scores, keep, weights=None):
    """Take entries in descending order until the goal is reached."""
    flat = scores.double().flatten().numpy()
    held = flat if weights is None else weights.double().flatten().numpy()
    order = np.argsort(-flat, kind="stable")
    running = np.cumsum(held[order])
    needed = np.searchsorted(running, keep * held.sum() * (1 - 1e-12)) + 1
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:needed]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("power", [1, 8])
def test_largest_entries_are_those_of_a_sort(dtype, keep, power):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(40, 70, generator=generator, dtype=dtype) ** power
    chosen = select_largest(scores, keep)
    assert np.array_equal(chosen.table.numpy(), by_sorting(scores, keep))
    assert chosen.kept_mass == pytest.approx(
        float(scores[chosen.table].double().sum() / scores.double().sum()), rel=1e-9
    )
    assert chosen.pairs == int(chosen.table.sum())
    assert chosen.total_pairs == 2800


def test_weights_are_summed_and_scores_rank():
    generator = torch.Generator().manual_seed(4)
    scores, weights = (torch.rand(20, 30, generator=generator) for _ in range(2))
    chosen = select_largest(scores, 0.4, weights)
    assert np.array_equal(chosen.table.numpy(), by_sorting(scores, 0.4, weights))


def test_ties_zeros_and_extremes():
    chosen = select_largest(torch.ones(4, 5), 0.5)
    assert chosen.table.flatten().tolist() == [True] * 10 + [False] * 10
    assert select_largest(torch.zeros(3, 3), 0.5).pairs == 0
    assert select_largest(torch.tensor([[0.0, -0.0, 1.0]]), 0.9).table.tolist() == [
        [False, False, True]
    ]
    assert select_largest(torch.zeros(3, 3), 1).pairs == 9
    wide = torch.tensor([[1e-300, 1e300, 5e-324]], dtype=torch.float64)
    assert select_largest(wide, 0.5).table.tolist() == [[False, True, False]]


@pytest.mark.parametrize("bad", [[[-1.0]], [[float("nan")]], [[float("inf")]]])
def test_bad_scores(bad):
    with pytest.raises(SpectrumError):
        select_largest(torch.tensor(bad), 0.5)
    with pytest.raises(KeepError):
        select_largest(torch.ones(1, 1), 0)


def test_separable_in_any_order_equals_the_table():
    generator = torch.Generator().manual_seed(5)
    rows, columns = (torch.rand(n, generator=generator, dtype=torch.float64) for n in (30, 50))
    one = select_separable(rows, columns, 0.6)
    two = select_largest(torch.outer(rows, columns), 0.6)
    assert torch.equal(one.mask(torch.device("cpu")), two.mask(torch.device("cpu")))
    assert one.kept_mass == pytest.approx(two.kept_mass)
    assert one.pairs == two.pairs


@pytest.mark.parametrize("shape", ["rectangle", "output", "input"])
def test_shapes(shape):
    rows = torch.tensor([1.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    columns = torch.tensor([5.0, 1.0, 4.0], dtype=torch.float64)
    chosen = select_separable(rows, columns, 0.49, shape)
    # Rows: 0.49 and 0.7 of 10 are reached by 4 + 3. Columns: 0.49 by 5, 0.7 by 5 + 4.
    kept_rows = {"input": [0, 1, 2, 3]}.get(shape, [1, 2])
    kept_columns = {"input": [0], "output": [0, 1, 2], "rectangle": [0, 2]}[shape]
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[torch.tensor(kept_rows)[:, None], torch.tensor(kept_columns)] = True
    assert torch.equal(chosen.mask(torch.device("cpu")), expected)
    assert chosen.kept_mass >= 0.49
    assert chosen.kept_mass == pytest.approx(
        float(torch.outer(rows, columns)[expected].sum() / 100)
    )
    assert chosen.rank_bound == min(len(kept_rows), len(kept_columns))


def test_a_large_table_is_not_sorted():
    scores = torch.rand(1200, 1200) ** 6

    def seconds(function):
        start = time.process_time()
        function()
        return time.process_time() - start

    select_largest(scores, 0.6)
    quick = min(seconds(lambda: select_largest(scores, 0.6)) for _ in range(3))
    assert quick < seconds(lambda: scores.flatten().sort(descending=True))
