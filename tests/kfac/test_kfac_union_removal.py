import json
import time

import numpy as np
import pytest
import torch
from curvature_tools import assert_restored, batch, build, collect, llama, reference, snapshot
from transformers import AutoModelForCausalLM, MixtralConfig

import kfac
from kfac import CurvatureEdit, MagnitudeEdit, RandomRotationEdit, RemovalEdit, SVDEdit, UnionEdit
from lirefs.errors import EditError, EditOrderError, EstimatorError, FactorsMismatchError


@pytest.fixture
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def halves():
    """Factors of two different sets of texts."""
    model = llama(torch.float32)
    targets = kfac.find_targets(model, layers=[0])
    return [
        collect(model, [batch(rows)], targets, marginals=True, diagonal=True)
        for rows in (range(3), range(3, 6))
    ]


def rotated(edit, factors, model):
    """The edited weight of the first target in the factors' own eigenbasis."""
    target, weight = edit.prepare(model)[0]
    basis = factors.eigen(target.name)
    return basis.u_out.T @ weight.double() @ basis.u_in, target, basis


def test_an_edit_says_how_much_it_keeps(halves):
    names = halves[0].names
    one = CurvatureEdit(halves[0], 0.5)
    assert repr(one) == f"CurvatureEdit({len(names)} targets, keep=0.5)"
    keeps = dict(zip(names, (0.9, 0.25), strict=True))
    assert repr(CurvatureEdit(halves[0], keeps)) == "CurvatureEdit(2 targets, keep=0.25 to 0.9)"


@pytest.mark.parametrize("shape", ["rectangle", "output", "input"])
def test_shapes_remove_whole_sides(model, halves, shape):
    factors = halves[0]
    edit = CurvatureEdit(factors, 0.5, shape=shape)
    c, target, basis = rotated(edit, factors, model)
    original = basis.u_out.T @ target.weight.double() @ basis.u_in
    kept = c.abs() > 1e-5 * c.abs().max()
    rows, columns = kept.any(1), kept.any(0)
    assert bool(rows.all()) == (shape == "input")
    assert bool(columns.all()) == (shape == "output")
    np.testing.assert_allclose(c[rows][:, columns], original[rows][:, columns], atol=1e-5)
    report = edit.report(model)[0]
    assert report.kept_mass >= 0.5
    assert report.rank_bound == min(int(rows.sum()), int(columns.sum()))


def test_saliency_ranks_by_mass_times_squared_coordinate(model, halves):
    factors = halves[0]
    edit = CurvatureEdit(factors, 0.7, saliency=True)
    c, target, basis = rotated(edit, factors, model)
    original = basis.u_out.T @ target.weight.double() @ basis.u_in
    score = torch.outer(basis.lam, basis.mu) * original**2
    order = score.flatten().argsort(descending=True)
    needed = int((score.flatten()[order].cumsum(0) < 0.7 * score.sum()).sum()) + 1
    expected = torch.zeros_like(original).flatten()
    expected[order[:needed]] = original.flatten()[order[:needed]]
    np.testing.assert_allclose(c, expected.view_as(c), atol=1e-5)
    assert edit.report(model)[0].pairs == needed
    with pytest.raises(EditError, match="give the model"):
        edit.report()


@pytest.mark.parametrize("estimator", ["kfac", "input", "output", "ekfac", "marginal"])
def test_every_estimator_keeps_its_own_mass(model, halves, estimator):
    factors = halves[0]
    if estimator == "ekfac":
        factors = kfac.correct(model, [batch(range(3))], factors, progress=False)
    edit = CurvatureEdit(factors, 0.6, estimator=estimator)
    c, target, _ = rotated(edit, factors, model)
    mass = factors.curvature(target.name, estimator).mass()
    kept = c.abs() > 1e-5 * c.abs().max()
    assert float(mass[kept].sum() / mass.sum()) >= 0.6 - 1e-3
    assert float(mass[kept].min()) >= float(mass[~kept].max()) * (1 - 1e-9)
    assert json.loads(json.dumps(edit.describe()))["estimator"] == estimator
    assert edit.with_keep(0.5).estimator == estimator


def test_the_diagonal_ranks_the_entries_of_the_weight_itself(model, halves):
    factors = halves[0]
    edit = CurvatureEdit(factors, 0.6, estimator="diagonal")
    for target, weight in edit.prepare(model):
        mass = factors.curvature(target.name, "diagonal").mass()
        kept = weight != 0
        assert torch.equal(weight[kept], target.weight[kept])
        assert float(mass[kept].sum() / mass.sum()) >= 0.6
        assert float(mass[kept].min()) >= float(mass[~kept].max())


def test_experts_of_one_stack_are_edited_together():
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    names = [f"{name}[0]", f"{name}[1]"]
    factors = collect(model, [batch(range(6))], kfac.named_targets(model, names))
    before = snapshot(model)
    original = kfac.named_targets(model, names)[0].parameter.detach().clone()
    with CurvatureEdit(factors, 0.5).apply(model):
        for target in factors.targets(model):
            expected = reference(factors, target.name, original[target.expert], 0.5)
            np.testing.assert_allclose(target.weight, expected, atol=2e-6)
        assert torch.equal(target.parameter[2:], original[2:])
    assert_restored(model, before)


def test_settings_that_do_not_go_together(halves):
    for settings in (
        {"shape": "circle"},
        {"shape": "output", "saliency": True},
    ):
        with pytest.raises(EditError):
            CurvatureEdit(halves[0], 0.5, **settings)
    for estimator in ("ekfac", "nonsense"):
        with pytest.raises(EstimatorError, match=estimator):
            CurvatureEdit(halves[0], 0.5, estimator=estimator)


@pytest.mark.parametrize("kind", ["kfac", "union", "rotation", "svd"])
def test_autocast_does_not_round_an_edit(model, halves, kind):
    def prepare():
        first, second = (kfac.merge([half]) for half in halves)  # with nothing computed before
        edit = {
            "kfac": CurvatureEdit(first, 0.5),
            "union": UnionEdit(first, second, 0.5),
            "rotation": RandomRotationEdit(first, 0.5),
            "svd": SVDEdit(first.names, 0.5),
        }[kind]
        return edit.prepare(model)

    outside = prepare()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prepare()
    assert len(inside) == len(outside) == 2
    for (_, one), (_, two) in zip(outside, inside, strict=True):
        assert torch.equal(one, two)


def test_union_of_a_set_with_itself_is_the_plain_edit(model, halves):
    one = UnionEdit(halves[0], halves[0], 0.6).prepare(model)
    two = CurvatureEdit(halves[0], 0.6).prepare(model)
    for (_, a), (_, b) in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_union_protects_the_other_set(model, halves):
    """An edit that knows the skill harms it less than one that does not."""
    general, skill = halves

    def kept_of_skill(edit):
        target, weight = edit.prepare(model)[0]
        change = target.weight.double() - weight.double()
        # tr(Δᵀ G Δ A): the second-order loss of the change on the skill's data.
        g, a = skill.G(target.name), skill.A(target.name)
        return float(torch.trace(change.T @ g @ change @ a))

    losses = [kept_of_skill(UnionEdit(general, skill, 0.6, weight=w)) for w in (0.0, 0.5, 1.0)]
    assert losses[0] > 1.5 * max(losses[1:])
    edit = UnionEdit(general, skill, 0.6)
    before = snapshot(model)
    with edit.apply(model):
        pass
    assert_restored(model, before)
    assert edit.with_keep(0.5)._made is edit._made
    described = json.loads(json.dumps(edit.describe()))
    assert described["protected"] == skill.digest
    with pytest.raises(EditError, match="weight"):
        UnionEdit(general, skill, 0.6, weight=1.5)


def test_two_sets_must_be_of_one_model(halves):
    other = llama(torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    strange = collect(other, [batch(range(6))], kfac.find_targets(other, layers=[0]))
    fewer = collect(other, [batch([0])], kfac.find_targets(other, projections=["up_proj"]))
    for second in (strange, fewer):
        with pytest.raises(FactorsMismatchError):
            UnionEdit(halves[0], second, 0.5)
        with pytest.raises(FactorsMismatchError):
            RemovalEdit(halves[0], 0.5, spared=second)


def test_removal_is_the_complement_of_the_plain_edit(model, halves):
    removed = RemovalEdit(halves[0], 0.4).prepare(model)
    kept = CurvatureEdit(halves[0], 0.6).prepare(model)
    for (target, a), (_, b) in zip(removed, kept, strict=True):
        np.testing.assert_allclose(a + b, target.weight, atol=2e-6)
    report = RemovalEdit(halves[0], 0.4).report(model)[0]
    assert report.kept_mass <= 0.4


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9])
def test_a_union_scores_pairs_by_the_weighted_sum_of_both_sets(halves, weight):
    edit = UnionEdit(*halves, 0.5, weight=weight)
    name = halves[0].names[0]
    u_out, u_in, score = edit._union(name)
    expected = torch.zeros_like(score)
    for factors, share in zip(halves, (1 - weight, weight)):
        g, a = factors.G(name).double(), factors.A(name).double()
        along = (u_out.T @ (g / g.trace()) @ u_out).diagonal()
        inside = (u_in.T @ (a / a.trace()) @ u_in).diagonal()
        expected += share * torch.outer(along, inside)
    torch.testing.assert_close(score, expected, atol=1e-12, rtol=1e-9)


def test_removal_ranks_first_what_other_text_lacks(halves, monkeypatch):
    own, general = halves
    edit, name = RemovalEdit(own, 0.5, spared=general), own.names[0]
    basis = own.eigen(name)
    alone = basis.u_out[:, -1:]  # general text has mass along one output direction only
    monkeypatch.setattr(general, "G", lambda _: alone @ alone.T)
    score, mass = edit._ranked(name)
    floor = 1e-12 / mass.numel()
    torch.testing.assert_close(score[0], mass[0] / floor, rtol=1e-3, atol=0)
    a = general.A(name).double()
    inside = (basis.u_in.double().T @ (a / a.trace()) @ basis.u_in.double()).diagonal()
    spared = mass[-1] / inside.clamp(min=floor)
    torch.testing.assert_close(score[-1], spared, rtol=1e-3, atol=1e-12)


def test_removal_spares_what_other_text_needs(model, halves):
    own, general = halves

    def harm(edit, factors):
        target, weight = edit.prepare(model)[0]
        change = target.weight.double() - weight.double()
        g, a = factors.G(target.name), factors.A(target.name)
        return float(torch.trace(change.T @ g @ change @ a))

    plain, sparing = RemovalEdit(own, 0.5), RemovalEdit(own, 0.5, spared=general)
    assert harm(sparing, general) < harm(plain, general)
    assert sparing.with_keep(0.6)._scores is sparing._scores
    assert json.loads(json.dumps(sparing.describe()))["spared"] == general.digest


def test_random_rotation_keeps_the_shape_in_other_directions(model, halves):
    factors = halves[0]
    plain = CurvatureEdit(factors, 0.6).report(model)
    edit = RandomRotationEdit(factors, 0.6, seed=1)
    assert [r.pairs for r in edit.report(model)] == [r.pairs for r in plain]
    (target, one), *_ = edit.prepare(model)
    again = RandomRotationEdit(factors, 0.6, seed=1).prepare(model)[0][1]
    other = RandomRotationEdit(factors, 0.6, seed=2).prepare(model)[0][1]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert int(torch.linalg.matrix_rank(one, rtol=1e-5)) <= plain[0].rank_bound
    u_out, u_in = (u.double() for u in edit._bases(target.name, one))
    np.testing.assert_allclose(u_out.T @ u_out, torch.eye(len(u_out)), atol=1e-5)
    c = u_out.T @ one.double() @ u_in
    mask = edit.choose(target.name, None).mask(torch.device("cpu"))
    assert float(c[~mask].abs().max()) < 1e-5
    full = u_out.T @ target.weight.double() @ u_in
    np.testing.assert_allclose(c[mask], full[mask], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude(dtype):
    model = llama(dtype)
    name = "model.layers.0.mlp.up_proj"
    original = kfac.named_targets(model, [name])[0].weight.clone()
    with MagnitudeEdit([name], 0.25).apply(model):
        edited = kfac.named_targets(model, [name])[0].weight
        kept = edited != 0
        assert torch.equal(edited[kept], original[kept])
        assert original[kept].abs().min() >= original[~kept].abs().max()
        assert int(kept.sum()) == pytest.approx(original.numel() / 4, rel=0.02)
    assert MagnitudeEdit([name], 0.5).with_keep(1).prepare(model) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["bake", "context"])
def test_a_saved_edit_loads_in_plain_transformers(family, dtype, way, tmp_path):
    model = build(family).to(dtype)
    factors = collect(model, [batch(range(6))])
    edit = CurvatureEdit(factors, 0.6)
    if way == "bake":
        edit.bake(model)
        model.save_pretrained(tmp_path)
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        with edit.apply(model):
            model.save_pretrained(tmp_path)
            expected = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert not torch.equal(
            dict(model.named_parameters())[factors.names[0] + ".weight"],
            expected[factors.names[0] + ".weight"],
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_baking_is_refused_over_an_attached_edit(model, halves):
    before = snapshot(model)
    with (
        SVDEdit(halves[0].names, 0.5).apply(model),
        pytest.raises(EditOrderError, match="remove it"),
    ):
        CurvatureEdit(halves[0], 0.5).bake(model)
    assert_restored(model, before)
    CurvatureEdit(halves[0], 0.5).bake(model)
    with pytest.raises(FactorsMismatchError):
        CurvatureEdit(halves[0], 0.5).attach(model)


def test_a_model_dispatched_over_devices(halves, model):
    accelerate = pytest.importorskip("accelerate")
    expected = {t.name: w for t, w in CurvatureEdit(halves[0], 0.6).prepare(model)}
    blocks = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    blocks |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    dispatched = accelerate.dispatch_model(model, blocks, force_hooks=True)
    ids = batch([0])["input_ids"]
    plain = dispatched(input_ids=ids).logits
    with CurvatureEdit(halves[0], 0.6).apply(dispatched):
        for target in halves[0].targets(dispatched):
            assert torch.equal(target.weight, expected[target.name])
        assert not torch.allclose(dispatched(input_ids=ids).logits, plain)
    assert torch.equal(dispatched(input_ids=ids).logits, plain)


def test_edited_mask_is_the_formula_where_rows_are_cut(model, halves):
    """A low keep leaves rows and columns empty; they are left out of the products."""
    factors = halves[0]
    for target, weight in CurvatureEdit(factors, 0.1).prepare(model):
        expected = reference(factors, target.name, target.weight, 0.1)
        np.testing.assert_allclose(weight, expected, atol=2e-6)


def test_ten_values_of_keep_cost_at_most_three_of_one():
    torch.manual_seed(0)
    size = (384, 512)
    model = torch.nn.Sequential(torch.nn.Linear(size[1], size[0], bias=False))
    record = kfac.TargetRecord(*size, 4096, "0", kfac.weight_digest(model[0].weight))

    def fresh():
        # Spectra fall like a power of the rank, as those of models do.
        sums = [(x := torch.randn(2 * n, n) * torch.arange(1, n + 1) ** -0.5).T @ x for n in size]
        tables = {"G.0": sums[0], "A.0": sums[1]}
        return kfac.Factors({"0": record}, tables, seeds=[0], tokens=4096)

    def seconds(factors, keeps):
        start = time.process_time()
        edit = CurvatureEdit(factors, keeps[0])
        for keep in keeps:
            edit.with_keep(keep).prepare(model)
        return time.process_time() - start

    keeps = [0.5 + i / 25 for i in range(10)]
    # In turns, because other tests run at the same time and take more of the machine at times.
    times = [(seconds(fresh(), [0.6]), seconds(fresh(), keeps)) for _ in range(8)]
    one, ten = map(min, zip(*times, strict=True))
    assert ten < 3 * one
