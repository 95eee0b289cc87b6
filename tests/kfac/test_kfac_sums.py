"""Sums stay right under massive activations: float32 products, added to float64 tables."""

import pytest
import torch
from curvature_tools import assert_same, batch, collect, llama
from torch import nn

import kfac
from kfac.collection.covariance import CovarianceSums, InputRows
from lirefs.errors import KfacError, NonFiniteError

WIDTH, ROWS, BATCHES, MASSIVE = 16, 16, 4000, 337_270.0


def massive_sums(rows, tables):
    """Sum rows of which one channel has 337,270 times the median energy; some leaks to others."""
    generator = torch.Generator().manual_seed(0)
    massive = 0.1 * torch.randn(WIDTH, generator=generator)
    massive[0] = 1.0
    sums = CovarianceSums(tables, marginals=False, diagonal=False)
    for _ in range(BATCHES):
        values = torch.randn(ROWS, WIDTH, generator=generator)
        values += torch.randn(ROWS, 1, generator=generator) * massive * MASSIVE**0.5
        given = InputRows(values.to(rows), torch.arange(ROWS), torch.Size([1, ROWS]))
        sums.add_input("x", given)
    sums.finish()
    return sums.tables["A.x"].double()


def test_a_massive_activation_does_not_round_the_flat_directions_away():
    exact = massive_sums(torch.float64, torch.float64)
    values, vectors = torch.linalg.eigh(exact)
    flat = vectors[:, :-1]

    def error(*dtypes):
        along = (flat * (massive_sums(*dtypes) @ flat)).sum(0)
        return float((along / values[:-1] - 1).abs().max())

    assert error(torch.float32, torch.float32) > 0.02
    assert error(torch.float32, torch.float64) < 1e-5


@pytest.mark.parametrize("options", [{}, {"marginals": True}, {"diagonal": True}])
def test_by_default_the_products_are_float32_and_the_sums_float64(options):
    model = llama(torch.float32)
    batches = [batch([0, 1]), batch([2, 3]), batch([4])]
    ours = collect(model, batches, dtype=None, **options)
    assert {table.dtype for table in ours.sums.values()} == {torch.float64}
    whole = collect(model, batches, dtype=torch.float64, **options)
    for key, table in whole.sums.items():
        assert (ours.sums[key] - table).norm() < 1e-6 * table.norm()
        assert not torch.equal(ours.sums[key], table)
    half = collect(model, batches, dtype=torch.float32, **options)
    assert {table.dtype for table in half.sums.values()} == {torch.float32}
    assert_same(half, ours, 1e-5)


def test_a_float64_model_has_products_in_float64():
    model = llama()
    one, two = (collect(model, [batch([0, 1])], dtype=dtype) for dtype in (None, torch.float64))
    assert all(torch.equal(one.sums[key], table) for key, table in two.sums.items())


def test_wide_tables_are_added_a_tile_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 500, generator=generator)
    rows = InputRows(values, torch.arange(30), torch.Size([1, 30]))
    monkeypatch.setattr("kfac.collection.covariance._TILE", {"cpu": 1000})
    sums = CovarianceSums(torch.float64, marginals=False, diagonal="position")
    sums.add_input("x", rows)
    sums.add_gradient("x", values[:, :70], rows, 0.5)
    sums.finish()
    exact = values.double()
    expected = {
        "A.x": exact.T @ exact,
        "G.x": exact[:, :70].T @ exact[:, :70] / 2,
        "D.x": (exact[:, :70].square().T @ exact.square()) / 2,
    }
    assert sums.tables.keys() == expected.keys()
    for key, table in expected.items():
        assert (sums.tables[key] - table).abs().max() < 1e-4


def test_old_float32_factors_are_corrected_in_float32_and_merge_with_new_ones(tmp_path):
    model = llama(torch.float32)
    old = collect(model, [batch([0, 1])], dtype=torch.float32)
    old.save(tmp_path / "old")
    old = kfac.Factors.load(tmp_path / "old", model=model)
    new = collect(model, [batch([2, 3])], dtype=None)
    merged = kfac.merge([old, new])
    assert merged.dtype == torch.float64
    assert_same(merged, collect(model, [batch([0, 1]), batch([2, 3])], dtype=None), 1e-6)
    assert_same(kfac.subtract(merged, new), old, 1e-5)
    for factors, dtype in ((old, torch.float32), (new, torch.float64)):
        corrected = kfac.correct(model, [batch([0, 1])], factors, progress=False)
        assert corrected.sums["E." + corrected.names[0]].dtype == dtype
        corrected.save(tmp_path / "corrected")
        assert kfac.Factors.load(tmp_path / "corrected").digest == corrected.digest


def test_a_product_that_overflows_float32_is_named_before_the_float64_sum_hides_it():
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 4, bias=False))
    data = torch.full((4, 2), 1e25)
    with torch.no_grad():
        net[0].weight.fill_(1e-26)

    def forward(model, rows):
        return model(rows), torch.ones(len(rows), dtype=torch.bool)

    targets = kfac.named_targets(net, ["0"])
    with pytest.raises(
        NonFiniteError, match=r"overflows torch.float32; collect with dtype=torch.f"
    ):
        kfac.collect(net, [data], targets, forward=forward, progress=False)
    wide = kfac.collect(net, [data], targets, forward=forward, progress=False, dtype=torch.float64)
    assert wide.A("0").isfinite().all()
    with pytest.raises(KfacError, match=r"use torch.float32, torch.float64 or None"):
        kfac.collect(net, [data], targets, forward=forward, dtype=torch.float16)
