"""What `load` passes on to `from_pretrained`, and adapters of PEFT in a folder."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lirefs import load
from lirefs.errors import ModelLoadError, ModelNotFoundError, SettingError

IDS = torch.tensor([[0, 40, 50, 60]])


@pytest.fixture
def folder(tmp_path):
    fresh_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(IDS).logits.detach()


def spied(monkeypatch, owner):
    calls = []
    real = owner.from_pretrained

    def from_pretrained(source, **kwargs):
        calls.append(kwargs)
        kwargs = {key: one for key, one in kwargs.items() if key != "quantization_config"}
        return real(source, **kwargs)

    monkeypatch.setattr(owner, "from_pretrained", from_pretrained)
    return calls


def test_settings_of_from_pretrained_are_passed_on(folder, monkeypatch):
    models, tokenizers = spied(monkeypatch, AutoModelForCausalLM), spied(monkeypatch, AutoTokenizer)
    lm = load(
        folder, device="cpu", attn_implementation="eager", revision="main", token="t", variant=None
    )
    assert lm.model.config._attn_implementation == "eager"
    both = {"revision": "main", "token": "t", "local_files_only": True, "trust_remote_code": False}
    assert tokenizers == [both]
    assert models[0].items() >= both.items()
    assert models[0].keys() - both == {
        "attn_implementation", "variant", "dtype", "output_loading_info"
    }  # fmt: skip


def test_what_is_quantized_is_placed_as_it_is_loaded(folder, monkeypatch):
    models = spied(monkeypatch, AutoModelForCausalLM)
    load(folder, device="cpu", quantization_config="a configuration")
    assert models[0]["quantization_config"] == "a configuration"
    assert models[0]["device_map"] == {"": torch.device("cpu")}


def test_offloading_is_passed_on(folder, tmp_path):
    off = tmp_path / "off"
    parts = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(4)))
    places = {
        "lm_head": "cpu",
        **{f"model.{part}": "cpu" for part in parts},
        "model.layers.3": "disk",
    }
    lm = load(folder, device_map=places, offload_folder=str(off))
    assert lm.model.model.layers[3].mlp.up_proj.weight.is_meta
    assert lm.generate("a", max_new_tokens=2) == load(folder, device="cpu").generate("a", 2)


def test_an_unknown_setting_is_named(folder):
    with pytest.raises(SettingError, match="unexpected keyword argument 'atn_implementation'"):
        load(folder, device="cpu", atn_implementation="eager")


def test_an_adapter_is_loaded_with_its_base_model(folder, adapter):
    path, logits = adapter
    lm = load(path, device="cpu", attn_implementation="eager")
    assert lm.name == str(path)
    assert lm.n_layers == 4
    assert not lm.model.training
    torch.testing.assert_close(lm.model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    base = load(folder, device="cpu")
    assert lm.tokenizer_fingerprint == base.tokenizer_fingerprint
    assert lm.fingerprint != base.fingerprint
    assert (base.model(IDS).logits - logits).abs().max() > 0.01


def test_the_tokenizer_of_an_adapter_is_used_if_it_has_one(adapter):
    path, _ = adapter
    tiny_tokenizer(bos=False).save_pretrained(path)
    assert load(path, device="cpu").encode(["a"]) == [tiny_tokenizer(bos=False)("a")["input_ids"]]


def test_adapters_that_cannot_be_loaded(folder, adapter, tmp_path):
    path, _ = adapter
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(ModelLoadError, match="1 weights are missing, first base_model"):
        load(path, device="cpu")
    weights.write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="the adapter could not be loaded"):
        load(path, device="cpu")
    weights.unlink()  # a pickled one is not read
    torch.save(tensors, path / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"it needs adapter_config.json, adapter_model.safe"):
        load(path, device="cpu")
    save_file(tensors, weights)
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelNotFoundError, match=r"adapter: its base model was not found: .*gone"):
        load(path, device="cpu")
    for wrong in ({**settings, "base_model_name_or_path": None}, {}, []):
        config.write_text(json.dumps(wrong))
        with pytest.raises(ModelLoadError, match="the adapter could not be loaded"):
            load(path, device="cpu")
