import numpy as np
import pytest
import torch
from curvature_tools import batch, collect, llama, snapshot

import kfac
from kfac import CurvatureEdit
from kfac.edits import rotation
from kfac.edits.rotation import keep_stairs


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def factors(model):
    targets = kfac.find_targets(model, projections="mlp")
    return collect(model, [batch(range(6))], targets, marginals=True)


SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1), (70, 130), (130, 70)]


def orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("width", [1, 16, 512])
@pytest.mark.parametrize("filled", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_masked_rotation(shape, filled, width, monkeypatch):
    monkeypatch.setattr(rotation, "_WIDTH", width)
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    u_out, u_in = orthogonal(rows, generator), orthogonal(columns, generator)
    drawn = np.random.default_rng(columns).integers(0, columns + 1, rows)
    counts = np.sort(np.minimum(drawn, round(filled * columns)))[::-1].copy()
    mask = torch.from_numpy(np.arange(columns)[None, :] < counts[:, None])
    expected = u_out @ ((u_out.T @ weight @ u_in) * mask) @ u_in.T
    before = weight.clone()
    torch.testing.assert_close(keep_stairs(weight, u_out, u_in, counts), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("estimator", ["kfac", "marginal", "input", "output"])
@pytest.mark.parametrize("shape", ["pairs", "rectangle", "output", "input"])
def test_an_edit_computes_what_the_whole_table_gives(model, factors, estimator, shape):
    edit = CurvatureEdit(factors, 0.6, estimator=estimator, shape=shape)
    before = snapshot(model)
    for target, weight in edit.prepare(model):
        u_out, u_in = factors.eigenvectors(target.name, target.weight)
        mask = edit._selection(target.name, None).mask(weight.device)
        expected = u_out @ ((u_out.T @ target.weight @ u_in) * mask) @ u_in.T
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(weight, before[target.name + ".weight"][1])
