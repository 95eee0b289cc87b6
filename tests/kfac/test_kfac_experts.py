import pytest
import torch
import transformers
from curvature_tools import IDS, assert_same, batch, collect, draws
from torch import nn
from transformers import AutoModelForCausalLM

import kfac
from kfac import find_targets, named_targets
from kfac.collection.covariance import CovarianceSums
from kfac.collection.hooks import TargetTracker
from kfac.collection.passes import _finish
from kfac.experts import observe_experts
from lirefs.errors import TargetError
from lirefs.model.processes.world import World

COMMON = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "mlp_only_layers": []}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
}


def build(family):
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**COMMON | extra))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    # The grouped product of the default implementation knows no float64.
    model.set_experts_implementation("eager")
    return model.double().eval()


class Listed(nn.Module):
    """A stack's experts written as Linears; keeps what each of them read and wrote."""

    def __init__(self, stack):
        super().__init__()
        self.gate = stack._apply_gate
        self.count = stack.num_experts
        self.calls = {}
        for name in ("gate_up_proj", "down_proj"):
            linears = nn.ModuleList()
            for expert in range(self.count):
                weight = getattr(stack, name)[expert].detach()
                weight = weight.T if stack.is_transposed else weight
                linear = nn.Linear(*weight.shape[::-1], bias=stack.has_bias).to(weight.dtype)
                linear.weight.data = weight.clone()
                if stack.has_bias:
                    linear.bias.data = getattr(stack, name + "_bias")[expert].detach().clone()
                linears.append(linear)
            setattr(self, name, linears)

    def forward(self, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for expert in range(self.count):
            tokens, slots = (index == expert).nonzero(as_tuple=True)
            rows = hidden[tokens]
            first = self.gate_up_proj[expert](rows)
            first.retain_grad()
            inner = self.gate(first)
            second = self.down_proj[expert](inner)
            second.retain_grad()
            self.calls[expert] = (
                tokens,
                {"gate_up_proj": (rows, first), "down_proj": (inner, second)},
            )
            result = result.index_add(0, tokens, second * weights[tokens, slots, None])
        return result


def listed_sums(model, layer, name, expert):
    """One sequence at a time: sums of a aᵀ and g gᵀ of one expert written as a Linear."""
    block = model.model.layers[layer].mlp
    stack, block.experts = block.experts, Listed(block.experts)
    a_sum = g_sum = count = 0
    try:
        for row, length in ((0, 9), (2, 7), (5, 5)):
            ids = IDS[row : row + 1, :length]
            logits = model(input_ids=ids, use_cache=False).logits[0]
            uniforms = draws({"input_ids": ids}, torch.ones(1, length, dtype=torch.bool))[0]
            cumulative = logits.detach().softmax(-1).cumsum(-1)
            labels = (cumulative <= uniforms[:, None]).sum(-1)
            nn.functional.cross_entropy(logits[:-1], labels[:-1], reduction="sum").backward()
            tokens, kept = block.experts.calls[expert]
            a, output = kept[name]
            counted = tokens < length - 1
            if output.grad is not None:
                a, g = a.detach()[counted], output.grad[counted]
                a_sum, g_sum = a_sum + a.T @ a, g_sum + g.T @ g
                count += int(counted.sum())
        return a_sum, g_sum, count
    finally:
        block.experts = stack
        model.zero_grad()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_fused_experts_equal_linears(family):
    model = build(family)
    targets = find_targets(model, projections="mlp")
    assert len(targets) == 2 * 2 * 4
    factors = collect(model, [batch([0, 2], "left", 1), batch([5], extra=2)], targets)
    for name in ("gate_up_proj", "down_proj"):
        for expert in range(4):
            full = f"model.layers.1.mlp.experts.{name}[{expert}]"
            a, g, count = listed_sums(model, 1, name, expert)
            assert factors.count(full) == count
            torch.testing.assert_close(factors.A(full) * count, a * torch.ones(1).double())
            torch.testing.assert_close(factors.G(full) * count, g * torch.ones(1).double())
    assert "forward" not in model.model.layers[0].mlp.experts.__dict__


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_loop_computes_what_the_model_computes(implementation):
    for family in FAMILIES:
        model = build(family).float()
        model.set_experts_implementation(implementation)
        stack = model.model.layers[0].mlp.experts
        with torch.no_grad():
            expected = model(**batch([0, 1])).logits
            end = observe_experts(stack, lambda expert, rows, output, positions: output)
            found = model(**batch([0, 1])).logits
            end()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_estimators_of_experts():
    model = build("mixtral")
    targets = find_targets(model, layers=[1], projections="mlp", experts=[1, 2])
    assert [t.name for t in targets] == [
        f"model.layers.1.mlp.experts.{name}[{expert}]"
        for name in ("gate_up_proj", "down_proj")
        for expert in (1, 2)
    ]
    batches = [batch([0, 1, 2]), batch([3, 4, 5])]
    for per in ("position", "sequence"):
        factors = collect(model, batches, targets, marginals=True, diagonal=True)
        factors = kfac.correct(model, batches, factors, per=per, progress=False)
        assert factors.estimators == list(kfac.ESTIMATORS)
    assert_same(factors, collect(model, [batch([r]) for r in range(6)], targets), 1e-9)


def test_an_expert_without_tokens_has_no_curvature():
    model = build("mixtral")
    model.model.layers[0].mlp.gate.weight.data[2] = 0
    model.model.layers[0].mlp.gate.forward = lambda hidden: (
        None,
        torch.full((len(hidden), 2), 0.5, dtype=hidden.dtype),
        torch.tensor([[0, 1]]).expand(len(hidden), 2),
    )
    targets = find_targets(model, layers=[0], projections="mlp")
    factors = collect(model, [batch([0])], targets, marginals=True)
    name = "model.layers.0.mlp.experts.down_proj[3]"
    assert factors.count(name) == 0
    assert not factors.A(name).any()
    assert not factors.G(name).any()
    again = collect(model, [batch([1])], targets, marginals=True)
    assert kfac.merge([factors, again]).count(name) == 0


def test_new_weights_of_one_expert():
    model = build("gpt_oss")
    one, two = named_targets(
        model, [f"model.layers.0.mlp.experts.down_proj[{expert}]" for expert in (1, 3)]
    )
    assert one.transposed
    assert tuple(one.weight.shape) == (16, 12)
    before = one.parameter.detach().clone()
    new = one.placed(torch.ones(16, 12))
    new = two.placed(torch.full((16, 12), 2.0), into=new)
    assert torch.equal(one.view(new), torch.ones(16, 12).double())
    assert torch.equal(new[0], before[0])
    assert (new[3] == 2).all()
    assert torch.equal(one.parameter, before)


def test_expert_errors():
    model = build("mixtral")
    with pytest.raises(TargetError, match="4 experts"):
        named_targets(model, ["model.layers.0.mlp.experts.down_proj[4]"])
    with pytest.raises(TargetError, match="no stack"):
        named_targets(model, ["model.layers.0.mlp.experts.router[0]"])
    with pytest.raises(TargetError, match=r"experts\.down_proj\[\*\]"):
        find_targets(model, projections=["nothing"])
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match="sharded"):
        find_targets(model)
    stack = nn.Module()
    stack.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(TargetError, match="interface"):
        find_targets(nn.ModuleDict({"experts": stack}), projections=["down_proj"])


def test_tables_of_experts_without_tokens_are_where_the_others_are():
    module = nn.Module()
    module.stack = nn.Parameter(torch.empty(1, 3, 4, device="meta"))
    target = kfac.Target("stack[0]", module, attribute="stack", expert=0)
    sums = CovarianceSums(torch.float32, marginals=False, diagonal=False)
    _finish(TargetTracker([target], torch.float32, sums), {target.name: ""}, World())
    assert {key: table.device.type for key, table in sums.tables.items()} == {
        "A.stack[0]": "cpu",
        "G.stack[0]": "cpu",
    }


@pytest.mark.parametrize("expert", [-1, 4])
def test_an_expert_that_does_not_exist(expert):
    with pytest.raises(TargetError, match="does not exist"):
        find_targets(build("mixtral"), experts=[expert])
