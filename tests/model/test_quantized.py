"""Quantized models, against a plain hook of torch, also on a dense model of their own weights."""

import importlib
import logging
import re

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import kfac
import lirefs
from lirefs.errors import BakeError, TargetError, TaskError
from lirefs.model.identity import identity

KINDS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "quanto": "optimum.quanto", "ao": "torchao"}
DENSE = ["lm_head", "model.layers.1.mlp"]
IDS = torch.tensor([[5, 60, 70, 80, 9], [11, 12, 13, 14, 15]])


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    package = KINDS[request.param]
    pytest.importorskip(package, reason=f"{package} is not installed")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a warning at each product
    return request.param


def config(kind, threshold=0.0):
    if kind == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=DENSE, llm_int8_threshold=threshold
        )
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=DENSE
        )
    if kind == "quanto":
        return QuantoConfig(weights="int8", modules_to_not_convert=DENSE)
    quantization = importlib.import_module("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=DENSE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    fresh_model("llama", max_position_embeddings=512, **sizes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(kind, folder):
    """The quantized model; no test leaves a change on it."""
    return lirefs.load(folder, device="cpu", quantization_config=config(kind))


@pytest.fixture
def direction(loaded):
    vector = torch.randn(loaded.width, generator=torch.Generator().manual_seed(0))
    return lirefs.Direction(vector, 2, model=loaded.fingerprint)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def by_hand(model, operator, vector, strength):
    """Logits under an operator at the input of layer 2, by a hook of torch alone."""
    unit = vector / vector.norm()

    def change(module, args):
        h = args[0]
        along = (h @ unit)[..., None] * unit
        return {
            "add": h + strength * vector,
            "amplify": h + strength * along,
            "ablate": h - along,
            "clamp": h - along + strength * unit,
        }[operator], *args[1:]

    hook = model.model.layers[2].register_forward_pre_hook(change)
    try:
        return logits(model)
    finally:
        hook.remove()


def dequantized(loaded, kind, folder):
    """A dense model whose weights are what the quantized ones stand for."""
    dense = lirefs.load(folder, device="cpu").model
    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            weight = dense.get_submodule(name).weight
            if kind == "nf4":  # the model's own may be packed
                of_bnb = importlib.import_module("bitsandbytes.functional")
                weight.data = of_bnb.dequantize_4bit(
                    *of_bnb.quantize_4bit(weight.data, quant_type=kind)
                )
            else:
                weight.data = module.weight.dequantize().detach().float()
    return dense


@pytest.mark.parametrize("operator", ["add", "amplify", "ablate", "clamp"])
def test_steering_is_a_hook_by_hand(loaded, kind, folder, direction, operator):
    plain, strength = logits(loaded.model), 1.0 if operator == "ablate" else 1.5
    with lirefs.Steer(direction, operator, strength).apply(loaded.model):
        found = logits(loaded.model)
    assert (found - plain).abs().max() > 0.1
    assert torch.equal(logits(loaded.model), plain)
    expected = by_hand(loaded.model, operator, direction.vector, strength)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if kind == "int8":  # whose products quantize the inputs too
        return
    dense = dequantized(loaded, kind, folder)
    expected = by_hand(dense, operator, direction.vector, strength)
    # Packed 4-bit weights are multiplied in bfloat16.
    close = 0.25 if kind == "nf4" else 1e-3
    assert (found - expected).norm() < close * (expected - logits(dense)).norm()


def test_states_are_read_and_texts_made(loaded, direction):
    seen = []
    hook = loaded.model.model.layers[2].register_forward_pre_hook(
        lambda module, args: seen.append(args[0][:, -1])
    )
    logits(loaded.model, torch.tensor(loaded.encode(["abc"])))
    hook.remove()
    found = lirefs.capture(loaded, ["abc", "de"], layers=[2])
    torch.testing.assert_close(found.values[0, 0, 0], seen[0][0], rtol=1e-4, atol=1e-4)
    ids = loaded.encode(["abc"])[0]
    for _ in range(4):
        ids = [*ids, int(logits(loaded.model, torch.tensor([ids]))[0, -1].argmax())]
    expected = loaded.tokenizer.decode(ids[-4:], skip_special_tokens=True)
    assert loaded.generate(["abc", "defgh"], 4)[0] == expected
    assert loaded.traits.causal


def test_it_can_be_told_from_others(loaded, kind, folder):
    again = lirefs.load(folder, device="cpu", quantization_config=config(kind))
    assert again.fingerprint == loaded.fingerprint
    assert identity(again.model) == identity(loaded.model)
    assert lirefs.load(folder, device="cpu").fingerprint != loaded.fingerprint
    with torch.no_grad():
        again.model.model.norm.weight[0] += 1
    assert again.fingerprint != loaded.fingerprint


def test_looking_at_it_changes_nothing(loaded):
    """On some CPUs bitsandbytes packs weights as they run, and unpacks them to save them."""
    first, weight = logits(loaded.model), loaded.model.model.layers[2].mlp.up_proj.weight
    place = weight.data_ptr()
    found = loaded.fingerprint
    assert weight.data_ptr() == place
    assert torch.equal(logits(loaded.model), first)
    assert loaded.fingerprint == found


def test_fit_and_compare_with_a_journal(loaded, questions, tmp_path):
    probe = lirefs.fit(
        loaded, lirefs.load_questions(questions), layers=[2], shuffles=1, progress=False
    )
    probe.directions.save(tmp_path / "d.safetensors")
    lirefs.Directions.load(tmp_path / "d.safetensors", loaded)
    variants = {"LiReF": lirefs.Steer(probe.best, "add", 2.0)}
    tasks = [
        lirefs.ShortAnswer("answers", [("1", "Q: a", ["b"]), ("2", "Q: cd", ["e"])]),
        lirefs.Perplexity("texts", [("1", "some text"), ("2", "another one, longer")]),
    ]
    settings = {"journal": tmp_path / "journal", "progress": False}
    first = lirefs.compare(loaded, variants, tasks, **settings)
    assert any((tmp_path / "journal").iterdir())
    again = lirefs.compare(loaded, variants, tasks, **settings)
    for variant in first.variants:
        for task in first.tasks:
            assert again.score(variant, task) == first.score(variant, task)


def test_edits_where_weights_are_dense_and_a_reason_elsewhere(loaded, kind, folder):
    gate = loaded.model.model.layers[2].mlp.gate_proj
    texts, weight = ["abcdefg", "hijkl"], type(gate.weight).__name__
    with pytest.raises(TargetError, match=rf"layers.2.mlp.gate_proj.*{weight}.*dequantized"):
        kfac.collect(loaded, texts, layers=[2], progress=False)
    if kind == "nf4" and gate.support_avx512bf16_for_cpu:
        with pytest.raises(TargetError, match=f"{weight}, through which no gradient passes"):
            kfac.collect(loaded, texts, layers=[1], progress=False)
        return
    factors = kfac.collect(loaded, texts, layers=[1], progress=False)
    if kind != "int8":
        dense = lirefs.wrap(dequantized(loaded, kind, folder), loaded.tokenizer)
        expected = kfac.collect(dense, texts, layers=[1], progress=False)
        for name in factors.names:
            for own, other in ((factors.A, expected.A), (factors.G, expected.G)):
                torch.testing.assert_close(own(name), other(name), rtol=1e-3, atol=1e-5)
    up = loaded.model.model.layers[1].mlp.up_proj
    before, plain = up.weight.clone(), logits(loaded.model)
    with kfac.CurvatureEdit(factors, keep=0.5).apply(loaded.model):
        assert (logits(loaded.model) - plain).abs().max() > 1e-3
    assert torch.equal(up.weight, before)
    assert torch.equal(logits(loaded.model), plain)


@pytest.mark.parametrize("kind", ["int8"], indirect=True)
def test_tokens_that_are_quantized_together_are_named(kind, folder):
    """LLM.int8() keeps a column in floats if any token of the batch is large there."""
    lm = lirefs.load(folder, device="cpu", quantization_config=config(kind, threshold=0.5))
    row = torch.tensor([[5, 60, 70, 80, 9]])
    assert (logits(lm.model, row)[:, :2] - logits(lm.model, row[:, :2])).abs().max() > 1e-3
    with pytest.raises(TaskError, match=r"llm_int8_threshold=0\.0"):
        lirefs.Perplexity("texts", [("1", "some text")]).run(lm, lambda items: None)


def test_baking_names_the_quantized_weight_before_anything_is_copied(
    loaded, direction, monkeypatch
):
    monkeypatch.setattr(type(loaded.model), "__deepcopy__", None, raising=False)
    steer = lirefs.Steer(direction, "add")
    weight = loaded.model.model.layers[0].self_attn.q_proj.weight
    reason = rf"^\S+self_attn.q_proj.weight is quantized or sharded \({type(weight).__name__}, "
    found = {one.runtime: one for one in lirefs.export.ways(loaded, steer)}
    assert found["transformers hooks"].possible
    assert re.search(reason, found["baked weights"].reason)
    with pytest.raises(BakeError, match=reason + r".*these can do it: transformers hooks"):
        lirefs.bake(steer, loaded.model)
