"""Logits a few positions at a time give the same factors as all logits at once."""

import pytest
import torch
from curvature_tools import HEADS, IDS, SMALL, assert_same, batch, collect, llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import kfac
from kfac.collection import head as head_module
from kfac.collection.head import Head
from lirefs.errors import BatchError, CheckpointError, KfacError, NonFiniteError

BATCHES = [batch([0, 1, 2]), batch([3, 4]), batch([5], "right", 2)]


def family(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **HEADS, pad_token_id=0, **settings)
    return AutoModelForCausalLM.from_config(config).double()


def biased():
    model = family("phi")
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "llama": llama,
    "gemma2": lambda: family("gemma2", final_logit_softcapping=0.05),
    "granite": lambda: family("granite", logits_scaling=3.0),
    "cohere": lambda: family("cohere", logit_scale=0.25),
    "phi": biased,
}


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Three positions at a time; the list has the number of rows of each product."""
    monkeypatch.setattr(head_module, "_LOGITS", {"cpu": 150})
    sizes, logits = [], Head._logits
    monkeypatch.setattr(
        Head, "_logits", lambda self, *given: sizes.append(len(given[0])) or logits(self, *given)
    )
    return sizes


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"labels": "data"}])
def test_the_factors_are_those_of_all_logits_at_once(kind, options, few_at_a_time):
    model = MODELS[kind]()
    ours = collect(model, BATCHES, **options)
    assert len(few_at_a_time) > 5
    assert max(few_at_a_time) <= 3
    assert "forward" not in vars(model.get_output_embeddings())
    head_module._LOGITS["cpu"] = 2**26
    count = len(few_at_a_time)
    assert_same(collect(model, BATCHES, **options), ours, 1e-12)
    assert len(few_at_a_time) == count


def test_the_correction_takes_the_same_way(few_at_a_time):
    model = llama()
    factors = collect(model, BATCHES)
    ours = kfac.correct(model, BATCHES, factors, progress=False)
    head_module._LOGITS["cpu"] = 2**26
    whole = kfac.correct(model, BATCHES, factors, progress=False)
    for key in (key for key in whole.sums if key.startswith("E.")):
        assert (ours.sums[key] - whole.sums[key]).norm() < 1e-9 * whole.sums[key].norm()


class Odd(nn.Module):
    """A head that does more than its configuration says."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits * 1.05


def test_a_model_that_does_more_with_its_logits_computes_them_itself(few_at_a_time):
    model = Odd(llama())
    targets = kfac.named_targets(model, ["model.model.layers.0.mlp.gate_proj"])
    batches = [{"input_ids": IDS}]
    ours = collect(model, batches, targets)
    assert few_at_a_time == [1]  # the comparison, of one sequence
    head_module._LOGITS["cpu"] = 2**26
    assert_same(collect(model, batches, targets), ours, 1e-12)


def test_a_head_that_is_a_target_or_has_hooks_is_run_by_the_model(few_at_a_time):
    model = llama()
    targets = kfac.named_targets(model, ["lm_head"])
    assert Head.find(model, targets) is None
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    assert Head.find(model, kfac.find_targets(model)) is None
    handle.remove()
    assert Head.find(model, kfac.find_targets(model)) is not None
    collect(model, BATCHES, targets)
    assert not few_at_a_time


def test_logits_that_are_not_finite_are_named_by_their_position(few_at_a_time):
    model = llama()

    def spoil(module, args, output):
        if len(output) == 3:
            output = output.clone()
            output[1, 6] = float("inf")
        return output

    handle = model.model.norm.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="batch 0, row 1, position 6: the logits hold"):
        collect(model, [{"input_ids": IDS[:3]}])
    handle.remove()


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float64, 0, 1e-12), (torch.bfloat16, 1e-5, 0.02)]
)
def test_the_dtype_of_the_heads_products_can_be_chosen(dtype, low, high):
    model = llama()
    whole = collect(model, BATCHES, labels="data")
    ours = collect(model, BATCHES, labels="data", head_dtype=dtype)
    corrected = kfac.correct(model, BATCHES, whole, labels="data", head_dtype=dtype, progress=False)
    exact = kfac.correct(model, BATCHES, whole, labels="data", progress=False)
    pairs = [(ours.sums[key], whole.sums[key]) for key in whole.sums if key.startswith("G.")]
    pairs += [(corrected.sums[key], exact.sums[key]) for key in exact.sums if key.startswith("E.")]
    for one, other in pairs:
        assert low <= (one - other).norm() / other.norm() <= high
    for key in (key for key in whole.sums if key.startswith("A.")):
        assert torch.equal(ours.sums[key], whole.sums[key])


def test_a_dtype_that_cannot_be_chosen_is_refused(tmp_path):
    model, odd = llama(), Odd(llama())
    targets = kfac.named_targets(odd, ["model.model.layers.0.mlp.gate_proj"])
    with pytest.raises(KfacError, match="head_dtype: the logits of this model"):
        collect(odd, [{"input_ids": IDS}], targets, head_dtype=torch.bfloat16)
    with pytest.raises(KfacError, match="head_dtype: the logits of this model"):
        collect(model, BATCHES, kfac.named_targets(model, ["lm_head"]), head_dtype=torch.bfloat16)
    with pytest.raises(KfacError, match="labels='exact'"):
        collect(model, BATCHES, labels="exact", head_dtype=torch.bfloat16)
    with pytest.raises(KfacError, match="head_dtype"):
        collect(model, BATCHES, head_dtype="bfloat16")
    path = tmp_path / "state"
    collect(model, BATCHES, checkpoint=path)
    with pytest.raises(CheckpointError, match="head_dtype"):
        collect(model, BATCHES, checkpoint=path, head_dtype=torch.bfloat16)


def test_a_wider_dtype_than_the_weights_can_be_chosen():
    model = llama().to(torch.bfloat16)
    whole = collect(model, BATCHES, labels="data")
    ours = collect(model, BATCHES, labels="data", head_dtype=torch.float32)
    for name in whole.names:
        assert 0 < (ours.G(name) - whole.G(name)).norm() < 0.05 * whole.G(name).norm()
    with pytest.raises(KfacError, match=r"torch.int32: use a floating-point type"):
        collect(model, BATCHES, head_dtype=torch.int32)
    with pytest.raises(KfacError, match="samples must be a whole number"):
        collect(model, BATCHES, samples=1.5)


def test_logits_that_are_not_of_each_token_are_not_those_of_a_language_model():
    config = AutoConfig.for_model("bert", **SMALL, num_attention_heads=2)
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(BatchError, match="not a causal language model; pass `forward`"):
        collect(model, [{"input_ids": IDS}])
