"""A GGUF file is converted once, and what is kept gives the same model."""

import logging
from collections import namedtuple

import pytest
import torch
from fuzz_models import make_gguf_model
from transformers import GgufConfig

import lirefs
from lirefs.errors import ModelLoadError
from lirefs.files import cache_dir
from lirefs.model import builtin, loading

TEXTS = ["abc", "a b ab", "zz~!", "[abc]"]


@pytest.fixture
def gguf(tmp_path):
    make_gguf_model(tmp_path)
    return tmp_path / "m.gguf"


def kept_folders():
    return sorted((cache_dir() / "models").glob("gguf-*"))


def loads(monkeypatch):
    """The arguments of each model that transformers reads from now on."""
    read, original = [], loading.AutoModelForCausalLM.from_pretrained

    def noted(source, **given):
        read.append(given.get("gguf_file"))
        return original(source, **given)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", noted)
    return read


def test_the_second_load_converts_nothing_and_gives_the_same_model(gguf, monkeypatch):
    read = loads(monkeypatch)
    first, second = lirefs.load(gguf, device="cpu"), lirefs.load(gguf, device="cpu")
    assert read == ["m.gguf", None]
    assert first.identity == second.identity
    assert first.tokenizer_fingerprint == second.tokenizer_fingerprint
    assert first.encode(TEXTS) == second.encode(TEXTS)
    assert first.end_tokens == second.end_tokens
    assert (first.name, first.n_layers) == (second.name, second.n_layers)
    ids = torch.tensor([first.encode(TEXTS[:1])[0]])
    assert torch.equal(first.model(ids).logits, second.model(ids).logits)
    config = [one.model.config.to_dict() for one in (first, second)]
    for one in config:
        one.pop("_name_or_path", None)
    assert config[0] == config[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_another_type_is_cast_from_what_is_kept(gguf, monkeypatch, dtype):
    """Numbers that are rounded are not kept, and the kept ones round to the same."""
    direct = lirefs.load(gguf, device="cpu", dtype=dtype)
    assert bool(kept_folders()) == (direct.model.dtype == torch.float32)
    lirefs.load(gguf, device="cpu")
    read = loads(monkeypatch)
    cast = lirefs.load(gguf, device="cpu", dtype=dtype)
    assert read == [None]
    assert cast.identity == direct.identity


def test_a_quantization_of_ones_own_reads_the_file_itself(gguf, monkeypatch):
    lirefs.load(gguf, device="cpu")
    read = loads(monkeypatch)
    own = GgufConfig(dequantize=True)
    lirefs.load(gguf, device="cpu", quantization_config=own)
    assert read == ["m.gguf"]


def test_a_file_of_the_same_name_with_other_content_is_another_model(gguf):
    first = lirefs.load(gguf, device="cpu")
    content = bytearray(gguf.read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"  # the last weight becomes 1.0
    gguf.write_bytes(content)
    second = lirefs.load(gguf, device="cpu")
    assert first.identity != second.identity
    assert len(kept_folders()) == 2


def test_a_damaged_copy_is_refused_with_the_way_out(gguf):
    lirefs.load(gguf, device="cpu")
    (folder,) = kept_folders()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ModelLoadError, match=rf"model.safetensors is damaged.*remove {folder}"):
        lirefs.load(gguf, device="cpu")


@pytest.mark.parametrize("why", ["too large", "disk full", "no folder", "another tokenizer"])
def test_what_cannot_be_kept_is_loaded_all_the_same(gguf, monkeypatch, caplog, why):
    if why == "too large":
        monkeypatch.setattr(builtin, "MOST_KEPT", 10)
    elif why == "disk full":
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(builtin.shutil, "disk_usage", lambda _: usage(10))
    elif why == "no folder":
        cache_dir().mkdir(parents=True, exist_ok=True)
        (cache_dir() / "models").write_text("a file")
    else:
        hashes = iter("abcdefgh")
        monkeypatch.setattr(builtin, "tokenizer_hash", lambda _: next(hashes))
    with caplog.at_level(logging.WARNING, logger="lirefs"):
        first, second = lirefs.load(gguf, device="cpu"), lirefs.load(gguf, device="cpu")
    assert first.identity == second.identity
    assert not kept_folders()
    assert not list(cache_dir().rglob(".tmp*"))
    said = [one for one in caplog.messages if "is converted at each load" in one]
    assert len(said) == (0 if why == "too large" else 2)


def test_a_file_that_lacks_weights_is_never_kept(gguf, monkeypatch):
    original = loading.AutoModelForCausalLM.from_pretrained

    def lacking(source, **given):
        model, info = original(source, **given)
        return model, info | {"missing_keys": {"model.norm.weight"}}

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lacking)
    with pytest.raises(ModelLoadError, match="1 weights are missing"):
        lirefs.load(gguf, device="cpu")
    assert not kept_folders()


def test_an_interrupt_leaves_nothing_half_kept(gguf, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "sha256_of", lambda path, of=builtin.sha256_of: (
            of(path) if path == gguf else interrupted()
        ))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            lirefs.load(gguf, device="cpu")
    assert not list((cache_dir() / "models").iterdir())
    assert lirefs.load(gguf, device="cpu").n_layers == 1
    assert len(kept_folders()) == 1
