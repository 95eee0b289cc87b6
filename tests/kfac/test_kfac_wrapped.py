"""Targets, factors and edits of models that something wraps: adapters, vision, compilation."""

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from curvature_tools import assert_same, batch, build, collect
from tiny import LAYERS, fresh_model, tiny_config, tiny_tokenizer
from torch import nn

import kfac
import lirefs
from lirefs.errors import (
    ChangedWeightsError,
    FactorsMismatchError,
    LayoutError,
    ScopeError,
    TargetError,
)
from lirefs.model.guest import accepts
from lirefs.model.layout import SITES
from lirefs.model.layout_search import decoder_blocks, find_layout
from lirefs.steering.scope import from_position

BATCHES = [batch([0, 1, 2]), batch([3, 4, 5])]
ADAPTERS = {
    "lora": lambda names: peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False),
    "dora": lambda names: peft.LoraConfig(
        r=4, target_modules=names, use_dora=True, init_lora_weights=False
    ),
    "oft": lambda names: peft.OFTConfig(target_modules=names, oft_block_size=4, init_weights=False),
    "ia3": lambda names: peft.IA3Config(
        target_modules=names, feedforward_modules=names, init_ia3_weights=False
    ),
    "loha": lambda names: peft.LoHaConfig(r=4, target_modules=names, init_weights=False),
}
# The matrices that each adapter wraps, by family.
WRAPPED = {"llama": "down_proj", "gpt2": "c_fc", "gpt_neox": "dense_4h_to_h", "opt": "fc1"}


def adapted(family="llama", kind="lora", names=None):
    torch.manual_seed(0)
    model = peft.get_peft_model(build(family).double(), ADAPTERS[kind](names or [WRAPPED[family]]))
    return model.double().eval()


def endings(targets):
    return [target.name.rpartition(".")[2] for target in targets]


@pytest.mark.parametrize("family", WRAPPED)
def test_a_wrapped_matrix_is_a_target_in_its_place(family):
    plain = kfac.find_targets(build(family), projections="mlp")
    model = adapted(family)
    targets = kfac.find_targets(model, projections="mlp")
    assert [(t.layer, *t.weight.shape) for t in targets] == [
        (t.layer, *t.weight.shape) for t in plain
    ]
    assert endings(targets) == endings(plain)
    names = [target.name for target in targets]
    again = kfac.named_targets(model, names)
    assert [t.parameter for t in again] == [t.parameter for t in targets]
    assert any(
        t.module is model.get_submodule(f"{t.name}.base_layer")
        for t in targets
        if (t.name.endswith(WRAPPED[family]))
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_factors_under_an_adapter_are_those_of_what_runs(kind):
    model = adapted(kind=kind)
    target = kfac.find_targets(model, layers=[0], projections="mlp_out")[0]
    own = collect(model, BATCHES, [target])
    reads = []
    hook = target.module.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach()))
    kfac.collect(model, BATCHES, [target], progress=False)
    hook.remove()
    counted = [one["attention_mask"][:, 1:] != 0 for one in BATCHES]
    rows = torch.cat([read[:, :-1][mask] for read, mask in zip(reads, counted, strict=True)])
    torch.testing.assert_close(own.A(target.name), rows.T @ rows / len(rows))
    with model.disable_adapter():
        off = collect(model, BATCHES, [target])
    # Behind the adapter only the gradients know of it, with OFT the inputs too.
    assert (off.G(target.name) - own.G(target.name)).norm() > 1e-3 * own.G(target.name).norm()


def test_factors_of_a_merged_adapter_are_those_of_base_plus_adapter():
    model = adapted()
    wanted = kfac.find_targets(model, layers=[0], projections="mlp_out")
    apart = collect(model, BATCHES, wanted)
    edit = kfac.CurvatureEdit(apart, 0.5)
    model.merge_adapter()
    with pytest.raises(FactorsMismatchError, match=wanted[0].name):
        edit.attach(model)
    merged = collect(model, BATCHES, wanted)
    assert_same(apart, merged, 1e-9)
    model.unmerge_adapter()


def test_an_edit_changes_the_base_and_leaves_the_adapter():
    model = adapted()
    targets = kfac.find_targets(model, projections="mlp")
    factors = collect(model, BATCHES, targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with kfac.CurvatureEdit(factors, 0.5).apply(model):
        changed = {name for name, one in model.state_dict().items() if not one.equal(before[name])}
        assert changed == {
            next(name for name, one in model.named_parameters() if one is target.parameter)
            for target in targets
        }
        out = model(**BATCHES[0]).logits
        with model.disable_adapter():
            assert not torch.equal(model(**BATCHES[0]).logits, out)
    assert all(one.equal(before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_an_adapter_merged_into_edited_weights_is_not_thrown_away(merge):
    model = adapted()
    factors = collect(model, BATCHES, kfac.find_targets(model, projections="mlp_out"))
    original = [target.weight.clone() for target in factors.targets(model)]
    targets = factors.targets(model)
    handle = kfac.CurvatureEdit(factors, 0.5).attach(model)
    getattr(model, merge)()
    with pytest.raises(ChangedWeightsError, match="merged adapter"):
        handle.remove()
    handle.remove(discard=True)
    assert all(map(torch.equal, original, (target.weight for target in targets)))


def test_an_edit_stays_removable_while_adapters_come_and_go():
    model = adapted()
    factors = collect(model, BATCHES, kfac.find_targets(model, projections="mlp_out"))
    before = model(**BATCHES[0]).logits
    with kfac.CurvatureEdit(factors, 0.5).apply(model):
        model.add_adapter("two", ADAPTERS["lora"](["up_proj", "down_proj"]))
        model.set_adapter("two")
    model.set_adapter("default")
    assert torch.equal(model(**BATCHES[0]).logits, before)


def test_copies_that_peft_keeps_are_named():
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(build("llama"), config)
    for find in (
        lambda: kfac.find_targets(model, projections=["lm_head"]),
        lambda: kfac.named_targets(model, ["base_model.model.lm_head"]),
    ):
        with pytest.raises(TargetError, match=r"several copies.*lm_head\.modules_to_save\.default"):
            find()
    name = "base_model.model.lm_head.modules_to_save.default"
    assert kfac.named_targets(model, [name])[0].weight.shape == (50, 16)
    assert len(kfac.find_targets(model)) == 4


def test_a_compiled_matrix_is_found():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = torch.compile(model.model.layers[1].mlp.up_proj)
    assert endings(kfac.find_targets(model)) == ["gate_proj", "up_proj"] * 2


@pytest.mark.parametrize("family", ["bloom", "opt", "falcon", "llama", "gpt2"])
def test_sites_of_a_model_with_adapters_count_the_adapter(family):
    names = {"bloom": ["dense", "dense_4h_to_h"], "opt": ["out_proj", "fc2"], "gpt2": ["c_proj"]}
    names |= {"falcon": ["dense", "dense_4h_to_h"], "llama": ["o_proj", "down_proj"]}
    model = fresh_model(family)
    # An adapter begins at zero, where what it wraps and the sum of both are the same.
    config = peft.LoraConfig(r=4, target_modules=names[family])
    wrapped = peft.get_peft_model(model, config).eval()
    lm = lirefs.wrap(wrapped, tiny_tokenizer())
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    states = lirefs.capture(lm, ["abc", "no"], sites=SITES, progress=False)
    for layer in range(LAYERS):
        pre, attention, mlp, post = (states[layer, site] for site in SITES)
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(lirefs.LirefsError, match=r"\(1, 9, 32\) for 1 text of 6 tokens"):
        lirefs.wrap(peft.get_peft_model(fresh_model("llama"), config), tiny_tokenizer())


@pytest.mark.parametrize("state", ["on", "off", "merged", "swapped", "unloaded"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_steering_a_model_with_adapters(family, state):
    names = {"llama": ["o_proj", "down_proj"], "bloom": ["dense"], "gpt2": ["c_proj"]}
    config = peft.LoraConfig(r=4, target_modules=names[family], init_lora_weights=False)
    model = peft.get_peft_model(fresh_model(family), config).eval()
    model.add_adapter("two", config)
    lm = lirefs.wrap(model, tiny_tokenizer())
    one = lirefs.Direction(vector=torch.randn(lm.width), layer=1)
    steer = lirefs.Steer(one, "add", 1.0, layers=[0, 2], sites=["attn_out", "mlp_out"])

    def change():
        if state == "merged":
            model.merge_adapter()
        if state == "swapped":
            model.set_adapter("two")
        return model.disable_adapter() if state == "off" else nullcontext()

    with change():
        twin = copy.deepcopy(model).merge_and_unload() if state != "off" else model.unload()
        other = lirefs.wrap(twin.eval(), tiny_tokenizer())
        if state == "unloaded":
            lm = lirefs.wrap(model.merge_and_unload().eval(), tiny_tokenizer())
        with steer.apply(lm.model):
            found = lirefs.capture(lm, ["abc", "no"], sites=SITES, progress=False).values
        with steer.apply(other.model):
            expected = lirefs.capture(other, ["abc", "no"], sites=SITES, progress=False).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", ["prompt", "generated", from_position(0), from_position(3)])
def test_scopes_in_a_model_with_virtual_tokens_are_refused(scope):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    lm = lirefs.wrap(peft.get_peft_model(fresh_model("llama"), config), tiny_tokenizer())
    one = lirefs.Direction(vector=torch.ones(lm.width), layer=1)
    with pytest.raises(ScopeError, match="3 virtual tokens"):
        lirefs.Steer(one, "add", 1.0, scope=scope).attach(lm.model)
    with lirefs.Steer(one, "add", 1.0).apply(lm.model):
        lirefs.capture(lm, ["abc"], progress=False)


@pytest.mark.parametrize("setting", ["repetition_penalty", "no_repeat_ngram_size", "max_length"])
def test_generating_leaves_the_settings_of_the_model_inside(setting):
    model = fresh_model("llama")
    setattr(model.generation_config, setting, 3)
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    lirefs.wrap(wrapped, tiny_tokenizer()).generate("abc", max_new_tokens=2)
    assert getattr(model.generation_config, setting) == 3
    assert getattr(wrapped.generation_config, setting) == 3


@pytest.mark.parametrize("wrapper", ["peft", "compile", "parallel", "all"])
def test_arguments_are_seen_through_wrappers(wrapper):
    model = fresh_model("llama")
    if wrapper in ("peft", "all"):
        model = peft.get_peft_model(model, ADAPTERS["lora"](["up_proj"]))
    if wrapper in ("compile", "all"):
        model = torch.compile(model)
    if wrapper in ("parallel", "all"):
        model = nn.DataParallel(model)
    assert accepts(model, "position_ids")
    assert not accepts(model, "pixel_values")


# A text decoder of 4 blocks of width 32 in a model that also sees.
def llava(depth=6, width=64):
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    return transformers.LlavaConfig(
        text_config=tiny_config("llama"), vision_config=vision, image_token_index=3
    )


def qwen2_vl():
    vision = {"depth": 6, "embed_dim": 64, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    text = tiny_config("qwen2").to_dict() | {"model_type": "qwen2_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision)


def gemma3():
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5}
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    return transformers.Gemma3Config(
        text_config=tiny_config("gemma3").to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
    )


VISION = {
    "llava": llava,
    "llava, as deep": lambda: llava(LAYERS),
    "llava, vision smaller": lambda: llava(LAYERS, 16),
    "qwen2_vl": qwen2_vl,
    "gemma3": gemma3,
}


def mllama():
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
    vision |= {"attention_heads": 4, "image_size": 8, "patch_size": 4, "num_global_layers": 1}
    vision |= {"intermediate_layers_indices": [1], "vision_output_dim": 128}
    text = tiny_config("llama").to_dict() | {"model_type": "mllama_text_model"}
    text |= {"cross_attention_layers": [1]}
    return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=3)


@pytest.mark.parametrize("name", ["mllama", "on the meta device"])
def test_layers_of_a_decoder_that_does_not_run_on_text_alone(name):
    with torch.device("cpu" if name == "mllama" else "meta"):
        config = mllama() if name == "mllama" else llava(LAYERS)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    assert decoder_blocks(model, "largest") == "model.language_model.layers"
    if name == "mllama":  # its cross-attention is skipped without an image
        with pytest.raises(LayoutError, match=r"layers\.1 was not run on a text alone"):
            find_layout(model)
        assert kfac.find_targets(model)[0].name == "model.language_model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("name", VISION)
def test_layers_are_those_of_the_text_decoder_in_both_packages(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(VISION[name]()).eval()
    targets = kfac.find_targets(model, layers=[0])  # before lirefs has seen the model
    layout = find_layout(model)
    assert layout.n_layers == LAYERS
    assert all(target.name.startswith(f"{layout.blocks}.0.") for target in targets)
    assert {t.layer for t in kfac.find_targets(model)} == set(range(LAYERS))
    with pytest.raises(TargetError, match="layers 0 to 3"):
        kfac.find_targets(model, layers=[LAYERS])
    factors = kfac.collect(model, [batch([0, 1])], targets, progress=False)
    assert factors.names == [target.name for target in targets]


def test_a_layout_by_hand_holds_for_targets_too():
    model = fresh_model("llama")
    model.more = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(200, 200)}) for _ in range(6))
    assert {t.layer for t in kfac.find_targets(model)} == set(range(LAYERS))
    model = fresh_model("llama")
    model.config.num_hidden_layers = 99  # as in a model whose blocks are not found by themselves
    model.more = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(200, 200)}) for _ in range(6))
    assert kfac.find_targets(model)[0].name == "more.0.up_proj"
    lirefs.wrap(model, tiny_tokenizer(), layout={"blocks": "model.layers"})
    assert kfac.find_targets(model)[0].name == "model.layers.0.mlp.gate_proj"


def test_networks_without_a_decoder_are_read_as_before():
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    text = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=16,
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    found = kfac.find_targets(transformers.CLIPModel(config))
    assert {(t.name.split(".")[0], t.layer) for t in found} == {
        ("vision_model", layer) for layer in range(3)
    }
    t5 = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    found = kfac.find_targets(transformers.T5ForConditionalGeneration(t5))
    assert {target.name.split(".")[0] for target in found} == {"decoder"}
    with torch.device("meta"):
        empty = transformers.AutoModelForImageTextToText.from_config(llava(LAYERS))
    targets = kfac.find_targets(empty)  # for a plan
    with pytest.raises(TargetError, match="meta device"):
        kfac.collect(empty, [{"input_ids": torch.zeros(1, 8, dtype=torch.long)}], targets)
