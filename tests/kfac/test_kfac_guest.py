import accelerate
import pytest
import torch
from curvature_tools import assert_same, batch, build, collect, llama
from torch import nn
from torch.utils.checkpoint import checkpoint

import kfac
from lirefs.errors import ProvenanceError, TargetError
from lirefs.model.guest import as_guest, full_precision

BATCHES = [batch([0, 1, 2], "left", 1), batch([3, 4, 5])]


def full(model, **kwargs):
    factors = collect(
        model, BATCHES, kfac.find_targets(model, projections="mlp"), marginals=True, **kwargs
    )
    return kfac.correct(model, BATCHES, factors, progress=False, samples=kwargs.get("samples", 1))


def assert_all_same(one, two, tolerance=1e-9):
    assert_same(one, two, tolerance)
    for name in one.names:
        for estimator in ("marginal", "ekfac"):
            a, b = (f.curvature(name, estimator).mass() for f in (one, two))
            assert (a - b).norm() <= 10 * tolerance * a.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_activation_checkpointing_changes_nothing(family, reentrant, samples):
    model = build(family).double()
    expected = full(model, samples=samples)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    before = [dict(module.__dict__) for module in model.modules()]
    layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is True)
    calls = []
    target = kfac.find_targets(model)[0]
    hook = target.module.register_forward_hook(lambda *_: calls.append(1))
    found = full(model, samples=samples)
    hook.remove()
    assert len(calls) > 2 * len(BATCHES), "nothing was recomputed"
    assert_all_same(expected, found)
    assert layer.training
    assert [list(module.__dict__) for module in model.modules()] == [list(b) for b in before]
    own = "_gradient_checkpointing_func"
    assert all(m.__dict__.get(own) is b.get(own) for m, b in zip(model.modules(), before))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)
        self.reentrant = reentrant

    def forward(self, x):
        def inside(x):
            return self.first(x).tanh()

        if self.reentrant is None:
            return self.second(inside(x))
        return self.second(checkpoint(inside, x, use_reentrant=self.reentrant))


def test_a_users_own_checkpoint():
    torch.manual_seed(0)
    model, x = Checkpointed(None).double(), torch.randn(20, 3, dtype=torch.float64)
    targets = kfac.named_targets(model, ["first", "second"])

    def forward(model, x):
        return model(x), torch.ones(len(x), dtype=torch.bool)

    expected = collect(model, [x], targets, forward=forward, marginals=True, samples=2)
    model.reentrant = False
    found = collect(model, [x], targets, forward=forward, marginals=True, samples=2)
    assert_same(expected, found, 1e-12)
    model.reentrant = True
    with pytest.raises(TargetError, match="use_reentrant=False"):
        collect(model, [x], targets, forward=forward)


def test_autocast_rounds_the_model_but_not_the_sums():
    model = llama(torch.float32)
    exact = full(model, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = full(model, dtype=torch.float32)

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return kfac.language_model_forward(model, batch)

    targets = kfac.find_targets(model, projections="mlp")
    inside = collect(model, BATCHES, targets, forward=forward, dtype=torch.float32)
    assert_same(outside, inside, 1e-6)
    name = "model.layers.0.mlp.gate_proj"
    assert outside.G(name).dtype == torch.float32
    # Sums in bfloat16 would be wrong by percents; those of rounded activations are not.
    assert (outside.A(name) - exact.A(name)).norm() < 0.02 * exact.A(name).norm()
    eight_bits = outside.A(name).bfloat16().float()
    assert not torch.equal(outside.A(name), eight_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    exact = full(llama(torch.float32), dtype=torch.float32)
    found = full(llama(torch.float32).to(dtype), dtype=torch.float32)
    for name in exact.names:
        assert found.A(name).dtype == torch.float32
        assert (found.A(name) - exact.A(name)).norm() < 0.05 * exact.A(name).norm()


def test_device_map():
    model = llama(torch.float32)
    expected = full(model, dtype=torch.float32)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooks = [hasattr(module, "_hf_hook") for module in model.modules()]
    assert any(hooks)
    assert_all_same(expected, full(model, dtype=torch.float32), 1e-6)
    assert [hasattr(module, "_hf_hook") for module in model.modules()] == hooks


def test_offloaded_targets_are_refused_and_others_are_not():
    model = llama(torch.float32)
    expected = collect(model, BATCHES, kfac.find_targets(model, layers=[1]))
    parts = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": 0}
    if not torch.cuda.is_available():
        accelerate.cpu_offload(model.model.layers[0], torch.device("cpu"))
    else:
        accelerate.dispatch_model(
            model, parts | {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
        )
    with pytest.raises(TargetError, match="meta device"):
        kfac.find_targets(model, layers=[0])
    found = collect(model, BATCHES, kfac.find_targets(model, layers=[1]))
    assert_same(expected, found, 1e-5)


def test_weights_on_the_disk_are_refused_by_name_and_others_are_edited(tmp_path):
    model, plain = llama(torch.float32), llama(torch.float32)
    factors = collect(plain, BATCHES, kfac.find_targets(plain, layers=[1]))
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    with pytest.raises(TargetError, match="offloaded by accelerate"):
        kfac.collect(model, BATCHES, layers=[0])
    targets = kfac.find_targets(model, layers=[1])
    assert_same(factors, collect(model, BATCHES, targets), 1e-6)
    with pytest.raises(ProvenanceError, match=r"layers.0.* is offloaded"):
        collect(model, BATCHES, targets, checkpoint=tmp_path / "state")
    edit, ids = kfac.CurvatureEdit(factors, 0.6), BATCHES[0]["input_ids"]
    before = model(ids).logits
    with edit.apply(model), edit.apply(plain):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids).logits, before)


def test_two_targets_tied_to_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    tied, x = Tied().double(), torch.randn(9, 4, dtype=torch.float64)
    apart = Tied().double()
    apart.load_state_dict(tied.state_dict())
    apart.second.weight = nn.Parameter(tied.first.weight.detach().clone())

    def forward(model, x):
        return model(x), torch.ones(len(x), dtype=torch.bool)

    one, two = (
        collect(model, [x], kfac.named_targets(model, ["first", "second"]), forward=forward)
        for model in (tied, apart)
    )
    assert_same(one, two, 1e-12)
    assert tied.second.weight is tied.first.weight


def test_tf32_is_off_inside_and_as_it_was_outside():
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, "tf32" if name == "fp32_precision" else True)
    try:
        for off in (as_guest(nn.Linear(2, 2)), full_precision(torch.device("cpu"))):
            with off:
                assert getattr(matmul, name) in ("ieee", False)
            assert getattr(matmul, name) in ("tf32", True)
    finally:
        setattr(matmul, name, before)


class Sharded(torch.Tensor):
    """A tensor of another kind that reports a float dtype, as sharded and quantized ones do."""


def test_sharded_and_empty_weights_are_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 3).as_subclass(Sharded))
    with pytest.raises(TargetError, match=r"Sharded.*out of reach"):
        kfac.named_targets(model, ["0"])
    model[0].weight = nn.Parameter(torch.zeros(0, 3))
    with pytest.raises(TargetError, match="dense"):
        kfac.named_targets(model, ["0"])


def state(model):
    return (
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
        [p.data_ptr() for p in model.parameters()],
    )


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_model_is_left_as_found(error):
    model = llama()
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    def batches():
        assert not any(p.requires_grad for p in model.parameters())
        yield batch([0])
        if error:
            raise error
        yield batch([1])

    if error:
        with pytest.raises(error):
            collect(model, batches())
    else:
        with torch.no_grad():
            collect(model, batches())
    assert state(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_no_weight_gradient_and_nothing_before_the_first_target():
    model = llama()
    seen = {}

    def spy(name):
        def hook(module, args, output):
            seen[name] = output.requires_grad

        return hook

    for name in (
        "model.embed_tokens",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ):
        model.get_submodule(name).register_forward_hook(spy(name))
    collect(model, [batch(range(6))], kfac.find_targets(model, layers=[1]))
    assert list(seen.values()) == [False, False, True]
    assert all(p.grad is None for p in model.parameters())
