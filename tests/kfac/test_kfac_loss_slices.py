import numpy as np
import pytest
import torch
from curvature_tools import assert_restored, batch, collect, llama, snapshot

import kfac
from kfac.analysis.losses import position_losses
from kfac.analysis.split_half import matrix_agreement
from lirefs.errors import BatchError, FactorsMismatchError, SpectrumError

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model():
    return llama(torch.float64)


@pytest.fixture(scope="module")
def factors(model):
    return collect(model, [batch(range(6))])


def test_slices_are_the_loss_of_the_moved_weight(model, factors):
    before = snapshot(model)
    batches = [batch([0, 1]), batch([2])]
    result = kfac.loss_slices(
        model, batches, factors, NAME, pairs=[(0, 0), (3, 10)], steps=[-0.1, 0.001, 0.05]
    )
    assert_restored(model, before)
    target = factors.targets(model, [NAME])[0]
    basis = factors.eigen(NAME)
    assert result.masses[1] == pytest.approx(float(basis.lam[3] * basis.mu[10]))
    weight = target.weight.clone()
    moved = weight + 0.05 * weight.norm() * torch.outer(basis.u_out[:, 3], basis.u_in[:, 10])
    try:
        target.parameter.data = moved
        with torch.no_grad():
            losses = torch.cat([position_losses(model, one)[0] for one in batches])
    finally:
        target.parameter.data = weight
    assert result.loss[1, 2] == pytest.approx(float(losses.mean()), rel=1e-9)
    # Near 0 the prediction is the tangent, checked against the measured loss.
    np.testing.assert_allclose(result.predicted[:, 1], result.loss[:, 1], rtol=1e-4)
    difference = result.predicted[:, 1] - result.predicted[:, 0]
    assert np.isfinite(difference).all()


def test_curvature_under_the_models_own_labels_is_the_mass():
    """On one linear layer K-FAC's curvature along a pair is the true second derivative."""
    torch.manual_seed(0)

    class Readout(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight.data.mul_(0.05)

        def forward(self, input_ids):
            # One input vector for all positions: A and G are then independent, K-FAC exact.
            states = self.table(torch.zeros_like(input_ids))
            return self.head(states)

    model = Readout().double()
    ids = torch.randint(0, 6, (1, 20000))
    factors = collect(model, [{"input_ids": ids}], kfac.find_targets(model, projections=["head"]))
    pairs = [(0, 0), (2, 0)]
    result = kfac.loss_slices(
        model, [{"input_ids": ids}], factors, "head", pairs=pairs, steps=[-0.5, 0.5]
    )
    with torch.no_grad():
        start = float(position_losses(model, {"input_ids": ids})[0].mean())
    # The odd part cancels, so this is the second derivative alone, whatever the labels are.
    measured = result.loss.sum(1) - 2 * start
    predicted = result.predicted.sum(1) - 2 * start
    np.testing.assert_allclose(measured, predicted, rtol=0.05)


def test_default_pairs_go_from_sharp_to_flat(model, factors):
    result = kfac.loss_slices(model, [batch([0])], factors, NAME, steps=[0.01])
    assert len(result.pairs) == 6
    assert (np.diff(result.masses) <= 0).all()


def test_named_errors(model, factors):
    for pairs in ([], [(0, 99999)], [(-1, 0)], [(0, 1, 2)], [(0, 1, 2)] * 2, [(0, 1), (2,)]):
        with pytest.raises(SpectrumError, match="pairs"):
            kfac.loss_slices(model, [batch([0])], factors, NAME, pairs=pairs)
    with pytest.raises(SpectrumError, match="steps"):
        kfac.loss_slices(model, [batch([0])], factors, NAME, steps=[float("nan")])
    with pytest.raises(BatchError, match="empty"):
        kfac.loss_slices(model, [], factors, NAME)
    with pytest.raises(FactorsMismatchError):
        kfac.loss_slices(llama(torch.float32), [batch([0])], factors, NAME)


def test_a_weight_that_the_loss_does_not_use():
    torch.manual_seed(0)

    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(6, 4)
            self.used, self.unused = (torch.nn.Linear(4, 6, bias=False) for _ in range(2))

        def forward(self, input_ids):
            states = self.table(input_ids)
            return self.used(states) + 0 * self.unused(states).detach()

    model, given = Detached(), {"input_ids": torch.randint(0, 6, (1, 9))}
    record = kfac.TargetRecord(6, 4, 8, "unused", kfac.weight_digest(model.unused.weight))
    sums = {"A.unused": torch.eye(4), "G.unused": torch.eye(6)}
    factors = kfac.Factors({"unused": record}, sums, seeds=[0], tokens=8)
    with pytest.raises(SpectrumError, match="does not depend"):
        kfac.loss_slices(model, [given], factors, "unused")


def brute_overlap(first, second, sharp):
    flats = [torch.linalg.eigh(one).eigenvectors[:, : len(one) - sharp] for one in (first, second)]
    return float((flats[0].T @ flats[1]).square().sum() / (len(first) - sharp))


def test_agreement_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    one, two = ((x := torch.randn(30, 12, generator=generator).double()).T @ x for _ in range(2))
    result = matrix_agreement(one, two, np.array([0.25, 0.5]))
    assert result.overlap[0] == pytest.approx(brute_overlap(one, two, 3))
    assert result.overlap[1] == pytest.approx(brute_overlap(one, two, 6))
    values, vectors = torch.linalg.eigh(one)
    np.testing.assert_allclose(result.own, values.flip(0))
    np.testing.assert_allclose(result.other[0], vectors[:, -1] @ two @ vectors[:, -1])
    same = matrix_agreement(one, one, np.array([0.25, 0.5]))
    np.testing.assert_allclose(same.overlap, 1)
    np.testing.assert_allclose(same.other, same.own, rtol=1e-9)


def test_random_matrices_agree_by_chance():
    generator = torch.Generator().manual_seed(1)
    one, two = ((x := torch.randn(400, 200, generator=generator).double()).T @ x for _ in range(2))
    result = matrix_agreement(one, two, np.array([0.2, 0.5, 0.8]))
    np.testing.assert_allclose(result.overlap, result.chance, atol=0.05)


def test_split_half_of_a_model(model, factors):
    halves = [collect(model, [batch(rows)]) for rows in (range(3), range(3, 6))]
    result = kfac.split_half(*halves, NAME)
    assert result.input.overlap.shape == result.input.cuts.shape
    assert len(result.output.own) == factors.records[NAME].out_features
    with pytest.raises(SpectrumError, match="cuts"):
        kfac.split_half(*halves, NAME, cuts=[0.0])
    other = collect(llama(torch.float32), [batch(range(3))])
    with pytest.raises(FactorsMismatchError):
        kfac.split_half(halves[0], other, NAME)
