import pytest
import torch
from curvature_tools import Deep, assert_same, batch, collect, draws, llama, mlp_forward
from torch import nn

import kfac
from kfac import Factors
from kfac.collection.sampling import sample_labels
from lirefs.errors import EstimatorError, FactorsMismatchError, KfacError

ENDINGS = ["0", "1"]


class Bent(Deep):
    """Two layers with a bend: for many inputs K-FAC is not exact, EK-FAC's table is."""

    def forward(self, x):
        return self.layers[1](self.layers[0](x).tanh())


@pytest.fixture
def bent():
    torch.manual_seed(1)
    model, x = Bent().double(), torch.randn(7, 3, dtype=torch.float64)
    return model, x, kfac.find_targets(model, projections=ENDINGS)


def gradients(model, x, name, labels):
    """Return autograd's weight gradient of each example, shape (N, out, in)."""
    result = []
    for row, label in zip(x, labels):
        loss = nn.functional.cross_entropy(model(row[None]), label[None], reduction="sum")
        result.append(torch.autograd.grad(loss, model.get_submodule(name).weight)[0])
    return torch.stack(result)


def sampled(model, x):
    return sample_labels(model(x).softmax(-1).detach(), draws(x))


def everything(model, x, targets, **kwargs):
    options = {"forward": mlp_forward, **kwargs}
    factors = collect(model, [x], targets, marginals=True, diagonal=True, **options)
    return kfac.correct(model, [x], factors, progress=False, **options)


def test_tables_are_the_diagonal_of_the_fisher(bent):
    model, x, targets = bent
    factors = everything(model, x, targets)
    assert factors.estimators == list(kfac.ESTIMATORS)
    for target in targets:
        gradient = gradients(model, x, target.name, sampled(model, x))
        diagonal = factors.curvature(target.name, "diagonal")
        torch.testing.assert_close(diagonal.table, gradient.square().mean(0))
        assert not diagonal.rotated
        basis = factors.eigen(target.name)
        rotated = basis.u_out.T @ gradient @ basis.u_in
        corrected = factors.curvature(target.name, "ekfac")
        torch.testing.assert_close(corrected.table, rotated.square().mean(0))
        # The correction is nearest in the Frobenius norm among diagonals of that basis.
        fisher = torch.einsum("nij,nkl->ijkl", rotated, rotated) / len(x)
        flat = fisher.flatten(0, 1).flatten(1)
        plain = factors.curvature(target.name).mass().flatten().diag()
        assert (flat - corrected.table.flatten().diag()).norm() < (flat - plain).norm()


def test_ekfac_is_kfac_where_kfac_is_exact():
    torch.manual_seed(3)
    model, x = Deep().double(), torch.randn(1, 3, dtype=torch.float64)
    x = x.expand(50, 3)
    factors = everything(model, x, kfac.find_targets(model, projections=ENDINGS))
    for name in factors.names:
        plain = factors.curvature(name).mass()
        for estimator in ("ekfac", "marginal"):
            torch.testing.assert_close(factors.curvature(name, estimator).mass(), plain)


def test_ekfac_converges_to_enumeration_over_labels(bent):
    model, x, targets = bent
    chances = model(x).softmax(-1).detach()
    errors = []
    for count in (40, 4000):
        factors = everything(model, x.repeat(count, 1), targets)
        worst = 0.0
        for target in targets:
            basis = factors.eigen(target.name)
            exact = 0
            for label in range(5):
                gradient = gradients(model, x, target.name, torch.full((7,), label))
                rotated = (basis.u_out.T @ gradient @ basis.u_in).square()
                exact = exact + (chances[:, label, None, None] * rotated).mean(0)
            found = factors.curvature(target.name, "ekfac").table
            worst = max(worst, float((found - exact).norm() / exact.norm()))
        errors.append(worst)
    assert errors[0] < 4 / (40 * 7) ** 0.5
    assert errors[1] < 4 / (4000 * 7) ** 0.5


def test_marginals_have_the_sums_of_the_ekfac_table(bent):
    model, x, targets = bent
    factors = everything(model, x, targets, samples=3)
    for name in factors.names:
        table = factors.curvature(name, "ekfac").table
        curvature = factors.curvature(name, "marginal")
        assert curvature.rotated
        torch.testing.assert_close(curvature.mass().sum(0), table.sum(0))
        torch.testing.assert_close(curvature.mass().sum(1), table.sum(1))
        assert curvature.total == pytest.approx(float(table.sum()))


def test_one_sided_estimators(bent):
    model, x, targets = bent
    factors = collect(model, [x], targets, forward=mlp_forward)
    name = targets[0].name
    basis = factors.eigen(name)
    assert torch.equal(factors.curvature(name, "input").mu, basis.mu)
    assert (factors.curvature(name, "input").lam == 1).all()
    assert torch.equal(factors.curvature(name, "output").lam, basis.lam)
    assert factors.estimators == ["kfac", "input", "output"]
    for estimator, hint in (("ekfac", "correct"), ("marginal", "marg"), ("diagonal", "diagonal")):
        with pytest.raises(EstimatorError, match=hint):
            factors.curvature(name, estimator)
    with pytest.raises(EstimatorError, match="unknown"):
        factors.curvature(name, "kfca")


def test_data_labels_are_the_empirical_fisher():
    model = llama()
    ids = batch([0])["input_ids"]
    factors = collect(model, [batch([0]), batch([2], "left", 2)], labels="data")
    assert factors.labels == "data"
    target = kfac.find_targets(model)[3]
    kept = []
    total = 0
    for ids in (batch([0])["input_ids"], batch([2])["input_ids"]):
        hook = target.module.register_forward_hook(lambda m, a, out: kept.append(out) or None)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        hook.remove()
        loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept.pop())
        total = total + gradient[0].T @ gradient[0]
    torch.testing.assert_close(factors.G(target.name) * factors.tokens, total)


def test_data_labels_of_another_model_come_from_forward(bent):
    model, x, targets = bent
    labels = torch.arange(7) % 5

    def forward(model, rows):
        return model(rows), torch.ones(len(rows), dtype=torch.bool), labels

    factors = collect(model, [x], targets, forward=forward, labels="data", diagonal=True)
    gradient = gradients(model, x, "layers.0", labels)
    table = factors.curvature("layers.0", "diagonal").table
    torch.testing.assert_close(table, gradient.square().mean(0))
    with pytest.raises(KfacError, match="third value"):
        collect(model, [x], targets, forward=mlp_forward, labels="data")


def test_samples_average_and_begin_with_the_single_draw(bent):
    model, x, targets = bent
    one = collect(model, [x], targets, forward=mlp_forward)
    many = collect(model, [x], targets, forward=mlp_forward, samples=500)
    assert torch.equal(one.A("layers.0"), many.A("layers.0"))
    logits = model(x).detach()
    chances = logits.softmax(-1)
    exact = torch.diag(chances.mean(0)) - chances.T @ chances / len(x)
    error = (many.G("layers.1") - exact).norm() / exact.norm()
    assert error < 4 / (500 * 7) ** 0.5 < (one.G("layers.1") - exact).norm() / exact.norm()


@pytest.mark.parametrize("arguments", [{"labels": "gold"}, {"samples": 0}, {"dtype": torch.half}])
def test_bad_options(bent, arguments):
    model, x, targets = bent
    with pytest.raises(KfacError, match=next(iter(arguments))):
        collect(model, [x], targets, forward=mlp_forward, **arguments)


def all_of(model, batches, **kwargs):
    targets = kfac.find_targets(model, layers=[1], projections="mlp")
    factors = collect(model, batches, targets, marginals=True, diagonal=True)
    return kfac.correct(model, batches, factors, progress=False, **kwargs)


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_corrections_do_not_depend_on_batching(per):
    model = llama()
    one = all_of(model, [batch(range(6))], per=per)
    for batches in ([batch([r]) for r in (5, 4, 3, 2, 1, 0)], [batch(range(6), "left", extra=3)]):
        two = all_of(model, batches, per=per)
        assert_same(one, two, 1e-9)
        for name in one.names:
            for estimator in ("marginal", "diagonal", "ekfac"):
                a, b = (f.curvature(name, estimator).mass() for f in (one, two))
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * float(a.max()))


def test_gradient_of_a_whole_sequence():
    model = llama()
    factors = all_of(model, [batch([0])], per="sequence", labels="data")
    target = kfac.find_targets(model, layers=[1], projections=["down_proj"])[0]
    ids = batch([0])["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, target.parameter)
    basis = factors.eigen(target.name)
    expected = (basis.u_out.T @ gradient @ basis.u_in).square() / factors.tokens
    torch.testing.assert_close(factors.curvature(target.name, "ekfac").table, expected)


def test_save_and_load_keeps_the_bases(tmp_path):
    model = llama(torch.float32)
    factors = all_of(model, [batch(range(6))])
    factors.save(tmp_path / "f.safetensors")
    loaded = Factors.load(tmp_path / "f.safetensors", model=model)
    assert loaded.digest == factors.digest
    assert loaded.estimators == factors.estimators
    for name in factors.names:
        assert torch.equal(loaded.eigen(name).u_in, factors.eigen(name).u_in)
        for estimator in kfac.ESTIMATORS:
            a, b = (f.curvature(name, estimator).mass() for f in (factors, loaded))
            assert torch.equal(a, b)


def test_merge_with_weights_and_subtract():
    model = llama()
    targets = kfac.find_targets(model, layers=[1])
    parts = [
        collect(model, [batch(rows)], targets, marginals=True, diagonal=True)
        for rows in ([0, 1], [2, 3, 4], [5])
    ]
    name = targets[0].name
    whole = kfac.merge(parts)
    assert_same(whole, kfac.merge([kfac.merge(parts[:2]), parts[2]]), 1e-12)
    without = kfac.subtract(whole, parts[1])
    assert_same(without, kfac.merge([parts[0], parts[2]]), 1e-9)
    assert without.tokens == parts[0].tokens + parts[2].tokens
    weighted = kfac.merge(parts, [1, 2, 1])
    for letter in ("A", "G"):
        means = [getattr(part, letter)(name) for part in parts]
        expected = (means[0] + 2 * means[1] + means[2]) / 4
        torch.testing.assert_close(getattr(weighted, letter)(name), expected)
    diagonal = [part.curvature(name, "diagonal").table for part in parts]
    torch.testing.assert_close(
        weighted.curvature(name, "diagonal").table,
        (diagonal[0] + 2 * diagonal[1] + diagonal[2]) / 4,
    )
    assert weighted.tokens == whole.tokens
    assert weighted.provenance["weights"] == [1.0, 2.0, 1.0]
    for weights in ([1, 2], [1, 0, 1]):
        with pytest.raises(KfacError, match="weights"):
            kfac.merge(parts, weights)
    with pytest.raises(KfacError, match="no factors"):
        kfac.merge([])
    with pytest.raises(FactorsMismatchError, match="not a part"):
        kfac.subtract(parts[0], whole)
    for one in (weighted, kfac.merge([weighted, parts[0]])):
        with pytest.raises(FactorsMismatchError, match="weights"):
            kfac.subtract(one, parts[0])
    with pytest.raises(FactorsMismatchError, match="was not in the whole"):
        kfac.subtract(kfac.merge(parts[:2]), parts[2])


def test_weighted_factors_stay_weighted(tmp_path):
    model = llama()
    weighted = kfac.merge([collect(model, [batch([row])]) for row in (0, 1)], [1, 2])
    corrected = kfac.correct(model, [batch([0])], weighted, progress=False)
    corrected.save(tmp_path / "f.safetensors")
    loaded = kfac.Factors.load(tmp_path / "f.safetensors")
    assert loaded.weighted
    assert loaded.digest == corrected.digest
    assert not collect(model, [batch([0])]).weighted


def test_merged_factors_lose_the_correction():
    model = llama()
    factors = all_of(model, [batch([0, 1])])
    both = kfac.merge([factors, all_of(model, [batch([2])])])
    assert "ekfac" not in both.estimators
    assert "marginal" in both.estimators
    data = collect(model, [batch([2])], factors.targets(model), labels="data")
    mixed = kfac.merge([data, both])
    assert mixed.labels == "mixed"
    assert mixed.estimators == ["kfac", "input", "output"]


def test_correction_refuses_another_model():
    model = llama()
    factors = collect(model, [batch([0])])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(FactorsMismatchError, match="other weights"):
        kfac.correct(model, [batch([0])], factors, progress=False)
    with pytest.raises(KfacError, match="per="):
        kfac.correct(model, [batch([0])], factors, per="token", progress=False)
