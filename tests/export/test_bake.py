import pytest
import torch
from tiny import fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lirefs import Direction, Steer, wrap
from lirefs.errors import BakeError
from lirefs.export.bake import bake
from lirefs.model.intervention import applied
from lirefs.steering import scope

IDS = torch.tensor([[0, 40, 50, 60, 70, 80], [0, 41, 51, 61, 71, 81]])
EVERYWHERE = ("resid_pre", "attn_out", "resid_post")


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
            pytest.raises(BakeError, match=r"add at layers \[1\], scope .* is attached"),
            attached.apply(llama),
        ):
            bake(Steer(one, "add"), llama)
    for family in ("olmo2", "gemma2"):
        with pytest.raises(BakeError, match="a norm behind the projection"):
            bake(Steer(one, "add"), fresh_model(family))
    for family in ("qwen2", "mistral", "phi3"):
        with pytest.raises(BakeError, match="no setting that gives it one"):
            bake(Steer(one, "add"), fresh_model(family))
    with pytest.raises(BakeError, match="differs from the hooked one"):
        # A norm stands behind the embedding.
        bake(Steer(direction(0, "resid_pre"), "add"), fresh_model("bloom"))
