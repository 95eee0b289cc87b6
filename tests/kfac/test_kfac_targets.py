import pytest
import torch
from curvature_tools import FAMILIES, build
from torch import nn
from transformers import ViTConfig, ViTModel

from kfac import find_targets, named_targets
from lirefs.errors import TargetError


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = build(family)
    _, reads, writes = FAMILIES[family]
    for projections, expected in [("mlp_in", reads), ("mlp_out", writes), ("mlp", reads + writes)]:
        targets = find_targets(model, projections=projections)
        found = [(target.layer, target.name.rsplit(".", 1)[-1]) for target in targets]
        assert sorted(found) == sorted((i, name) for i in range(2) for name in expected)
        assert not any("attn" in target.name or "attention" in target.name for target in targets)


def test_weight_is_out_by_in():
    for family in ("gpt2", "llama"):
        for target in find_targets(build(family), projections="mlp"):
            x = torch.randn(3, target.in_features)
            bias = getattr(target.module, "bias", None)
            y = x @ target.weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(target.module(x), y)
            assert target.weight.shape == (target.out_features, target.in_features)


def test_vit():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    targets = find_targets(ViTModel(config), layers=[1])
    assert [target.layer for target in targets] == [1]
    assert targets[0].out_features == 32


def test_old_vit_names():
    block = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(4, 4)})}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(4, 8)}),
            "output": nn.ModuleDict({"dense": nn.Linear(8, 4)}),
        }
    )
    model = nn.ModuleDict({"layer": nn.ModuleList([block])})
    assert [t.name for t in find_targets(model)] == ["layer.0.intermediate.dense"]
    found = find_targets(model, projections="mlp_out")
    assert [t.name for t in found] == ["layer.0.output.dense"]


def test_name_endings_and_layers(llama):
    targets = find_targets(llama, layers=[1], projections=["gate_proj", "q_proj"])
    assert [t.name for t in targets] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
    ]
    assert [t.layer for t in find_targets(llama, projections=["lm_head"])] == [None]


def test_sequential():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [t.name for t in find_targets(model, projections=["0", "2"])] == ["0", "2"]
    assert [t.name for t in named_targets(model, ["2", "0"])] == ["2", "0"]
    with pytest.raises(TargetError, match="ReLU"):
        named_targets(model, ["1"])
    with pytest.raises(TargetError, match="ModuleList"):
        find_targets(model, layers=[0], projections=["0"])


def test_blocks_are_the_outermost_list():
    experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)] * 5)}) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(experts), "lm_head": nn.Linear(2, 2)})
    assert find_targets(model, layers=[2], projections=["0"])[0].layer == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [2]}, "layers 0 to 1"),
        ({"layers": [-1]}, "layers 0 to 1"),
        ({"layers": []}, "empty"),
        ({"projections": "mpl"}, "mlp_in"),
        ({"projections": ["gate"]}, "gate_proj"),
        ({"projections": ["gate_proj", "up_porj"]}, r"\['up_porj'\]; the model has"),
        ({"projections": ["gate_proj", ""]}, r"\[''\]"),
    ],
)
def test_errors_say_what_is_there(llama, arguments, message):
    with pytest.raises(TargetError, match=message):
        find_targets(llama, **arguments)


def test_spaces_around_endings_do_not_matter(llama):
    spaced, plain = (
        find_targets(llama, projections=ends)
        for ends in (["gate_proj", " up_proj"], ["gate_proj", "up_proj"])
    )
    assert [t.name for t in spaced] == [t.name for t in plain]
    assert len(plain) == 4


def test_missing_and_repeated_names(llama):
    with pytest.raises(TargetError, match="up_proj"):
        named_targets(llama, ["model.layers.9.mlp.gate_proj"])
    with pytest.raises(TargetError, match="twice"):
        named_targets(llama, ["lm_head", "lm_head"])


def test_quantized_weight_is_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="int8"):
        named_targets(model, ["0"])


def test_an_offloaded_weight_is_refused():
    linear = nn.Linear(3, 4, device="meta")
    linear._hf_hook = object()  # as accelerate leaves it
    with pytest.raises(TargetError, match="meta"):
        named_targets(nn.Sequential(linear), ["0"])
