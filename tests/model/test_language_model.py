from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCABULARY, fresh_model, tiny_model, tiny_tokenizer

from lirefs import capture
from lirefs.errors import ModelLoadError, ModelNotFoundError, ProvenanceError, SettingError
from lirefs.model import loading
from lirefs.model.language_model import wrap
from lirefs.model.loading import load
from lirefs.organism.language import language_seed
from lirefs.tasks import ShortAnswer, inference


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_importing_models_leaves_the_heavy_packages_alone():
    code = (
        "import sys, lirefs.model.language_model; heavy = {'transformer_lens', 'nnsight', "
        "'datasets', 'matplotlib'} & set(sys.modules); sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


def test_encode_and_pad_on_both_sides(lm):
    ids = lm.encode(["ab", "abcd"])
    assert [len(row) for row in ids] == [3, 5]
    assert lm.encode(["ab"], add_special_tokens=False) == [ids[0][1:]]
    left, right = lm.pad(ids), lm.pad(ids, side="right")
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert left["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert right["position_ids"].tolist() == [[0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert left["input_ids"][0, :2].tolist() == [lm.tokenizer.pad_token_id] * 2
    assert {tensor.dtype for tensor in left.values()} == {torch.int64}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_logits(family, tokenizer):
    lm = wrap(tiny_model(family), tokenizer)
    ids = lm.encode(["hi", "a longer one"])
    batch = lm.pad(ids)
    assert ("position_ids" in batch) == (family not in ("bloom",))
    with torch.no_grad():
        alone = lm.model(**lm.pad(ids[:1])).logits[0, -1]
        together = lm.model(**batch).logits[0, -1]
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


def test_tokenizers_without_a_padding_token():
    lm = wrap(tiny_model("llama"), tiny_tokenizer(pad=False))
    assert lm.tokenizer.pad_token is None
    assert lm.pad([[5], [6, 7]])["input_ids"][0, 0] == lm.tokenizer.eos_token_id
    assert len(lm.generate(["a", "bcd"], max_new_tokens=2)) == 2
    assert lm.tokenizer.pad_token is None


def test_wrong_prompts(lm):
    with pytest.raises(SettingError, match=r"use \['one string'\]"):
        lm.encode("one string")
    with pytest.raises(SettingError, match="prompt 1 is not a string but int"):
        lm.encode(["a", 3])
    with pytest.raises(SettingError, match="sequence 1 has no token"):
        lm.pad([[1], []])
    with pytest.raises(SettingError, match="empty"):
        lm.pad([])
    with pytest.raises(SettingError, match="'left' or 'right'"):
        lm.pad([[1]], side="both")
    assert lm.encode([]) == []
    assert lm.generate([]) == []


def test_batches_keep_the_order_and_the_budget(lm):
    texts = ["abc", "a", "abcde", "x" * 30, "ab", "b"]  # and one token each at the beginning
    batches = lm.batches(texts, batch_tokens=12)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [
        (2, 4),
        (1, 6),
        (1, 31),
        (2, 3),
    ]
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == lm.encode(texts)
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert len(lm.batches(texts)) == 1


def test_batches_of_token_ids_are_those_of_the_texts(lm):
    texts = ["abc", "a", "abcde"]
    for one, other in zip(lm.batches(texts, 8), lm.batches(lm.encode(texts), 8), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_encode_all_texts_at_once(lm, monkeypatch):
    calls = []
    monkeypatch.setattr(lm, "encode", lambda texts: calls.append(list(texts)) or [[5], [6, 7]])
    assert len(lm.batches(["a", "b"], 2)) == 2
    assert calls == [["a", "b"]]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ("one string", r"one string: use \['one string'\]"),
        ([], "no texts"),
        (["a", [5, 6]], "strings and lists of token ids are mixed"),
        ([[5], [6], []], "text 2 has no token"),
    ],
)
def test_texts_that_make_no_batch(lm, texts, says):
    with pytest.raises(SettingError, match=says):
        lm.batches(texts, batch_tokens=2)


def test_an_empty_text_and_an_empty_budget_are_refused(lm):
    bare = wrap(tiny_model("llama"), tiny_tokenizer(bos=False))
    with pytest.raises(SettingError, match="text 1 has no token"):
        bare.batches(["a", ""])
    with pytest.raises(SettingError, match="batch_tokens must be at least 1, got 0"):
        lm.batches(["a"], batch_tokens=0)


def greedy(lm, prompt, steps):
    """Continue a prompt one argmax at a time, without cache or padding."""
    ids = lm.encode([prompt])[0]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "falcon", "bloom"])
def test_generation_in_a_batch_is_greedy_and_new_text_only(family, tokenizer):
    lm = wrap(tiny_model(family), tokenizer)
    prompts = ["a", "a longer prompt", "mid one"]
    expected = [greedy(lm, prompt, 6) for prompt in prompts]
    assert lm.generate(prompts, max_new_tokens=6) == expected
    assert lm.generate(prompts[0], max_new_tokens=6) == expected[0]


def test_generation_leaves_mode_and_random_state_alone(tokenizer):
    model = fresh_model("llama", attention_dropout=0.5)
    lm = wrap(model, tokenizer)
    expected = lm.generate("abc", max_new_tokens=5)
    model.train()
    state = torch.get_rng_state()
    assert lm.generate("abc", max_new_tokens=5) == expected
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_follows_the_weights(tokenizer):
    lm = wrap(fresh_model("llama"), tokenizer)
    twin = wrap(fresh_model("llama"), tokenizer)
    first = lm.fingerprint
    assert len(first) == 64
    assert first == twin.fingerprint
    weight = lm.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] += 1
        assert lm.fingerprint != first
        weight[0, 0] = kept
    assert lm.fingerprint == first


def test_fingerprint_follows_type_and_configuration(tokenizer):
    first = wrap(fresh_model("llama"), tokenizer).fingerprint
    assert wrap(fresh_model("llama").bfloat16(), tokenizer).fingerprint != first
    assert wrap(fresh_model("llama", rms_norm_eps=1e-3), tokenizer).fingerprint != first
    assert wrap(fresh_model("llama", use_cache=False), tokenizer).fingerprint == first


def test_fingerprint_of_offloaded_weights_is_refused(tokenizer):
    lm = wrap(fresh_model("llama"), tokenizer)
    lm.model.lm_head.to("meta")
    with pytest.raises(ProvenanceError, match="offloaded"):
        _ = lm.fingerprint


def test_tokenizer_fingerprint_ignores_what_a_call_leaves_behind():
    tokenizer = tiny_tokenizer()
    first = wrap(tiny_model("llama"), tokenizer).tokenizer_fingerprint
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    assert wrap(tiny_model("llama"), tokenizer).tokenizer_fingerprint == first
    other = wrap(tiny_model("llama"), tiny_tokenizer(bos=False))
    assert other.tokenizer_fingerprint != first


def test_wrap_names_and_describes(tokenizer):
    lm = wrap(tiny_model("llama"), tokenizer)
    assert lm.name == "LlamaForCausalLM"
    assert repr(lm) == "LanguageModel('LlamaForCausalLM', layers=4, width=32)"
    assert lm.device == torch.device("cpu")
    assert wrap(tiny_model("llama"), tokenizer, name="mine").name == "mine"


def test_load_a_folder(folder, lm):
    loaded = load(folder, device="cpu")
    assert loaded.fingerprint == lm.fingerprint
    assert loaded.tokenizer_fingerprint == lm.tokenizer_fingerprint
    assert not loaded.model.training
    assert loaded.generate("abc", 4) == lm.generate("abc", 4)
    assert load(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(SettingError, match="not both"):
        load(folder, device="cpu", device_map="auto")


def test_load_a_folder_that_is_damaged(folder):
    (folder / "model.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(ModelLoadError, match="could not be loaded"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"without config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "not a name!", "./nowhere"])
def test_unknown_names_list_what_is_possible(name):
    with pytest.raises(ModelNotFoundError, match=r"smollm2-135m.*\.gguf.*hub id") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_unknown_hub_id_without_a_hub_fails_soon(monkeypatch):
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="could not be reached") as caught:
        load("nobody-at-all/no-such-model")
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


def test_a_model_without_some_weights_is_refused(folder, tmp_path):
    """transformers would make them up and only warn."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 weights are missing, first model.layers.1.mlp"):
        load(copy)


@pytest.mark.parametrize(
    "text", ["[", "[]", "[" * 100_000, "\xff", '{"num_hidden_layers": 1e9}',
             '{"text_config": {"num_hidden_layers": 2000000000}}']
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(ModelLoadError, match="damaged"):
        load(tmp_path)
    assert language_seed(str(tmp_path)) is None


def test_broken_gguf_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such GGUF"):
        load(tmp_path / "absent.gguf")
    for content, says in [(b"", "not a GGUF"), (b"pickle", "not a GGUF"), (b"GGUF", "damaged")]:
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(ModelLoadError, match=says) as caught:
            load(tmp_path / "broken.gguf")
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_on_a_gpu(folder):
    lm = load(folder)
    assert lm.device.type == "cuda"
    assert lm.pad([[1, 2]])["input_ids"].device.type == "cuda"
    assert isinstance(lm.generate("abc", 3), str)


def test_vocabulary_fits(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.decode(tokenizer("To be: 1+1?")["input_ids"][1:]) == "To be: 1+1?"


@pytest.fixture
def own_settings():
    """A model whose generation_config.json asks for more than special tokens."""
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    lm.model.generation_config.update(
        repetition_penalty=1.8, no_repeat_ngram_size=1, min_new_tokens=3, suppress_tokens=[7, 8]
    )
    return lm


def test_generate_is_plain_greedy_whatever_the_model_ships(own_settings):
    lm, before = own_settings, own_settings.model.generation_config
    prompts = ["some text", "another text that is longer"]
    expected = [lm.tokenizer.decode(row) for row in inference.greedy(lm, lm.encode(prompts), 6)]
    assert lm.generate(prompts, max_new_tokens=6) == expected
    assert lm.generate(prompts[0], max_new_tokens=6) == expected[0]
    assert lm.model.generation_config is before
    with pytest.raises(ValueError, match="temperature"):
        lm.generate(prompts[0], do_sample=True, temperature=-1.0)
    assert lm.model.generation_config is before


def test_generate_asked_otherwise_takes_the_settings_that_are_asked_for(own_settings):
    lm = own_settings
    ids = lm.pad(lm.encode(["some text"]))
    penalized = lm.model.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=6,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    own = lm.generate("some text", max_new_tokens=6, generation_config=lm.model.generation_config)
    assert own == lm.tokenizer.decode(penalized[0, ids["input_ids"].shape[1] :])
    assert own != lm.generate("some text", max_new_tokens=6)
    assert own == lm.generate(
        "some text", max_new_tokens=6, repetition_penalty=1.8, no_repeat_ngram_size=1,
        min_new_tokens=3, suppress_tokens=[7, 8],
    )  # fmt: skip


def test_generate_returns_what_was_asked(lm):
    three = lm.generate("some text", max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert isinstance(three, list)
    assert len(three) == 3
    pairs = lm.generate(["some text", "b"], 4, num_beams=2, num_return_sequences=2)
    assert [len(one) for one in pairs] == [2, 2]
    assert pairs[1] == lm.generate("b", 4, num_beams=2, num_return_sequences=2)
    found = lm.generate("some text", 4, return_dict_in_generate=True, output_scores=True)
    assert len(found.scores) == 4
    assert found.sequences.shape[0] == 1


@pytest.mark.parametrize("as_list", [True, False])
def test_answers_end_at_every_end_token_of_the_model(as_list):
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    prompt = "some text"
    tokens = inference.greedy(lm, lm.encode([prompt]), 6)[0]
    end = next(token for token in tokens if token != tokens[0])
    kept = tokens[: tokens.index(end)]
    of_model = [lm.tokenizer.eos_token_id, end] if as_list else end
    lm.model.generation_config.eos_token_id = of_model
    assert lm.end_tokens == {lm.tokenizer.eos_token_id, end}
    (result,) = ShortAnswer("s", [("1", prompt, ["x"])]).run(lm, lambda n: None)
    generated = lm.generate(prompt, max_new_tokens=6)
    assert result.output == lm.tokenizer.decode(kept).strip().split("\n")[0]
    assert generated == lm.tokenizer.decode(kept)
    past = lm.generate(prompt, max_new_tokens=6, eos_token_id=lm.tokenizer.eos_token_id)
    assert past == lm.tokenizer.decode(tokens)


@pytest.mark.parametrize("pad", ["beyond", "none", "inside"])
def test_padding_uses_an_id_that_the_embedding_has(pad):
    tokenizer = tiny_tokenizer()
    lm = wrap(fresh_model("llama"), tokenizer, name="tiny")
    expected = lm.generate(["some text", "b"], max_new_tokens=3)
    if pad == "beyond":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        assert tokenizer.pad_token_id >= lm.model.get_input_embeddings().num_embeddings
    elif pad == "none":
        tokenizer.pad_token = tokenizer.eos_token = None
    else:
        tokenizer.pad_token = tokenizer.eos_token
    assert lm.generate(["some text", "b"], max_new_tokens=3) == expected
    assert int(lm.pad([[5], [6, 7]])["input_ids"].max()) < 200


@pytest.mark.parametrize("ids", [[[0, 500]], [[3, -1]], [[5], [128]]])
def test_ids_outside_the_embedding_are_named(lm, ids):
    with pytest.raises(SettingError, match="the model knows 0 to 127"):
        lm.pad(ids)
    with pytest.raises(SettingError, match="the model knows 0 to 127"):
        capture(lm, ids, progress=False)
