"""Every claim of a layout is checked again here with hooks of the test's own."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from tiny import FAMILIES, LAYERS, WIDTH, build, fresh_model, tiny_config, tiny_model
from torch import nn

from lirefs.errors import LayoutError, SettingError
from lirefs.model.layout import SITES
from lirefs.model.layout_search import find_layout, layout_of
from lirefs.model.observe import hidden_input, hidden_of

POST_NORM = ("post_attention_layernorm", "post_feedforward_layernorm")
WHERE = {
    "olmo2": POST_NORM,
    "gemma2": POST_NORM,
    "gemma3": POST_NORM,
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "falcon": ("self_attention", "mlp"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
IDS = torch.tensor([[5, 40, 77, 9, 100], [60, 61, 3, 90, 12]])


def read_sites(model, layout, layer):
    """Return the four sites of ``layer``, read with hooks on the modules that the layout names."""
    values, handles = {}, []
    for site in SITES:
        module, end = layout.module(model, site, layer)

        def before(_, args, kwargs, site=site):
            values[site] = hidden_input(args, kwargs).clone()

        def after(_, args, output, site=site):
            values[site] = hidden_of(output, batch=len(IDS)).clone()

        if end == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            model(input_ids=IDS)
    finally:
        for handle in handles:
            handle.remove()
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_where_they_are(family):
    model = tiny_model(family)
    layout = find_layout(model)
    assert (layout.n_layers, layout.width) == (LAYERS, WIDTH)
    pairs = zip(layout.attention, layout.mlp, strict=True)
    assert [*pairs] == [WHERE.get(family, ("self_attn", "mlp"))] * LAYERS
    assert model.get_submodule(layout.unembedding) is model.get_output_embeddings()
    assert layout.final_norm is not None
    assert all(layout.norms)
    assert layout.block(model, 2) is model.get_submodule(layout.blocks)[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_add_up_in_every_layer(family):
    model = tiny_model(family)
    layout = find_layout(model)
    for layer in range(LAYERS):
        values = read_sites(model, layout, layer)
        assert {value.shape for value in values.values()} == {(*IDS.shape, WIDTH)}
        total = values["resid_pre"] + values["attn_out"] + values["mlp_out"]
        torch.testing.assert_close(total, values["resid_post"], rtol=1e-4, atol=1e-4)
        assert values["attn_out"].norm() > 0.01 * values["resid_pre"].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_is_the_one_transformers_reports(family):
    model = tiny_model(family)
    layout = find_layout(model)
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=True)
    for layer in range(LAYERS):
        values = read_sites(model, layout, layer)
        torch.testing.assert_close(values["resid_pre"], out.hidden_states[layer])
    last = model.get_submodule(layout.final_norm)(values["resid_post"])
    torch.testing.assert_close(last, out.hidden_states[-1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_parts(family, dtype):
    model = copy.deepcopy(tiny_model(family)).to(dtype)
    assert find_layout(model) == find_layout(tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "olmo2", "bloom"])
def test_the_model_is_left_as_it_was(family):
    model = fresh_model(family)
    model.train()
    layout = find_layout(tiny_model(family))
    layout.block(model, 1).eval()  # each module has its own mode to be restored
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_layout(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_are_removed_when_the_forward_pass_fails():
    model = fresh_model("llama")
    model.model.layers[2].mlp.forward = lambda *args: 1 / 0
    with pytest.raises(LayoutError, match="ZeroDivisionError"):
        find_layout(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_does_not_add_up_makes_two_sites_unavailable():
    model = fresh_model("llama")
    block = model.model.layers[-1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 1.5
    layout = find_layout(model)
    assert {*layout.attention, *layout.mlp} == {None}
    assert layout.module(model, "resid_post", 0)[1] == "output"
    with pytest.raises(LayoutError, match="attn_out is not available"):
        layout.module(model, "attn_out", 0)
    with pytest.raises(LayoutError, match="does not equal resid_post"):
        find_layout(model, {"attention": "self_attn", "mlp": "mlp"})


def test_opt_with_projections_has_neither_final_norm_nor_direct_unembedding():
    config = tiny_config("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    layout = find_layout(build(config))
    assert layout.final_norm is None
    assert layout.unembedding is None
    assert {*layout.attention} == {None}  # norms after the sum: nothing is simply added


def test_a_model_without_a_head_has_no_unembedding():
    layout = find_layout(tiny_model("llama").model)
    assert layout.blocks == "layers"
    assert layout.final_norm == "norm"
    assert layout.unembedding is None


def test_one_layer_is_enough():
    layout = find_layout(fresh_model("gpt2", n_layer=1))
    assert (layout.n_layers, layout.attention) == (1, ("attn",))


@pytest.mark.parametrize("vision_layers", [2, LAYERS])
def test_the_decoder_of_a_model_that_also_sees(vision_layers):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=tiny_config("llama"), image_token_index=3
    )
    layout = find_layout(LlavaForConditionalGeneration(config).eval())
    assert layout.blocks == "model.language_model.layers"
    assert (layout.n_layers, layout.width) == (LAYERS, WIDTH)
    assert layout.attention == ("self_attn",) * LAYERS
    assert layout.final_norm == "model.language_model.norm"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer_attn, self.feed = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.mixer_attn(x)
        return x + self.feed(x)


class Homemade(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.stack = nn.Embedding(10, 8), nn.Sequential(Block(), Block())
        self.end, self.out = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, input_ids):
        return self.out(self.end(self.stack(self.table(input_ids))))


def test_a_module_of_one_s_own_by_hand():
    torch.manual_seed(0)
    model = Homemade()
    with pytest.raises(LayoutError, match=r"Homemade.*'blocks': 'model\.layers'"):
        find_layout(model)
    layout = find_layout(model, {"blocks": "stack", "unembedding": "out"})
    assert (layout.attention, layout.mlp) == (("mixer_attn",) * 2, ("feed",) * 2)
    assert (layout.final_norm, layout.unembedding, layout.n_layers) == ("end", "out", 2)
    assert layout_of(model) is layout
    model.stack = nn.Sequential(OrderedDict(first=Block(), second=Block()))  # not by index
    with pytest.raises(LayoutError, match=r"stack\.0 was not run.*or did not carry"):
        find_layout(model, {"blocks": "stack"})


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ({"block": "model.layers"}, SettingError, "unknown part 'block'"),
        ({"blocks": "model.stack"}, LayoutError, "no module 'model.stack'"),
        ({"blocks": "model.norm"}, LayoutError, "not a ModuleList"),
        ({"final_norm": "model.layers.0.input_layernorm"}, LayoutError, "does not read"),
        ({"unembedding": "model.layers.0.mlp.up_proj"}, LayoutError, "does not read"),
        ({"attention": "input_layernorm"}, LayoutError, "does not equal resid_post"),
        ({"mlp": "nothing"}, LayoutError, "no module 'nothing'"),
    ],
)
def test_wrong_parts_by_hand(overrides, error, says):
    with pytest.raises(error, match=says) as caught:
        find_layout(fresh_model("llama"), overrides)
    assert "\n" not in str(caught.value)


def test_right_parts_by_hand_give_the_same_layout():
    model = fresh_model("olmo2")
    found = find_layout(model)
    parts = {"blocks": found.blocks, "final_norm": found.final_norm}
    parts |= {"attention": found.attention[0], "mlp": found.mlp[0]}
    assert find_layout(model, parts) == found


def test_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(LayoutError, match="encoder-decoder"):
        find_layout(T5ForConditionalGeneration(config))


def test_layout_is_remembered_and_forgotten_with_the_model(monkeypatch):
    model = fresh_model("llama")
    layout = layout_of(model)
    monkeypatch.setattr(
        "lirefs.model.layout_search.observe", lambda *args: pytest.fail("verified twice")
    )
    assert layout_of(model) is layout
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("layer", [-1, LAYERS, 1.0, "1", None])
def test_layers_that_do_not_exist(layer):
    model = tiny_model("llama")
    with pytest.raises(SettingError, match="layer"):
        layout_of(model).block(model, layer)


def test_a_site_that_does_not_exist():
    model = tiny_model("llama")
    with pytest.raises(SettingError, match="resid_pre, attn_out, mlp_out, resid_post"):
        layout_of(model).module(model, "resid_mid", 0)


def test_describe_names_every_part():
    text = layout_of(tiny_model("bloom")).describe()
    assert "transformer.h (4 layers, width 32)" in text
    assert "self_attention.dense" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_layers(family):
    config = copy.deepcopy(tiny_config(family))
    config.num_hidden_layers = 0
    if hasattr(config, "layer_types"):
        config.layer_types = []
    with pytest.raises(LayoutError, match="no list of decoder blocks found"):
        find_layout(build(config))
