"""Folders and files that a stranger made: nothing of theirs runs or costs what it should not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from huggingface_hub import constants
from peaks import peak_of
from safetensors.torch import load_file, save_file
from tiny import build, fresh_model, tiny_tokenizer
from transformers import GPTJConfig, OlmoeConfig

import lirefs
from lirefs.errors import ModelLoadError
from lirefs.model import loading
from lirefs.model.untrusted import configuration
from lirefs.model.untrusted.folder import Weights
from lirefs.model.untrusted.gguf_header import check_header
from lirefs.model.untrusted.size import no_larger_than

ROOT = Path(__file__).parents[2]
OTHERS = {
    "gptj": GPTJConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64
    ),
    "olmoe": OlmoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip
ALLOWED = 600 << 20
"""Bytes that a hostile folder may take beyond the shipped model."""


def test_python_m_lirefs_imports_nothing_from_the_working_folder(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, code in ((ours, 3), (theirs, 77)):
        folder.mkdir()
        for name in ("numpy", "torch"):
            (folder / f"{name}.py").write_text(f"raise SystemExit({code})")
    for name in ("pathlib", "json"):
        (theirs / f"{name}.py").write_text("raise SystemExit(78)")
    places = os.pathsep.join(map(str, (ours, ROOT)))
    for words, code in ((["--version"], 0), (["organism", "scores"], 3)):  # only scores need torch
        done = subprocess.run(
            [sys.executable, "-m", "lirefs", *words],
            cwd=theirs,
            env={**os.environ, "PYTHONPATH": places},
            check=False,
        )
        assert done.returncode == code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of valid models by family."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("valid") / family
            model = build(OTHERS[family]) if family in OTHERS else fresh_model(family)
            model.save_pretrained(made[family])
            tiny_tokenizer().save_pretrained(made[family])
        return made[family]

    return of


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def most():
    peak, said = peak_of(lambda: lirefs.load("organism", device="cpu"))
    assert not said
    return peak + ALLOWED


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(path, most):
    """The error that ends the loading of a model, which takes little memory."""
    peak, said = peak_of(lambda: lirefs.load(path, device="cpu"))
    assert peak < most
    assert said.startswith("ModelLoadError: ")
    return said


@pytest.mark.parametrize(
    ("family", "key", "value", "says"),
    [
        ("llama", "vocab_size", 10**9, "more than .* weights"),
        ("llama", "vocab_size", 2 * 10**6, "more than .* weights"),
        ("llama", "hidden_size", 10**6, "more than .* weights"),
        ("llama", "intermediate_size", 10**8, "more than .* weights"),
        ("llama", "head_dim", 10**6, "more than .* weights"),
        ("llama", "num_hidden_layers", 10**9, "num_hidden_layers is"),
        ("llama", "num_hidden_layers", 39, "weights are missing"),
        ("llama", "num_labels", 10**9, "num_labels is"),
        ("gpt2", "n_positions", 10**9, "more than .* weights"),
        ("gptj", "n_positions", 10**8, "more than .* bytes of buffers"),
        ("olmoe", "num_experts", 10**8, "more than"),
    ],
)
def test_a_configuration_of_a_larger_model(family, key, value, says, saved, tmp_path, most):
    folder = Path(shutil.copytree(saved(family), tmp_path / "model"))
    change(folder, **{key: value})
    said = refused(folder, most)
    assert re.search(says, said), said


def test_a_model_of_too_many_parts():
    few = no_larger_than(lambda: Weights(1, 10))
    with pytest.raises(ValueError, match="more than 1,004 modules"), few:
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(2000))
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(2000))


def test_a_configuration_that_lost_its_sizes(folder, most):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "its configuration is of a larger model than its files hold" in refused(folder, most)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_of_holes(name, folder, most):
    if name == "model.safetensors":
        header = {"lm_head.weight": {"dtype": "F32", "shape": [2 << 20, 1 << 10],
                                     "data_offsets": [0, 8 << 30]}}  # fmt: skip
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + (8 << 30))
    else:
        os.truncate(folder / name, 8 << 30)
    assert f"{name} is mostly holes" in refused(folder, most)


def test_files_that_are_not_regular(folder):
    (folder / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(ModelLoadError, match=r"merges.txt is not a regular file"):
        lirefs.load(folder)
    (folder / "merges.txt").unlink()
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")  # to read it would wait forever
    with pytest.raises(ModelLoadError, match=r"tokenizer.json is not a regular file"):
        lirefs.load(folder)


def test_a_compressed_checkpoint(folder, most):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data/0", bytes(1 << 26))
    assert "pytorch_model.bin is compressed" in refused(folder, most)


def test_an_old_checkpoint_is_read(folder):
    model = fresh_model("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert lirefs.load(folder, device="cpu").n_layers == 4


def test_a_gguf_file_of_a_larger_model(tmp_path, most):
    def write(path, width, shape):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(width)
        writer.add_block_count(1)
        writer.add_feed_forward_length(12)
        writer.add_head_count(2)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", *map(chr, range(33, 126)), "ab"])
        writer.add_token_merges(["a b"])
        writer.add_tensor("token_embd.weight", np.zeros(shape, np.float32))
        writer.add_tensor("output.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    assert "larger model" in refused(write(tmp_path / "a.gguf", 1 << 20, (96, 8)), most)
    whole = write(tmp_path / "b.gguf", 8, (96, 8))
    assert check_header(whole).weights.elements == 2 * 96 * 8
    data = whole.read_bytes()
    where = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    whole.write_bytes(data[:where] + (1 << 30).to_bytes(8, "little") + data[where + 8 :])
    assert "a length in the header is wrong" in refused(whole, most)


def test_an_adapter_that_is_larger_than_its_file(folder, tmp_path, most):
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", base_model_name_or_path=str(folder))
    peft.get_peft_model(fresh_model("llama"), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    valid = json.loads(file.read_text()) | {"base_model_name_or_path": str(folder)}
    for wrong in ({"r": 10**6}, {"rank_pattern": {"q_proj": 10**6}}):
        file.write_text(json.dumps(valid | wrong))
        assert "is 1000000, more than any size in its file" in refused(file.parent, most)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"attn_implementation": "org/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "org/kernel:name"}, "_attn_implementation"),
        ({"_attn_implementation_internal": "org/kernel@v1"}, "_attn_implementation_internal"),
        ({"attn_implementation": {"": "sdpa", "text_config": "org/kernel"}}, "attn_implementation"),
        ({"attn_implementation": "paged|org/kernel"}, "attn_implementation"),
        ({"experts_implementation": "org/kernel"}, "experts_implementation"),
        ({"text_config": {"attn_implementation": "org/kernel"}}, "attn_implementation"),
        ({"a": [{"b": {"_experts_implementation": "org/kernel"}}]}, "_experts_implementation"),
        ({"attn_implementation": ["org/kernel"]}, "attn_implementation"),
    ],
)
def test_no_configuration_fetches_a_kernel(wrong, key, folder, monkeypatch):
    change(folder, **wrong)
    monkeypatch.setattr(
        loading.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("it was made")
    )
    with pytest.raises(ModelLoadError, match=rf"\({key} is .* code that would be fetched"):
        lirefs.load(folder, device="cpu")


def test_names_that_are_fetched_where_kernels_are_installed(folder, monkeypatch):
    change(folder, attn_implementation="sdpa", experts_implementation="eager")
    monkeypatch.setattr(configuration, "is_kernels_available", lambda: True)
    assert lirefs.load(folder, device="cpu").n_layers == 4
    change(folder, attn_implementation="flash_attention_2")
    with pytest.raises(ModelLoadError, match="'flash_attention_2', code that would be fetched"):
        lirefs.load(folder, device="cpu")


def in_the_hubs_cache(model, cache):
    """A repository of the hub as its client keeps it: a snapshot of links to blobs."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_repositories_of_the_hub_are_judged_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub"
    in_the_hubs_cache(folder, cache)
    settings = {"device": "cpu", "cache_dir": str(cache)}
    assert lirefs.load("owner/name", **settings).n_layers == 4
    blob = cache / "models--owner--name" / "blobs" / "config.json"
    valid = json.loads(blob.read_text())
    blob.write_text(json.dumps(valid | {"intermediate_size": 10**8}))
    with pytest.raises(ModelLoadError, match="a larger model than its files hold"):
        lirefs.load("owner/name", **settings)
    blob.write_text(json.dumps(valid | {"attn_implementation": "org/kernel"}))
    with pytest.raises(ModelLoadError, match="code that would be fetched"):
        lirefs.load("owner/name", **settings)


def test_names_of_tensors_reach_no_terminal(folder, capfd):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"\x1b[2J": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"has a tensor called '\\x1b"):
        lirefs.load(folder, device="cpu")
    assert "\x1b[2J" not in "".join(capfd.readouterr())


def sharded(folder):
    """The same model in two files and an index."""
    model = fresh_model("llama")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder / "model.safetensors.index.json"


def test_an_index_names_files_of_its_folder(folder, tmp_path):
    index = sharded(folder)
    assert lirefs.load(folder, device="cpu").n_layers == 4
    valid = json.loads(index.read_text())
    first = next(iter(valid["weight_map"].values()))
    shutil.copy(folder / first, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    for name in (str(tmp_path / "secret.safetensors"), "../secret.safetensors", "link.safetensors"):
        places = {k: name if v == first else v for k, v in valid["weight_map"].items()}
        index.write_text(json.dumps(valid | {"weight_map": places}))
        with pytest.raises(ModelLoadError, match="which is outside the folder"):
            lirefs.load(folder, device="cpu")
    for damaged in ("{}", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "{"):
        index.write_text(damaged)
        with pytest.raises(ModelLoadError, match="damaged"):
            lirefs.load(folder, device="cpu")


def test_a_snapshot_in_the_hubs_cache_is_a_folder_of_links(folder, tmp_path):
    sharded(folder)
    snapshot = in_the_hubs_cache(folder, tmp_path / "hub")
    assert lirefs.load(snapshot, device="cpu").n_layers == 4
