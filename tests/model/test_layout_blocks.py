"""Models whose blocks differ: every block is verified, and each has a name of its own."""

import pytest
import torch
import transformers
from tiny import LAYERS, VOCABULARY, WIDTH, build, fresh_model, tiny_tokenizer
from torch import nn

import lirefs
from lirefs.errors import LayoutError
from lirefs.model.layout import SITES
from lirefs.model.layout_search import find_layout
from lirefs.model.observe import Seen, observe

BASE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DENSE = {"intermediate_size": 48, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
ATTENTION = ("post_attention_layernorm", "post_feedforward_layernorm")

# family: configuration, settings, (attention, mlp) of each block
HYBRIDS = {
    "qwen3_next": (
        "Qwen3NextConfig",
        LINEAR
        | EXPERTS
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"layer_types": ["linear_attention", *["full_attention"] * 2, "linear_attention"]},
        [("linear_attn", "mlp"), *[("self_attn", "mlp")] * 2, ("linear_attn", "mlp")],
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        LINEAR | {"layer_types": [*["linear_attention"] * 3, "full_attention"]},
        [*[("linear_attn", "mlp")] * 3, ("self_attn", "mlp")],
    ),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv", "conv"]},
        [(name, "feed_forward") for name in ("conv", "self_attn", "conv", "conv")],
    ),
    "jamba": (
        "JambaConfig",
        MAMBA
        | EXPERTS
        | {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
        [("mamba", "feed_forward"), ("self_attn", "feed_forward")] * 2,
    ),
    "bamba": (
        "BambaConfig",
        MAMBA
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
        | {"attn_layer_indices": [2]},
        [(name, "feed_forward") for name in ("mamba", "mamba", "self_attn", "mamba")],
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        LINEAR | {"layer_types": ["linear_attention", *["full_attention"] * 3]},
        [("linear_attn", "mlp"), *[ATTENTION] * 3],
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"lru_width": WIDTH, "block_types": ["recurrent", "attention"]},
        [("temporal_block", "mlp_block")] * 4,
    ),
}


def hybrid(family):
    name, settings, _ = HYBRIDS[family]
    config = getattr(transformers, name)
    shared = BASE | HEADS | DENSE
    if family in ("lfm2", "jamba", "bamba", "olmo_hybrid"):
        shared = {key: value for key, value in shared.items() if key != "head_dim"}
    return build(config(**shared, **settings))


@pytest.mark.parametrize("family", HYBRIDS)
def test_attention_of_every_block_of_a_hybrid(family):
    model = hybrid(family)
    layout = find_layout(model)
    expected = HYBRIDS[family][2]
    assert list(zip(layout.attention, layout.mlp, strict=True)) == expected
    lm = lirefs.wrap(model, tiny_tokenizer())
    states = lirefs.capture(lm, ["abc", "some words"], sites=SITES, progress=False)
    for layer in range(LAYERS):
        pre, attention, mlp, post = (states[layer, site] for site in SITES)
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)
        assert attention.norm() > 0
    described = layout.describe()
    assert all(name in described for pair in expected for name in pair)


def test_a_site_that_only_some_blocks_have_is_refused_at_the_others():
    config = transformers.RwkvConfig(**BASE, attention_hidden_size=WIDTH)
    model = build(config)
    layout = find_layout(model)  # block 0 has a norm more, which changes the stream it reads
    assert layout.attention == (None, "attention", "attention", "attention")
    lm = lirefs.wrap(model, tiny_tokenizer())
    with pytest.raises(LayoutError, match=r"attn_out is not available at layer 0.*layers 1, 2, 3"):
        lirefs.capture(lm, ["abc"], sites=["attn_out"], progress=False)
    found = lirefs.capture(lm, ["abc"], layers=[1], sites=SITES, progress=False)
    pre, attention, mlp, post = (found[1, site] for site in SITES)
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)
    assert "not available (layers 0); attention (layers 1, 2, 3)" in layout.describe()


@pytest.mark.parametrize("layer", range(1, LAYERS - 1))
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon", "bloom"])
def test_a_block_in_the_middle_that_does_not_add_up_is_seen(family, layer):
    model = fresh_model(family)
    block = model.get_submodule(f"{find_layout(model).blocks}.{layer}")
    plain = block.forward

    def scaled(*args, **kwargs):
        output = plain(*args, **kwargs)
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    block.forward = scaled
    layout = find_layout(model)
    assert {*layout.attention, *layout.mlp} == {None}


@pytest.mark.parametrize("family", ["cohere", "cohere2", "phi", "gptj", "codegen", "stablelm"])
def test_parallel_attention_adds_up_at_every_block(family):
    names = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4}
    parallel = family in ("gptj", "codegen")
    settings = {"vocab_size": VOCABULARY} | names if parallel else BASE | DENSE
    settings |= {} if parallel else {"num_attention_heads": 4, "num_key_value_heads": 4}
    settings |= {"use_parallel_residual": True} if family == "stablelm" else {}
    model = build(transformers.AutoConfig.for_model(family, **settings))
    layout = find_layout(model)
    assert None not in (*layout.attention, *layout.mlp)
    assert len(set(layout.attention)) == len(set(layout.mlp)) == 1


def test_a_name_by_hand_is_for_the_blocks_that_have_it():
    model = hybrid("qwen3_5")
    layout = find_layout(model, {"attention": "self_attn"})
    assert layout == find_layout(model)
    with pytest.raises(LayoutError, match="does not equal resid_post"):
        find_layout(model, {"attention": "self_attn.q_norm"})
    with pytest.raises(LayoutError, match="no module 'mixer'"):
        find_layout(model, {"attention": "mixer"})


class TwoStreams(nn.Module):
    """Blocks that hand on what they add and the residual apart, as fused norms do."""

    def __init__(self, apart):
        super().__init__()
        self.table, self.apart = nn.Embedding(10, 8), apart
        self.layers = nn.ModuleList([_Branch() for _ in range(3)])
        self.config = transformers.PretrainedConfig(num_hidden_layers=3)

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        residual = torch.zeros_like(hidden)
        for layer in self.layers:
            if self.apart:
                hidden, residual = layer(hidden, residual)
            else:
                hidden = layer(hidden + residual, torch.zeros_like(hidden))[0]
        return hidden


class _Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden, residual):
        residual = residual + hidden
        return self.inner(residual), residual


def test_a_residual_stream_that_is_handed_on_apart_is_refused():
    with pytest.raises(LayoutError, match="second tensor of hidden states"):
        find_layout(TwoStreams(apart=True))
    assert find_layout(TwoStreams(apart=False)).n_layers == 3


class Looped(nn.Module):
    def __init__(self, blocks, runs):
        super().__init__()
        self.table, self.runs = nn.Embedding(10, 8), runs
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        for _ in range(self.runs):
            for layer in self.layers:
                hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize(("blocks", "runs"), [(2, 2), (3, 4), (1, 3)])
def test_blocks_that_run_again_are_refused(blocks, runs):
    with pytest.raises(LayoutError, match=rf"layers\.0 runs {runs} times in a forward pass"):
        find_layout(Looped(blocks, runs), {"blocks": "layers"})
    assert find_layout(Looped(blocks, 1), {"blocks": "layers"}).n_layers == blocks


def test_other_axes_are_refused():
    # XLNet's states are (tokens, batch, width): its rows would be taken for tokens.
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=2, d_inner=8
    )
    with pytest.raises(LayoutError, match=r"\(6, 1, 32\) for 1 text of 6 tokens"):
        find_layout(build(config))


@pytest.mark.parametrize("family", ["hyper-connections", "alternating updates"])
def test_several_streams_at_once_are_refused(family):
    config = (
        transformers.Gemma3nTextConfig(
            **BASE | HEADS | DENSE | {"num_kv_shared_layers": 0, "laurel_rank": 8},
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=8,
            layer_types=["full_attention"] * LAYERS,
        )
        if family == "alternating updates"
        else transformers.DeepseekV4Config(
            **BASE | HEADS | DENSE | EXPERTS | {"q_lora_rank": 16, "moe_intermediate_size": 16}
        )
    )
    with pytest.raises(LayoutError, match="did not carry hidden states"):
        find_layout(build(config))


def test_blocks_of_two_attentions_each_are_found():
    settings = BASE | HEADS | DENSE | {"num_layers": 2, "head_dim": 4, "num_key_value_heads": 4}
    settings |= {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4}
    settings |= {"moe_topk": 2, "kv_lora_rank": 8, "q_lora_rank": 16, "v_head_dim": 8}
    settings |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    layout = find_layout(build(transformers.LongcatFlashConfig(**settings)))
    assert (layout.n_layers, layout.attention) == (2, (None, None))


def test_one_forward_pass_is_enough(monkeypatch):
    passes = []

    def counted(*given):
        passes.append(1)
        return observe(*given)

    monkeypatch.setattr("lirefs.model.layout_search.observe", counted)
    find_layout(hybrid("jamba"))
    assert len(passes) == 1


@pytest.mark.parametrize("wrapped", [nn.DataParallel, "ddp"])
def test_models_wrapped_for_training_are_refused(wrapped, one_process):
    model = fresh_model("llama")
    outer = nn.parallel.DistributedDataParallel(model) if wrapped == "ddp" else wrapped(model)
    with pytest.raises(LayoutError, match=r"wrapped in D\w+Parallel.*model\.module"):
        lirefs.wrap(outer, tiny_tokenizer())
    assert find_layout(outer.module).n_layers == LAYERS


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wing", ["layout", "capture", "steer", "kfac"])
@pytest.mark.parametrize("layer", [LAYERS, -1, 99])
def test_a_missing_layer_is_worded_alike_everywhere(wing, layer):
    import kfac

    lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer())
    direction = lirefs.Direction(vector=torch.ones(WIDTH), layer=1)
    calls = {
        "layout": lambda: lm.layout.block(lm.model, layer),
        "capture": lambda: lirefs.capture(lm, ["a"], layers=[1, layer], progress=False),
        "steer": lambda: lirefs.Steer(direction, "add", layers=[1, layer]).attach(lm.model),
        "kfac": lambda: kfac.find_targets(lm.model, layers=[1, layer]),
    }
    with pytest.raises(lirefs.LirefsError) as caught:
        calls[wing]()
    assert str(caught.value) == f"layer {layer} does not exist: the model has layers 0 to 3"


@pytest.mark.parametrize("layer", [LAYERS - 1, LAYERS - 2])
def test_blocks_that_are_gone_are_named(layer):
    lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer())
    del lm.model.model.layers[LAYERS - 2 :]
    with pytest.raises(LayoutError, match=f"no module model.layers.{layer} any more.*wrap"):
        lirefs.capture(lm, ["abc"], layers=[layer], progress=False)
    assert lirefs.wrap(lm.model, lm.tokenizer, layout={"blocks": "model.layers"}).n_layers == 2


def test_seen_keeps_what_else_a_module_took_and_gave():
    seen, other = Seen(), torch.ones(2)
    seen.before(nn.Identity(), (torch.zeros(1), other), {"mask": None})
    seen.after(nn.Identity(), (), (torch.zeros(1), other))
    assert seen.also_took[0] is other
    assert seen.also_gave[0] is other
