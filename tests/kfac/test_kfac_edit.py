import gc
import json
import weakref

import numpy as np
import pytest
import torch
from curvature_tools import assert_restored, batch, build, collect, llama, reference, snapshot
from torch import nn

import kfac
from kfac import CurvatureEdit, RandomPairsEdit, SVDEdit
from kfac.factors import bases
from lirefs.errors import (
    EditError,
    EditOrderError,
    FactorsMismatchError,
    InterventionError,
    KeepError,
    TargetError,
)


@pytest.fixture
def model():
    return llama(torch.float32)


@pytest.fixture(scope="module")
def factors():
    model = llama(torch.float32)
    return collect(model, [batch(range(6))], kfac.find_targets(model, projections="mlp"))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_edit_is_the_formula(model, factors, keep):
    original = {t.name: t.weight.clone() for t in factors.targets(model)}
    with CurvatureEdit(factors, keep).apply(model) as edited:
        assert edited is model
        for target in factors.targets(model):
            expected = reference(factors, target.name, original[target.name], keep)
            np.testing.assert_allclose(target.weight.numpy(), expected, atol=2e-6)


def test_keep_one_is_the_identity(model, factors):
    before = snapshot(model)
    with CurvatureEdit(factors, 1).apply(model):
        assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_rotation_there_and_back_is_exact_enough(model, factors):
    for target in factors.targets(model):
        basis = factors.eigen(target.name)
        c = factors.coordinates(target.name, target.weight, "x")
        back = basis.u_out.float() @ c @ basis.u_in.float().T
        assert (back - target.weight).norm() < 1e-5 * target.weight.norm()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_restored_bit_for_bit(model, factors, error):
    before = snapshot(model)

    def use():
        with CurvatureEdit(factors, 0.5).apply(model):
            assert not torch.equal(
                model.model.layers[0].mlp.up_proj.weight,
                before["model.layers.0.mlp.up_proj.weight"][1],
            )
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert_restored(model, before)


def test_handle(model, factors):
    before = snapshot(model)
    handle = CurvatureEdit(factors, 0.5).attach(model)
    assert not torch.equal(
        model.model.layers[1].mlp.down_proj.weight, before["model.layers.1.mlp.down_proj.weight"][1]
    )
    handle.remove()
    handle.remove()
    assert_restored(model, before)
    with CurvatureEdit(factors, 0.5).attach(model):
        pass
    assert_restored(model, before)


def test_edits_nest_and_compose(model, factors):
    before = snapshot(model)
    names = factors.names
    with SVDEdit(names, 0.5).apply(model):
        svd = {t.name: t.weight.clone() for t in factors.targets(model)}
        with CurvatureEdit(factors, 0.6).apply(model):
            for target in factors.targets(model):
                expected = reference(factors, target.name, svd[target.name], 0.6)
                np.testing.assert_allclose(target.weight.numpy(), expected, atol=2e-6)
        assert all(torch.equal(t.weight, svd[t.name]) for t in factors.targets(model))
    assert_restored(model, before)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(FactorsMismatchError):
        CurvatureEdit(factors, 0.6).attach(model)


def test_wrong_order_of_removal(model, factors):
    before = snapshot(model)
    first = CurvatureEdit(factors, 0.5).attach(model)
    second = CurvatureEdit(factors, 0.9).attach(model)
    inside = snapshot(model)
    with pytest.raises(EditOrderError):
        first.remove()
    assert all(torch.equal(p, inside[n][1]) for n, p in model.named_parameters())
    second.remove()
    first.remove()
    assert_restored(model, before)


def test_a_model_dropped_while_edited_is_freed(factors):
    model = llama(torch.float32)
    alive = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    handle = CurvatureEdit(factors, 0.5).attach(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_nothing_is_half_edited(model, factors):
    with torch.no_grad():
        factors.targets(model)[-1].parameter.mul_(2)
    before = snapshot(model)
    with pytest.raises(FactorsMismatchError, match=r"other weights \(an edit that is baked into"):
        CurvatureEdit(factors, 0.5).attach(model)
    assert_restored(model, before)


def test_factors_collected_under_an_edit_fit_the_edited_model(model, factors):
    with SVDEdit(factors.names, 0.5).apply(model):
        inner = collect(model, [batch(range(6))])
        with CurvatureEdit(inner, 0.5).apply(model):
            pass
    with pytest.raises(FactorsMismatchError):
        CurvatureEdit(inner, 0.5).attach(model)


def test_keep_for_each_target(model, factors):
    name = factors.names[0]
    before = snapshot(model)
    with CurvatureEdit(factors, {name: 0.5}).apply(model):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n][1])]
    assert changed == [name + ".weight"]


@pytest.mark.parametrize("keep", [0, 1.5, float("nan"), {}, {"nothing": 0.5}, "0.5"])
def test_bad_keep(factors, keep):
    with pytest.raises(KeepError):
        CurvatureEdit(factors, keep)


def test_sweep_shares_the_rotated_weights(model, factors):
    edit = CurvatureEdit(factors, 0.5, saliency=True)
    edit.prepare(model)
    cached = {name: value[1] for name, value in factors._coordinates.items()}
    edit.with_keep(0.7).prepare(model)
    assert all(factors._coordinates[name][1] is tensor for name, tensor in cached.items())


def test_report(model, factors):
    edit = CurvatureEdit(factors, 0.6)
    before = snapshot(model)
    reports = edit.report(model)
    assert_restored(model, before)
    assert [report.name for report in reports] == factors.names
    for report, (target, weight) in zip(reports, edit.prepare(model), strict=True):
        assert report.total_pairs == target.weight.numel()
        assert report.kept_share == report.pairs / report.total_pairs
        assert 0.6 <= report.kept_mass < 1
        assert int(torch.linalg.matrix_rank(weight, rtol=1e-5)) <= report.rank_bound
        change = (weight - target.weight).norm() / target.weight.norm()
        assert report.relative_change == pytest.approx(float(change), rel=1e-4)
    assert all(r.relative_change is None for r in edit.report())
    assert all(r.relative_change == 0 for r in edit.with_keep(1).report(model))


def test_describe_is_json(factors):
    for edit in (
        CurvatureEdit(factors, 0.6),
        CurvatureEdit(factors, {factors.names[0]: 0.6}),
        RandomPairsEdit(factors, 0.6, seed=3),
        SVDEdit(factors.names, 0.5),
    ):
        described = json.loads(json.dumps(edit.describe()))
        assert described["kind"] == edit.kind
    assert CurvatureEdit(factors, 0.6).describe()["factors"] == factors.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = llama(dtype)
    factors = collect(model, [batch(range(6))])
    with CurvatureEdit(factors, 0.5).apply(model):
        assert all(p.dtype == dtype for p in model.parameters())
        assert model(input_ids=batch([0])["input_ids"]).logits.isfinite().all()


def test_conv1d_and_tied_weights():
    model = build("gpt2")
    targets = kfac.find_targets(model, projections=["lm_head", "c_fc", "mlp.c_proj"])
    factors = collect(model, [batch(range(6))], targets)
    original = {t.name: t.weight.clone() for t in targets}
    before = snapshot(model)
    with CurvatureEdit(factors, 0.6).apply(model):
        for target in targets:
            expected = reference(factors, target.name, original[target.name], 0.6)
            np.testing.assert_allclose(target.weight.numpy(), expected, atol=2e-6)
        assert model.lm_head.weight is model.transformer.wte.weight
    assert_restored(model, before)


def test_two_targets_on_one_parameter():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(EditError, match="tied"):
        SVDEdit(["0", "1"], 0.5).attach(model)


def test_no_curvature_mass(model):
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.zero_()
    dead = collect(model, [batch([0])], kfac.named_targets(model, [name]))
    with pytest.raises(EditError, match="no curvature mass"):
        CurvatureEdit(dead, 0.5).attach(model)


def test_random_pairs_keeps_as_many(model, factors):
    edit = CurvatureEdit(factors, 0.6)
    pairs = {report.name: report.pairs for report in edit.report()}
    chosen = []
    for seed in (0, 0, 1):
        counts = {}
        for target, weight in RandomPairsEdit(factors, 0.6, seed).prepare(model):
            basis = factors.eigen(target.name)
            c = basis.u_out.T @ weight.double() @ basis.u_in
            counts[target.name] = c.abs() > 1e-6 * c.abs().max()
        chosen.append(counts)
    for name, number in pairs.items():
        assert abs(int(chosen[0][name].sum()) - number) <= 2  # an entry of W itself may be tiny
        assert torch.equal(chosen[0][name], chosen[1][name])
        assert not torch.equal(chosen[0][name], chosen[2][name])
    before = snapshot(model)
    with RandomPairsEdit(factors, 0.6, 0).apply(model):
        pass
    assert_restored(model, before)


def test_the_control_of_another_keep_has_the_same_seed(model, factors):
    edit = RandomPairsEdit(factors, 0.6, seed=3)
    other = edit.with_keep({factors.names[0]: 0.4})
    expected = RandomPairsEdit(factors, {factors.names[0]: 0.4}, seed=3)
    assert other.describe() == expected.describe()
    assert torch.equal(other.prepare(model)[0][1], expected.prepare(model)[0][1])
    assert edit.keep == 0.6
    with pytest.raises(KeepError):
        edit.with_keep(0)


def test_a_share_of_the_pairs_at_random(model, factors):
    edit = RandomPairsEdit(factors, 0.75, seed=3, of="pairs")
    reports = {keep: edit.with_keep(keep).report() for keep in (0.25, 0.75)}
    for keep, rows in reports.items():
        assert [row.pairs for row in rows] == [round(keep * row.total_pairs) for row in rows]
    name = factors.names[0]
    tables = [edit.with_keep(keep).choose(name, None).table for keep in (0.25, 0.75)]
    assert bool((tables[0] <= tables[1]).all())  # nested
    other = RandomPairsEdit(factors, 0.75, seed=4, of="pairs").choose(name, None).table
    assert not torch.equal(other, tables[1])
    assert edit.describe() == RandomPairsEdit(factors, 0.75, 3).describe() | {"of": "pairs"}
    before = snapshot(model)
    with edit.apply(model):
        edited = dict(model.named_parameters())[f"{name}.weight"]
        assert not torch.equal(edited, before[f"{name}.weight"][1])
    assert_restored(model, before)
    with pytest.raises(EditError, match="of='rows' is unknown"):
        RandomPairsEdit(factors, 0.5, of="rows")


def test_a_nested_choice_is_uniform():
    tables = [kfac.edits.baselines.nested_pairs_table(4, 5, 6, [s]).double() for s in range(2000)]
    assert {int(one.sum()) for one in tables} == {6}
    assert (sum(tables) / 2000 - 0.3).abs().max() < 5 * (0.21 / 2000) ** 0.5


def test_random_pairs_are_uniform():
    total = sum(kfac.edits.baselines.random_pairs_table(4, 5, 6, [s]).double() for s in range(2000))
    assert int(total.sum()) == 2000 * 6
    assert (total / 2000 - 0.3).abs().max() < 5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize(("keep", "rank"), [(0.25, 4), (0.3, 5), (0.01, 1)])
def test_svd(model, keep, rank):
    name = "model.layers.0.mlp.down_proj"
    original = kfac.named_targets(model, [name])[0].weight.clone()
    with SVDEdit([name], keep).apply(model):
        edited = kfac.named_targets(model, [name])[0].weight
        left, values, right = np.linalg.svd(original.numpy(), full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(edited.numpy(), expected, atol=1e-6)


def test_svd_sweep_and_errors(model):
    edit = SVDEdit(["lm_head"], 0.5)
    edit.prepare(model)
    kept = edit._cache["lm_head"]
    edit.with_keep(0.25).prepare(model)
    assert edit._cache["lm_head"] is kept
    assert edit.with_keep(1).prepare(model) == []
    with pytest.raises(KeepError):
        SVDEdit(["lm_head"], 0)
    with pytest.raises(TargetError, match="no target"):
        SVDEdit([], 0.5)
    with pytest.raises(TargetError, match="nothing"):
        SVDEdit(["nothing"], 0.5).attach(model)


def test_edits_add_up_like_other_interventions(model):
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    before = snapshot(model)
    one, two = (SVDEdit([name], 0.3) for name in names)
    with (one + two).apply(model):
        both = [target.weight.clone() for target in kfac.named_targets(model, names)]
    assert_restored(model, before)
    for edit, name, weight in zip((one, two), names, both, strict=True):
        with edit.apply(model):
            assert torch.equal(kfac.named_targets(model, [name])[0].weight, weight)
    with pytest.raises(InterventionError, match="must be an Intervention"):
        one + 1
    with pytest.raises(InterventionError, match="must be an Intervention"):
        "no" + one


def test_descriptions_tell_every_two_edits_apart(model, factors):
    other = collect(model, [batch([0, 1])], kfac.find_targets(model, projections="mlp"))
    names, keeps = factors.names, (0.5, 0.6)
    edits = [one(factors, keep) for one in (CurvatureEdit, RandomPairsEdit) for keep in keeps]
    edits += [CurvatureEdit(factors, dict.fromkeys(some, 0.5)) for some in (names[:1], names[1:])]
    edits += [CurvatureEdit(factors, 0.5, shape=shape) for shape in ("rectangle", "input")]
    edits += [CurvatureEdit(factors, 0.5, saliency=True), CurvatureEdit(other, 0.5)]
    for kind in (RandomPairsEdit, kfac.RandomRotationEdit):
        edits += [kind(factors, 0.5, seed=seed) for seed in (1, 2)]
    edits += [kfac.UnionEdit(factors, other, 0.5, weight=share) for share in (0.2, 0.5)]
    edits += [kfac.RemovalEdit(factors, 0.5, spared=spared) for spared in (None, other)]
    for kind in (SVDEdit, kfac.MagnitudeEdit):
        edits += [kind(names, 0.5), kind(names, 0.6), kind(names[:2], 0.5)]
    described = [json.dumps(one.describe(), sort_keys=True) for one in edits]
    assert len(set(described)) == len(edits)


def test_baking_in_turn_decomposes_nothing_twice(monkeypatch):
    model = llama(torch.float32)
    factors = collect(model, [batch(range(6))], kfac.find_targets(model, projections="mlp"))
    factors.decompose(progress=False)  # kept in memory alone: no file, no folder
    monkeypatch.setattr(bases, "eigenbasis", lambda matrix: pytest.fail("decomposed again"))
    CurvatureEdit(factors, 0.7).bake_in_turn(model)
    assert not factors._bases


def test_baking_in_turn_is_baking():
    model, other = llama(torch.float32), llama(torch.float32)
    targets = kfac.find_targets(model, projections="mlp")
    factors = collect(model, [batch(range(6))], targets, marginals=True)
    edit = kfac.CurvatureEdit(factors, 0.7, estimator="marginal", shape="output")
    expected = edit.report(other)
    edit.bake(other)
    factors.forget(factors.names)
    held = []
    release = kfac.Factors.forget

    def forget(self, names):
        held.append(len(self._bases))
        release(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfac.Factors, "forget", forget)
        assert edit.bake_in_turn(model) == expected
    assert held == [3, 2] * 2  # gate and up with the input they share; down
    assert not factors._bases
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(FactorsMismatchError, match="other weights"):
        edit.bake_in_turn(model)


def test_baking_in_turn_refuses_other_weights_before_it_changes_any():
    model = llama(torch.float32)
    targets = kfac.find_targets(model, projections="mlp")
    factors = collect(model, [batch(range(6))], targets)
    targets[-1].weight.add_(1)
    before = snapshot(model)
    with pytest.raises(FactorsMismatchError, match="other weights"):
        kfac.CurvatureEdit(factors, 0.7).bake_in_turn(model)
    assert_restored(model, before)
