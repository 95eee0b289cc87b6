"""Claims of exactness against the Fisher, with every label at every position enumerated."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kfac
from kfac.collection.sampling import EXACT_CLASSES
from lirefs.errors import BatchError, KfacError

CLASSES = 7
IDS = torch.randint(0, CLASSES, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=9,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=CLASSES,
    )
    made = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return made


def target(model, layer, projection):
    return kfac.find_targets(model, layers=[layer], projections=[projection])


def factors_of(model, batches, targets, per="sequence", labels="exact", **options):
    settings = {"labels": labels, "progress": False, **options}
    found = kfac.collect(
        model, batches, targets, dtype=torch.float64, diagonal=True, per=per, **settings
    )
    return kfac.correct(model, batches, found, per=per, **settings)


def enumerated(model, target, first, rotate):
    """The mean square of dL/dW over all labels from position `first` on; one text at a time."""
    total = 0
    for row in IDS:
        lines = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        for position in range(first, len(lines)):
            for label in range(CLASSES):
                loss = -lines[position, label]
                (gradient,) = torch.autograd.grad(loss, target.parameter, retain_graph=True)
                total = total + lines[position, label].detach().exp() * rotate(gradient).square()
    return total / (len(IDS) * (IDS.shape[1] - 1 - first))


def batch_from(first, side="right"):
    """All texts, labelled -100 up to the position whose label is the first that counts."""
    ids, pad = IDS, torch.zeros(len(IDS), 2, dtype=torch.long)
    labels = ids.clone()
    labels[:, : first + 1] = -100
    parts = [ids, torch.ones_like(ids), labels]
    padding = [pad, pad, pad - 100]
    pairs = zip(parts, padding)
    whole = [torch.cat([a, b] if side == "right" else [b, a], 1) for a, b in pairs]
    return dict(zip(("input_ids", "attention_mask", "labels"), whole))


@pytest.mark.parametrize(("first", "side"), [(0, "right"), (3, "right"), (3, "left")])
@pytest.mark.parametrize("projection", ["up_proj", "down_proj"])
def test_sequences_give_the_diagonal_of_the_fisher(model, first, side, projection):
    chosen = target(model, 0, projection)
    factors = factors_of(model, [batch_from(first, side)], chosen)
    name, basis = factors.names[0], factors.eigen(factors.names[0])
    assert factors.count(name) == factors.tokens == len(IDS) * (IDS.shape[1] - 1 - first)
    diagonal = enumerated(model, chosen[0], first, lambda gradient: gradient)
    torch.testing.assert_close(factors.curvature(name, "diagonal").mass(), diagonal)
    rotated = enumerated(model, chosen[0], first, lambda g: basis.u_out.T @ g @ basis.u_in)
    torch.testing.assert_close(factors.curvature(name, "ekfac").mass(), rotated)


def test_positions_give_it_where_each_label_reaches_one_position(model):
    for layer, exact in ((0, False), (1, True)):
        chosen = target(model, layer, "down_proj")
        factors = factors_of(model, [batch_from(0)], chosen, per="position")
        found = factors.curvature(factors.names[0], "diagonal").mass()
        wanted = enumerated(model, chosen[0], 0, lambda gradient: gradient)
        assert (float((found - wanted).norm() / wanted.norm()) < 1e-6) == exact


def test_sampled_labels_converge_to_the_expectation(model):
    chosen = target(model, 0, "up_proj")
    exact = factors_of(model, [batch_from(0)], chosen)
    sampled = factors_of(model, [batch_from(0)], chosen, labels="sampled", samples=60)
    name = exact.names[0]
    assert torch.equal(exact.A(name), sampled.A(name))
    tables = [(exact.G(name), sampled.G(name))]
    for estimator in ("diagonal", "ekfac"):
        tables.append([one.curvature(name, estimator).mass() for one in (exact, sampled)])
    for wanted, found in tables:
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.3


def test_sums_over_sequences_do_not_change_those_over_positions(model):
    chosen = kfac.find_targets(model, projections="mlp")
    batches = [batch_from(3)]
    plain, whole = (
        kfac.collect(
            model, batches, chosen, dtype=torch.float64, marginals=True, progress=False, **options
        )
        for options in ({}, {"diagonal": True, "per": "sequence"})
    )
    for key, table in plain.sums.items():
        assert torch.equal(table, whole.sums[key])
    assert "diagonal" in whole.estimators


def test_sums_over_sequences_are_saved_and_never_mixed(model, tmp_path):
    chosen = target(model, 0, "up_proj")
    one, other = (
        factors_of(model, [batch_from(0)], chosen, per) for per in ("sequence", "position")
    )
    again = factors_of(model, [batch_from(0)], chosen, labels="sampled", seed=1)
    one.save(tmp_path / "f.safetensors")
    loaded = kfac.Factors.load(tmp_path / "f.safetensors", model)
    assert loaded.labels == "exact"
    assert torch.equal(
        loaded.curvature(one.names[0], "diagonal").mass(),
        one.curvature(one.names[0], "diagonal").mass(),
    )
    assert "diagonal" in kfac.merge([one, again]).estimators
    assert "diagonal" not in kfac.merge([one, other]).estimators


def test_what_is_refused(model):
    chosen = target(model, 0, "up_proj")
    for options in ({"per": "sequence"}, {"per": "token", "diagonal": True}):
        with pytest.raises(KfacError, match="per="):
            kfac.collect(model, [batch_from(0)], chosen, progress=False, **options)
    with pytest.raises(KfacError, match="samples=2"):
        kfac.collect(model, [batch_from(0)], chosen, labels="exact", samples=2, progress=False)
    wide = torch.nn.Sequential(torch.nn.Linear(3, EXACT_CLASSES + 1))
    with pytest.raises(BatchError, match="at most 256"):
        kfac.collect(
            wide,
            [torch.randn(2, 3)],
            kfac.find_targets(wide, projections=["0"]),
            forward=lambda model, x: (model(x), torch.ones(len(x), dtype=torch.bool)),
            labels="exact",
            progress=False,
        )
