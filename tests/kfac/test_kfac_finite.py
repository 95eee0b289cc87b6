"""NaN and infinity on the way of a collection: named, kept out of the sums, survived."""

from contextlib import contextmanager

import pytest
import torch
from curvature_tools import (
    IDS,
    Deep,
    assert_restored,
    assert_same,
    batch,
    collect,
    llama,
    mlp_forward,
    snapshot,
)

import kfac
from kfac.collection.finite import first_not_finite_row, not_finite, not_finite_row_error
from kfac.factors.tensor_file import read_tensors
from lirefs.errors import NonFiniteError

BATCHES = [batch([0, 1]), batch([2, 3]), batch([4, 5, 0]), batch([1, 5])]
BROKEN = 2  # its row 1 holds five tokens


class Poisoned(torch.autograd.Function):
    """The identity, except for one value forward or one gradient backward at (1, 3)."""

    @staticmethod
    def forward(ctx, tensor, forward, backward):
        ctx.backward_value = backward
        result = tensor.clone()
        result[1, 3, 0] += forward
        return result

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[1, 3, 0] += ctx.backward_value
        return gradient, None, None


@contextmanager
def poisoned(module, call=BROKEN, forward=0.0, backward=0.0):
    """Poison one call, counted from 0, of a module in evaluation."""
    seen = []

    def hook(module, args, output):
        seen.append(1)
        return Poisoned.apply(output, forward, backward) if len(seen) == call + 1 else output

    hook.__module__ = "torch"  # a hook of unknown effect would be refused with a checkpoint
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def model():
    return llama(torch.float32)


def targets(model):
    return kfac.find_targets(model, projections="mlp")


def run(model, batches=BATCHES, **options):
    return collect(
        model, batches, targets(model), dtype=torch.float32, checkpoint_every=1e9, **options
    )


WAYS = {
    # where the poison is, what it is, what the message says
    "activation": (
        "model.layers.1.post_attention_layernorm",
        {"forward": float("nan")},
        r"batch 2, row 1, position 3: the input of target 'model\.layers\.1\.mlp\.gate_proj'",
    ),
    "infinite activation": (
        "model.layers.0.mlp.act_fn",
        {"forward": float("inf")},
        r"batch 2, row 1, position 3: the input of target 'model\.layers\.0\.mlp\.down_proj'",
    ),
    "logits": ("lm_head", {"forward": float("nan")}, "batch 2, row 1, position 3: the logits"),
    "gradient": (
        "model.layers.0.mlp",
        {"backward": float("nan")},
        r"batch 2, row 1, position 3: the output gradient of target 'model\.layers\.0\.mlp\.down",
    ),
    "infinite gradient": (
        "model.layers.1.mlp.act_fn",
        {"backward": float("inf")},
        r"batch 2, row 1, position 3: the output gradient of target 'model\.layers\.1\.mlp\.gate",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["factors", "correction"])
def test_it_is_named_and_the_work_before_it_is_kept(way, what, model, tmp_path):
    name, poison, message = WAYS[way]
    path = tmp_path / "state"
    whole = run(model, samples=2)

    def work(batches=BATCHES, **options):
        if what == "factors":
            return run(model, batches, samples=2, diagonal=True, **options)
        return kfac.correct(
            model, batches, whole, samples=2, checkpoint_every=1e9, progress=False, **options
        )

    before = snapshot(model)
    with (
        poisoned(model.get_submodule(name), **poison),
        pytest.raises(NonFiniteError, match=message + ".*leave this one out"),
    ):
        work(checkpoint=path)
    assert_restored(model, before)
    header, _ = read_tensors(path, "kfac_checkpoint", "checkpoint")
    assert header["done"] == BROKEN
    state = path.read_bytes()
    assert work(checkpoint=path).digest == work().digest
    path.write_bytes(state)
    others = BATCHES[:BROKEN] + BATCHES[BROKEN + 1 :]
    assert work(others, checkpoint=path).digest == work(others).digest


def test_non_finite_values_are_named():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"batch 1.*logits"):
        collect(model, [{"input_ids": IDS[:, :1]}, batch([0])])
    model = Deep()
    inputs = torch.ones(2, 3)
    inputs[0, 0] = 1e30
    model.layers[1].weight.data.zero_()
    with pytest.raises(NonFiniteError, match=r"activation.*layers\.0"):
        collect(
            model,
            [inputs],
            kfac.find_targets(model, projections=["0", "1"]),
            forward=mlp_forward,
            dtype=torch.float32,
        )


def test_the_first_batch_leaves_no_checkpoint(model, tmp_path):
    with (
        poisoned(model.lm_head, 0, forward=float("nan")),
        pytest.raises(NonFiniteError, match="batch 0"),
    ):
        run(model, BATCHES[BROKEN:], checkpoint=tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_any_other_error_on_the_way_keeps_the_work_too(model, tmp_path):
    path, calls = tmp_path / "state", []

    def out_of_memory(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")

    out_of_memory.__module__ = "torch"
    handle = model.lm_head.register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, checkpoint=path)
    handle.remove()
    assert read_tensors(path, "kfac_checkpoint", "checkpoint")[0]["done"] == 2
    assert run(model, checkpoint=path).digest == run(model).digest


def test_what_is_not_counted_may_be_anything(model):
    def work():
        chosen = kfac.find_targets(model, layers=[1])
        return collect(model, [batch([0, 3])], chosen, dtype=torch.float32)  # row 1 has two tokens

    expected = work()
    with poisoned(model.model.layers[1].post_attention_layernorm, 0, forward=float("nan")):
        assert_same(work(), expected, 0)


def test_a_model_without_positions():
    model, inputs = Deep(), torch.ones(3, 3)
    inputs[2, 0] = torch.nan
    found = kfac.find_targets(model, projections=["0", "1"])
    with pytest.raises(NonFiniteError, match=r"batch 0, row 2: the input of target 'layers\.0'"):
        collect(model, [inputs], found, forward=mlp_forward)
    inputs[2, 0] = 1e30
    with torch.no_grad():
        model.layers[1].weight.zero_()
    with pytest.raises(NonFiniteError, match=r"batch 0: an activation.*torch\.float64"):
        collect(model, [inputs], found, forward=mlp_forward, dtype=torch.float32)


def test_finding():
    fine, huge = torch.ones(2, 3), torch.full((2, 3), 3e38)
    bad = torch.ones(4, 3)
    bad[2, 1] = -torch.inf
    assert not_finite([]) == not_finite([fine, huge]) == []
    assert not_finite([fine, bad, huge, bad * 0]) == [1, 3]
    assert first_not_finite_row(bad) == 2
    assert "first, row 2, position 1: it holds NaN" in str(
        not_finite_row_error("first", 13, (3, 6), "it holds")
    )
    assert "first, row 2: it holds NaN" in str(not_finite_row_error("first", 2, (3,), "it holds"))


def relearn(model, **options):
    settings = {"steps": [0, 2], "lr": 1e-3, "progress": False} | options
    return kfac.relearn(model, {"plain": None}, BATCHES[BROKEN:], BATCHES[:BROKEN], **settings)


@pytest.mark.parametrize(
    ("name", "call", "poison", "message"),
    [
        # Four batches are tested first; the seed begins with batch 0 of those trained on.
        ("lm_head", 4, {"forward": float("nan")}, "after 0 steps, batch 0 .*row 1: the loss"),
        ("lm_head", 5, {"forward": float("inf")}, "after 1 steps, batch 1 .*row 1: .*lower lr"),
        ("lm_head", 7, {"forward": float("nan")}, "after 2 steps, known: batch 1, row 1, pos"),
        (
            "model.layers.0.mlp",
            5,
            {"backward": float("nan")},
            r".*batch 1 .*deep.*'model\.layers\.0\.",
        ),
    ],
)
def test_relearning_names_arm_step_and_batch(name, call, poison, message, model):
    before = snapshot(model)
    with (
        poisoned(model.get_submodule(name), call, **poison),
        pytest.raises(NonFiniteError, match="arm 'plain' " + message),
    ):
        relearn(model)
    assert_restored(model, before)


def test_inputs_read_text_by_text_are_named(model):
    factors = run(model)
    for measure in (kfac.band_profile, kfac.flat_shares):
        with (
            poisoned(model.model.layers[1].post_attention_layernorm, forward=float("nan")),
            pytest.raises(NonFiniteError, match=r"batch 2, row 1, position 3: the input of target"),
        ):
            measure(model, BATCHES, factors)
