import pytest
import torch
from curvature_tools import Deep, build, collect, llama, mlp_forward
from torch import nn

import kfac
from lirefs.errors import EditError, FactorsMismatchError, KeepError
from lirefs.organism.training.optimizers import Muon

KEEP = 0.9
IDS = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "muon": lambda weights: Muon(weights, lr=0.01, weight_decay=0.1),
}


def factors_of(model):
    return collect(model, [{"input_ids": IDS}], kfac.find_targets(model, projections="mlp"))


def explicit(factors, name, onto, seed=0):
    """The projector as a matrix (out*in, out*in) on vec(dW)."""
    basis = factors.eigen(name)
    edit = kfac.CurvatureEdit(factors, KEEP)
    if onto == "random":
        edit = kfac.RandomPairsEdit(factors, KEEP, seed)
    kept = edit.choose(name, None).mask(torch.device("cpu"))
    chosen = kept if onto == "sharp" else ~kept
    vectors = torch.kron(basis.u_out, basis.u_in)[:, chosen.flatten()]
    return vectors @ vectors.T


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def factors(model):
    return factors_of(model)


@pytest.mark.parametrize("onto", ["flat", "sharp", "random"])
def test_project_is_the_explicit_projector(factors, onto):
    generator = torch.Generator().manual_seed(3)
    for name in factors.names[:3]:
        shape = factors.records[name].shape("D")
        update = torch.randn(shape, dtype=torch.float64, generator=generator)
        projector = explicit(factors, name, onto, seed=5)
        torch.testing.assert_close(projector @ projector, projector)
        torch.testing.assert_close(projector.T, projector)
        assert 0 < int(projector.trace().round()) < len(projector)
        found = kfac.project(factors, KEEP, {name: update}, onto=onto, seed=5)[name]
        torch.testing.assert_close(found.flatten(), projector @ update.flatten())
        again = kfac.project(factors, KEEP, {name: found}, onto=onto, seed=5)[name]
        torch.testing.assert_close(again, found)


def test_both_sides_add_up_and_are_orthogonal(factors):
    name = factors.names[0]
    update = {name: torch.randn(factors.records[name].shape("D"), dtype=torch.float64)}
    flat, sharp = (kfac.project(factors, KEEP, update, onto=one)[name] for one in ("flat", "sharp"))
    torch.testing.assert_close(flat + sharp, update[name])
    assert abs(float((flat * sharp).sum())) < 1e-9
    assert torch.equal(kfac.project(factors, 1.0, update)[name], torch.zeros_like(flat))
    torch.testing.assert_close(kfac.project(factors, 1.0, update, onto="sharp"), update)


def test_the_edit_removes_what_is_flat(factors, model):
    name = factors.names[0]
    weight = factors.targets(model, [name])[0].weight
    edit = kfac.CurvatureEdit(factors, {name: KEEP})
    ((_, edited),) = edit.prepare(model)
    torch.testing.assert_close(weight - edited, kfac.project(factors, KEEP, {name: weight})[name])


def test_lora_pairs(factors):
    name = factors.names[0]
    out, inside = factors.records[name].shape("D")
    left, right = torch.randn(out, 2, dtype=torch.float64), torch.randn(2, inside).double()
    pair = kfac.project(factors, KEEP, {name: (left, right)})[name]
    torch.testing.assert_close(pair, kfac.project(factors, KEEP, {name: left @ right})[name])
    half = kfac.project(factors, KEEP, {name: (left @ right).bfloat16()})[name]
    assert half.dtype == torch.float32


def test_updates_of_an_adapter():
    from peft import LoraConfig, get_peft_model

    base = build("llama")
    known = factors_of(base)
    adapter = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, adapter)
    name = next(one for one in known.names if one.endswith("up_proj"))
    layer = adapted.base_model.model.get_submodule(name)
    left, right = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    by_pair = kfac.project(known, KEEP, {name: (layer.scaling["default"] * left, right)})
    by_delta = kfac.project(known, KEEP, {name: layer.get_delta_weight("default")})
    torch.testing.assert_close(by_pair, by_delta)


def test_predicted_change_of_the_loss_is_the_measured_one():
    """K-FAC is exact for a linear softmax model with one input: the loss is its own labels'."""
    torch.manual_seed(3)
    model, x = Deep().double(), torch.randn(1, 3, dtype=torch.float64)
    chosen = kfac.find_targets(model, projections=["0", "1"])
    factors = collect(model, [x], chosen, forward=mlp_forward, labels="exact")
    before = model(x).log_softmax(-1).detach()
    for target in chosen:
        name, basis = target.name, factors.eigen(target.name)
        update = torch.randn(target.weight.shape, dtype=torch.float64)
        costs = []
        for onto in ("flat", "sharp"):
            step = 1e-3 * kfac.project(factors, 0.6, {name: update}, onto=onto)[name]
            predicted = 0.5 * torch.trace(factors.G(name) @ step @ factors.A(name) @ step.T)
            in_pairs = (basis.u_out.T @ step @ basis.u_in).square()
            torch.testing.assert_close(
                predicted, 0.5 * (factors.curvature(name).mass() * in_pairs).sum()
            )
            target.parameter.data += step
            after = model(x).log_softmax(-1).detach()
            target.parameter.data -= step
            measured = (before.exp() * (before - after)).sum()  # nats, expected over own labels
            torch.testing.assert_close(measured, predicted, rtol=0.01, atol=1e-15)
            costs.append(float(measured))
        whole = 1e-3 * update
        both = 0.5 * torch.trace(factors.G(name) @ whole @ factors.A(name) @ whole.T)
        assert sum(costs) == pytest.approx(float(both), rel=0.01)


def train(model, weights, make, steps=4):
    optimizer = make(weights)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in IDS.split(2):  # two micro-batches: gradients accumulate
            model(input_ids=part, labels=part).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("onto", ["flat", "sharp"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_stays_in_the_subspace(family, make, onto):
    model = build(family).double()
    known = factors_of(model)
    targets = known.targets(model)
    before = {one.name: one.weight.clone() for one in targets}
    other = model.get_input_embeddings().weight
    start = other.detach().clone()
    with kfac.projected_training(model, known, KEEP, onto=onto):
        train(model, [one.parameter for one in targets], make)
        for one in targets:
            gradient = one.view(one.parameter.grad)
            projected = kfac.project(known, KEEP, {one.name: gradient}, onto=onto)[one.name]
            torch.testing.assert_close(projected, gradient)
    assert torch.equal(other, start)
    for one in targets:
        change = one.weight - before[one.name]
        assert float(change.norm()) > 1e-3
        inside = kfac.project(known, KEEP, {one.name: change}, onto=onto)[one.name]
        assert float((change - inside).norm()) < 1e-9 * float(change.norm())


def test_projected_gradients_alone_leak_under_adamw(model):
    """Why the change is projected too: AdamW's steps on projected gradients leave the subspace."""
    model = llama()
    known = factors_of(model)
    targets = known.targets(model)
    before = [one.weight.clone() for one in targets]
    for one in targets:
        one.parameter.register_hook(
            lambda gradient, name=one.name: kfac.project(known, KEEP, {name: gradient})[name]
        )
    train(model, [one.parameter for one in targets], OPTIMIZERS["adamw"])
    for one, start in zip(targets, before):
        change = one.weight - start
        inside = kfac.project(known, KEEP, {one.name: change})[one.name]
        assert float((change - inside).norm()) > 0.05 * float(change.norm())


def test_hooks_are_gone_afterwards(factors):
    model = llama()
    target = factors.targets(model)[0]
    for error in (None, ValueError):
        try:
            with kfac.projected_training(model, factors, KEEP):
                assert target.parameter._post_accumulate_grad_hooks
                if error:
                    raise error
        except ValueError:
            pass
        assert not target.parameter._post_accumulate_grad_hooks
    before = target.weight.clone()
    optimizer = torch.optim.SGD([target.parameter], lr=1.0)
    target.parameter.grad = torch.ones_like(target.parameter)
    optimizer.step()
    torch.testing.assert_close(target.weight, before - 1)


def test_some_targets_and_another_optimizer(factors):
    model = llama()
    names = factors.names[:2]
    free, bound = (factors.targets(model, [name])[0] for name in names)
    with kfac.projected_training(model, factors, {names[1]: KEEP}):
        before = free.weight.clone(), bound.weight.clone()
        bound.weight.add_(1.0)  # not by an optimizer
        free.parameter.grad = torch.ones_like(free.parameter)
        torch.optim.SGD([free.parameter], lr=1.0).step()
        torch.testing.assert_close(bound.weight, before[1] + 1)
    torch.testing.assert_close(free.weight, before[0] - 1)
    step = kfac.project(factors, KEEP, {names[1]: torch.ones_like(before[1])})[names[1]]
    torch.testing.assert_close(bound.weight, before[1] + step)


def test_what_is_refused(factors, model):
    name = factors.names[0]
    update = {name: torch.zeros(factors.records[name].shape("D"))}
    with pytest.raises(KeepError):
        kfac.project(factors, 1.5, update)
    with pytest.raises(EditError, match="onto='steep'"):
        kfac.project(factors, KEEP, update, onto="steep")
    with pytest.raises(EditError, match=r"shape .* \(out, in\)"):
        kfac.project(factors, KEEP, {name: update[name].T})
    with pytest.raises(EditError, match="has no keep"):
        kfac.project(factors, {factors.names[1]: KEEP}, update)
    with pytest.raises(EditError, match="B first"):
        kfac.project(factors, KEEP, {name: (torch.ones(2, 16), torch.ones(24, 2).T[:, :3])})
    with pytest.raises(EditError, match="must be a matrix"):
        kfac.project(factors, KEEP, {name: torch.zeros(3)})
    with (
        pytest.raises(FactorsMismatchError),
        kfac.projected_training(nn.Linear(2, 2), factors, 0.9),
    ):
        pass


def test_a_target_without_mass_is_refused():
    model = Deep().double()
    chosen = kfac.find_targets(model, projections=["0"])
    factors = collect(model, [torch.zeros(2, 3).double()], chosen, forward=mlp_forward)
    with pytest.raises(EditError, match="no curvature mass"):
        kfac.project(factors, KEEP, {factors.names[0]: torch.ones(4, 3)})
