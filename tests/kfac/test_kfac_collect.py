import pytest
import torch
from curvature_tools import (
    IDS,
    LENGTHS,
    Deep,
    assert_same,
    batch,
    build,
    collect,
    draws,
    llama,
    mlp_forward,
)
from torch import nn

import kfac
from kfac.collection.sampling import sample_labels
from lirefs.errors import BatchError, KfacError, TargetError


def one_label_fishers(model, x):
    """Return softmax and, for each label, the outer product of autograd's weight gradients."""
    probabilities = model(x).softmax(-1)[0].detach()
    fishers = {}
    for label in range(len(probabilities)):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([label]), reduction="sum")
        for name, gradient in zip(
            ("0", "1"), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            flat = gradient.flatten()
            fishers[name, label] = torch.outer(flat, flat)
    return probabilities, fishers


@pytest.fixture
def deep():
    torch.manual_seed(3)
    return Deep().double(), torch.randn(1, 3, dtype=torch.float64)


def test_exact_fisher_with_the_same_labels(deep):
    model, x = deep
    probabilities, fishers = one_label_fishers(model, x)
    factors = collect(
        model, [x], kfac.find_targets(model, projections=["0", "1"]), forward=mlp_forward
    )
    uniforms = draws(x)
    label = int(sample_labels(probabilities[None], uniforms))
    for name in ("0", "1"):
        kron = torch.kron(factors.G(f"layers.{name}"), factors.A(f"layers.{name}"))
        torch.testing.assert_close(kron, fishers[name, label], rtol=1e-12, atol=1e-14)


def test_converges_to_enumeration_over_labels(deep):
    model, x = deep
    probabilities, fishers = one_label_fishers(model, x)
    errors = []
    for count in (400, 40_000):
        factors = collect(
            model,
            x.expand(count, 3).split(10_000),
            kfac.find_targets(model, projections=["0", "1"]),
            forward=mlp_forward,
        )
        worst = 0.0
        for name in ("0", "1"):
            exact = sum(p * fishers[name, k] for k, p in enumerate(probabilities))
            kron = torch.kron(factors.G(f"layers.{name}"), factors.A(f"layers.{name}"))
            worst = max(worst, float((kron - exact).norm() / exact.norm()))
        errors.append(worst)
    assert errors[0] < 4 / 400**0.5
    assert errors[1] < 4 / 40_000**0.5


@pytest.mark.parametrize("classes", [2, 255, 256, 257, 1000])
def test_sampled_labels_invert_the_cumulative_distribution(classes):
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(50, classes, generator=generator, dtype=torch.float64)
    table[:, 1::3] = 0
    table /= table.sum(1, keepdim=True)
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    expected = torch.searchsorted(table.cumsum(1), uniforms[:, None], right=True)[:, 0]
    labels = sample_labels(table, uniforms)
    assert (table.gather(1, labels[:, None]) > 0).all()
    assert torch.equal(labels[2:], expected[2:])


@pytest.mark.parametrize(
    "batches",
    [
        [batch([row]) for row in range(6)],
        [batch(range(6), "left", extra=5)],
        [batch([5, 2, 0], "left"), batch([4, 3, 1], "right", extra=3)],
    ],
    ids=["one by one", "left padded", "other order"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon", "gpt_neox"])
def test_batching_padding_and_order_change_nothing(family, batches):
    # Bloom's own forward pass is NaN in float64 with left padding: its mask overflows.
    exact = family != "bloom"
    model = build(family).to(torch.float64 if exact else torch.float32)
    one, two = collect(model, [batch(range(6))]), collect(model, batches)
    assert_same(one, two, 1e-6 if exact else 1e-5)


def test_float32_and_repeated_rows():
    model = llama(torch.float32)
    rows = [0, 0, 1, 2, 3, 4, 5, 5]
    one = collect(model, [batch(rows)], dtype=torch.float32)
    two = collect(model, [batch([row], "left", 2) for row in rows], dtype=torch.float32)
    assert_same(one, two, 1e-5)
    single = collect(model, [batch([0])])
    double = collect(model, [batch([0, 0])])
    assert not torch.allclose(single.G(single.names[0]), double.G(single.names[0]))


def brute_force(model, targets, labels=None, seed=0):
    """One sequence at a time; a loss graph with cross entropy; plain Python loops."""
    sums = {t.name: [torch.zeros(n, n).double() for n in t.weight.shape] for t in targets}
    count = 0
    for row, length in enumerate(LENGTHS):
        ids = IDS[row : row + 1, :length]
        kept = {}

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept[module] = (args[0], output)

        handles = [t.module.register_forward_hook(keep) for t in targets]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        uniforms = draws({"input_ids": ids}, torch.ones(1, length, dtype=torch.bool), seed)
        loss, positions = 0.0, []
        for t in range(length - 1):
            if labels is not None and labels[row, t + 1] == -100:
                continue
            cumulative = logits[t].detach().softmax(-1).cumsum(0)
            label = int((cumulative <= uniforms[0, t]).sum())
            loss = loss - logits[t].log_softmax(-1)[label]
            positions.append(t)
        if not positions:
            continue
        loss.backward()
        count += len(positions)
        for target in targets:
            a, g = kept[target.module][0].detach(), kept[target.module][1].grad
            for t in positions:
                sums[target.name][1] += torch.outer(a[0, t], a[0, t])
                sums[target.name][0] += torch.outer(g[0, t], g[0, t])
    model.zero_grad()
    return sums, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_and_labels_against_brute_force(family, masked):
    model = build(family).double().eval()
    labels = None
    if masked:
        labels = IDS.clone()
        labels[0, 3:6] = -100
        labels[2, :] = -100
        labels[4, 1] = -100
    targets = kfac.find_targets(model, projections="mlp")
    factors = collect(
        model,
        [batch([0, 1, 2], "left", 1, labels), batch([3, 4, 5], "right", 2, labels)],
        targets,
    )
    sums, count = brute_force(model, targets, labels)
    assert factors.tokens == count
    for name, (g, a) in sums.items():
        assert factors.count(name) == count
        torch.testing.assert_close(factors.A(name) * count, a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(factors.G(name) * count, g, rtol=1e-9, atol=1e-12)


def test_gate_and_up_share_one_a():
    model = llama()
    factors = collect(model, [batch(range(6))], kfac.find_targets(model, projections="mlp"))
    name = "model.layers.{}.mlp.{}".format
    assert factors.records[name(0, "up_proj")].source == name(0, "gate_proj")
    assert sum(key.startswith("A.") for key in factors.sums) == 4
    assert torch.equal(factors.A(name(1, "gate_proj")), factors.A(name(1, "up_proj")))


def test_in_place_change_of_a_target_output():
    class InPlace(Deep):
        def forward(self, x):
            return self.layers[1](self.layers[0](x).relu_())

    torch.manual_seed(0)
    model, x = InPlace().double(), torch.randn(20, 3, dtype=torch.float64)
    factors = collect(model, [x], kfac.find_targets(model, projections=["0"]), forward=mlp_forward)
    uniforms = draws(x)
    logits = model(x)
    labels = sample_labels(logits.detach().softmax(-1), uniforms)
    g = logits.detach().softmax(-1) - nn.functional.one_hot(labels, 5)
    g = (g @ model.layers[1].weight) * (x @ model.layers[0].weight.T > 0)
    torch.testing.assert_close(factors.G("layers.0"), (g.T @ g / 20).detach())


class TinyVit(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        h = self.fc1(x).tanh()
        return self.head(self.mix(h) + h.mean(1, keepdim=True))[:, 0]


def test_cls_only_forward():
    torch.manual_seed(0)
    model, images = TinyVit().double(), torch.randn(8, 5, 4, dtype=torch.float64)

    def forward(model, batch):
        mask = torch.zeros(batch["x"].shape[:2], dtype=torch.bool)
        mask[:, 0] = True
        return model(batch["x"]), mask

    targets = kfac.named_targets(model, ["fc1", "mix"])
    factors = collect(model, [{"x": images}], targets, forward=forward)
    halves = collect(model, [{"x": images[4:]}, {"x": images[:4]}], targets, forward=forward)
    assert factors.count("fc1") == 8
    cls = images[:, 0]
    torch.testing.assert_close(factors.A("fc1"), cls.T @ cls / 8)
    assert_same(factors, halves, 1e-12)


def test_tied_weights():
    model = build("gpt2").double()
    assert model.lm_head.weight is model.transformer.wte.weight
    targets = kfac.find_targets(model, projections=["lm_head", "c_fc"])
    factors = collect(model, [batch(range(6))], targets)
    assert factors.G("lm_head").shape == (50, 50)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_bfloat16_model():
    model = llama(torch.bfloat16)
    factors = collect(model, [batch(range(6))], dtype=torch.float32)
    assert factors.G(factors.names[0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], BatchError, "empty"),
        ([{"input_ids": IDS[:, :1]}], BatchError, "counted"),
        ([IDS], BatchError, "mapping"),
        ([{"input_ids": IDS[0]}], BatchError, "shape"),
        ([{"input_ids": IDS, "labels": IDS[:, 1:]}], BatchError, "labels"),
        ([{"input_ids": IDS, "attention_mask": IDS[:2]}], BatchError, "attention_mask"),
    ],
)
def test_bad_batches(batches, error, message):
    with pytest.raises(error, match=message):
        collect(llama(), batches)


def test_targets_that_are_not_used():
    model = llama()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(TargetError, match="extra"):
        collect(model, [batch([0])], kfac.named_targets(model, ["lm_head", "extra"]))
    with pytest.raises(TargetError, match="none of them"):
        collect(model, [batch([0])], kfac.named_targets(model, ["extra"]))
    with pytest.raises(TargetError, match="no targets"):
        kfac.collect(model, [batch([0])], [])


def test_wrong_number_of_rows():
    model = Deep().double()

    def forward(model, batch):
        return model(batch), torch.ones(len(batch), 2, dtype=torch.bool)

    with pytest.raises(KfacError, match="positions"):
        collect(
            model,
            [torch.ones(4, 3, dtype=torch.float64)],
            kfac.find_targets(model, projections=["0"]),
            forward=forward,
        )


def test_seed_changes_labels_only():
    model = llama()
    one, two = (collect(model, [batch(range(6))], seed=seed) for seed in (0, 1))
    name = one.names[0]
    assert torch.equal(one.A(name), two.A(name))
    assert not torch.allclose(one.G(name), two.G(name))


TEXTS = ["one two three four", "five", "six seven", "eight nine ten one two three"]


def test_texts_give_what_their_tokens_give(lm):
    targets = kfac.find_targets(lm.model, [1])
    rows = [lm.pad([ids]) for ids in lm.encode(TEXTS)]
    found = kfac.collect(lm, TEXTS, layers=[1], progress=False)
    assert_same(found, kfac.collect(lm.model, rows, targets, progress=False), 1e-5)
    longest_first = sorted(lm.encode(TEXTS), key=len, reverse=True)
    batches = [lm.pad(longest_first, side="right")]
    for model in (lm, lm.model):
        same = kfac.collect(model, batches, targets, progress=False)
        assert same.digest == found.digest
    corrected = kfac.correct(lm, TEXTS, found, progress=False)
    assert corrected.digest == kfac.correct(lm.model, batches, same, progress=False).digest
    everything = kfac.collect(lm, iter(TEXTS), progress=False)
    assert everything.names == [target.name for target in kfac.find_targets(lm.model)]


def test_bad_texts(lm):
    one = lm.pad(lm.encode(TEXTS[:1]))
    for model in (lm, lm.model):
        with pytest.raises(BatchError, match=r"use \[text\]"):
            kfac.collect(model, "one two three", layers=[1])
    with pytest.raises(BatchError, match="make batches of texts"):
        kfac.collect(lm.model, TEXTS, layers=[1])
    with pytest.raises(BatchError, match="cannot be mixed"):
        kfac.collect(lm, [*TEXTS, one], layers=[1])
    with pytest.raises(BatchError, match="empty"):
        kfac.collect(lm, [], layers=[1])
    with pytest.raises(TargetError, match="not both"):
        kfac.collect(lm, TEXTS, kfac.find_targets(lm.model, [1]), layers=[1])


@pytest.mark.gpu
def test_factors_on_a_gpu_agree_with_the_cpu():
    model = llama(torch.float32)
    expected = collect(model, [batch(range(6))])
    found = collect(model.cuda(), [batch(range(6))])
    assert_same(found, expected, tolerance=1e-4)


def test_one_batch_is_not_taken_for_a_list_of_its_keys():
    model = llama()
    for one in (batch([0, 1]), {"text": "a"}):
        with pytest.raises(BatchError, match=r"got one mapping: use \[batch\]"):
            kfac.collect(model, one, layers=[0], progress=False)
