import peft
import pytest
import torch
from families import CORE, FAMILIES, family_lm
from families import build as build_family
from tiny import build, fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lirefs import Direction, Steer, wrap
from lirefs.errors import BakeError, LayoutError
from lirefs.export.bake import bake
from lirefs.model.intervention import applied
from lirefs.steering import scope

IDS = torch.tensor([[0, 40, 50, 60, 70, 80], [0, 41, 51, 61, 71, 81]])
EVERYWHERE = ("resid_pre", "attn_out", "resid_post")
FAMILY_NAMES = [
    name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
]


def direction(layer=1, site="resid_post", seed=0):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, layer, site)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def agrees(steer, model, folder):
    """Hooked, baked and reloaded models agree, and the first one is untouched."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    clean = logits(model)
    with applied(steer, model):
        expected = logits(model)
    baked = bake(steer, model)
    assert (expected - clean).abs().max() > 1e-2
    torch.testing.assert_close(logits(baked), expected, atol=1e-4, rtol=1e-4)
    loaded = reloaded(baked, folder)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.modules())
    assert torch.equal(logits(model), clean)
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return loaded


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
def test_add_becomes_a_bias(family, site, tmp_path):
    agrees(Steer(direction(2, site), "add", 1.5), fresh_model(family), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "phi3"])
def test_ablation_everywhere_orthogonalizes_what_writes(family, tied, tmp_path):
    model = fresh_model(family, tie_word_embeddings=tied)
    steer = Steer(direction(), "ablate", layers="all", sites=EVERYWHERE)
    loaded = agrees(steer, model, tmp_path)
    seen = []
    block = wrap(loaded, tiny_tokenizer()).layout.block(loaded, 3)
    block.register_forward_hook(lambda _, args, out: seen.append(out))
    logits(loaded)
    assert (seen[0] @ direction().unit).abs().max() < 1e-4


@pytest.mark.parametrize("operator", ["add", "amplify", "ablate", "clamp", "ablate_then_add"])
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_a_projection_writes_takes_any_affine_operator(family, site, operator, tmp_path):
    strength = 1.0 if operator == "ablate" else 3.0
    agrees(Steer(direction(1, site), operator, strength), fresh_model(family), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_before_the_first_layer_the_embedding_changes(family, tied, tmp_path):
    model = fresh_model(family, tie_word_embeddings=tied)
    agrees(Steer(direction(0, "resid_pre"), "add", 1.0), model, tmp_path)


def test_compositions_and_strengths_by_layer(tmp_path):
    ablate = Steer(direction(), "ablate", layers="all", sites=EVERYWHERE)
    add = Steer(direction(seed=1), "add", {0: 1.0, 1: 0.0, 2: -1.0, 3: 2.0}, layers="all")
    agrees(ablate + add, fresh_model("llama"), tmp_path)


def test_requires_grad_and_mode_are_those_of_the_model():
    model = fresh_model("llama").requires_grad_(False).train()
    baked = bake(Steer(direction(), "add"), model)
    assert not any(p.requires_grad for p in baked.parameters())
    assert baked.training
    assert model.training


def test_half_precision():
    model = fresh_model("llama").to(torch.bfloat16)
    assert bake(Steer(direction(), "add"), model).dtype == torch.bfloat16


def test_what_cannot_be_baked_says_why():
    one = direction()
    llama = fresh_model("llama")
    for steer, why in [
        (Steer(one, "add", scope="prompt"), "scope is 'prompt'"),
        (Steer(one, "add", scope=scope.from_position(2)), "from_position"),
        (Steer(one, "add", [1.0, None]), "by row or token"),
        (Steer(one, "add", lambda index: 1.0), "by row or token"),
        (Steer(one, "norm_preserving_add"), "length of h"),
        (Steer(one, "ablate"), "earlier layers wrote"),
        (Steer(one, "ablate", layers="all"), "earlier layers wrote"),
        (Steer(one, "amplify", 0.5), "earlier layers wrote"),
    ]:
        with pytest.raises(BakeError, match=why):
            bake(steer, llama)
    for attached in (Steer(one, "add"), Steer(one, "add", scope="prompt")):
        with (
            pytest.raises(BakeError, match=r"add 1 at layers \[1\], scope .* is attached"),
            attached.apply(llama),
        ):
            bake(Steer(one, "add"), llama)
    for family in ("olmo2", "gemma2"):
        with pytest.raises(BakeError, match="a norm behind the projection"):
            bake(Steer(one, "add"), fresh_model(family))
    for family in ("qwen3", "phi3", "mistral"):  # by default, Mistral has a window
        with pytest.raises(BakeError, match="no setting that gives it one"):
            bake(Steer(one, "add"), fresh_model(family))
    with pytest.raises(BakeError, match="a norm, or positions that are not learned"):
        bake(Steer(direction(0, "resid_pre"), "add"), fresh_model("bloom"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_add_makes_a_llama_of_its_namesakes(family, tied, tmp_path):
    model = fresh_model(family, tie_word_embeddings=tied, sliding_window=None)
    before = torch.random.get_rng_state()
    loaded = agrees(Steer(direction(), "add", 1.5), model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    ablate = Steer(direction(), "ablate", layers="all", sites=EVERYWHERE)
    assert type(bake(ablate, model)) is type(model)


FUSED = ["qwen3_moe", "deepseek_v3", "aria_text", "gpt_oss"]
"""Experts alone, with a shared one, stored (in, out), with biases."""


@pytest.mark.parametrize("family", FUSED)
def test_ablation_passes_through_experts(family, tmp_path):
    steer = Steer(direction(), "ablate", layers="all", sites=EVERYWHERE)
    agrees(steer, build_family(family), tmp_path)


@pytest.mark.parametrize("operator", ["add", "clamp"])
def test_experts_with_biases_take_what_is_added(operator, tmp_path):
    agrees(Steer(direction(1, "mlp_out"), operator, 3.0), build_family("gpt_oss"), tmp_path)
    with pytest.raises(BakeError, match="holds experts without a bias"):
        bake(Steer(direction(1, "mlp_out"), operator, 3.0), build_family("qwen3_moe"))


def test_scaled_residuals_scale_the_bias(tmp_path):
    config = FAMILIES["granite"].config()
    config.residual_multiplier = 0.22
    model = build(config)
    agrees(Steer(direction(2, "resid_pre"), "add", 1.5), model, tmp_path)
    with pytest.raises(LayoutError, match="attn_out is not available"):
        bake(Steer(direction(), "ablate", layers="all", sites=EVERYWHERE), model)


@pytest.mark.parametrize("operator", ["add", "ablate"])
def test_scaled_embeddings_scale_the_change(operator, tmp_path):
    agrees(Steer(direction(0, "resid_pre"), operator, 1.0), build_family("gemma"), tmp_path)


class Quantized(torch.nn.Parameter):
    """As the packages that quantize make theirs."""


def quantized(model):
    module = model.model.layers[1].mlp.down_proj
    module.weight = Quantized(module.weight.detach())
    return model


def eight_bits(model):
    module = model.model.layers[1].mlp.down_proj
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    return model


def offloaded(model):
    module = model.model.layers[1].mlp.down_proj
    module.weight = torch.nn.Parameter(module.weight.to("meta"))
    return model


def adapted(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (quantized, "down_proj.weight is quantized or sharded"),
        (eight_bits, r"quantized or sharded \(Parameter, torch.int8\)"),
        (offloaded, "down_proj.weight is offloaded"),
        (adapted, "merge_and_unload"),
    ],
)
def test_what_cannot_hold_a_change_is_refused_before_the_copy(change, says, monkeypatch):
    model = change(fresh_model("llama"))
    monkeypatch.setattr(type(model), "__deepcopy__", None, raising=False)
    with pytest.raises(BakeError, match=says):
        bake(Steer(direction(), "add"), model)


def test_the_error_names_what_can_do_it_instead():
    qwen = fresh_model("qwen3")
    with pytest.raises(BakeError, match=r"these can do it: .*vLLM, llama\.cpp control vector"):
        bake(Steer(direction(), "add"), qwen)
    with pytest.raises(BakeError) as refused:
        bake(Steer(direction(), "add", scope="prompt"), qwen)
    assert "these can do it: transformers hooks, vLLM (" in str(refused.value)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_is_baked_or_refused_with_its_reason(name):
    """The check of `bake` itself compares with the hooks; no family may fail it."""
    try:
        lm = family_lm(name)
    except LayoutError:
        return
    one = Direction(direction().vector.repeat(lm.width // 32), 1, "resid_post")
    everywhere = Steer(one, "ablate", layers="all", sites=EVERYWHERE)
    for steer in (Steer(one, "add"), everywhere):
        assert "differs from the hooked one" not in refusal(steer, lm.model)


def refusal(steer, model):
    try:
        bake(steer, model)
    except (BakeError, LayoutError) as refused:
        return str(refused)
    return ""
