"""Fuzzed: model folders and files, trainings, networks and images."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import datasets
import gguf
import numpy as np
import torch
from fuzz_values import check, contents, now_and_then, picture, whole, with_and_without, written
from fuzzing import Format
from PIL import Image
from tiny import fresh_model, tiny_tokenizer

import lirefs
from experiments.vision import training
from experiments.vision.data import Images, _picture, load_images, noisy_split
from lirefs.organism.language import language_seed
from lirefs.organism.training import train as organism_train
from lirefs.organism.training.checkpoint import STATE, load_checkpoint, save_checkpoint
from lirefs.organism.training.optimizers import make_optimizers
from lirefs.organism.vocabulary import build_tokenizer


@functools.cache
def shape() -> organism_train.ModelShape:
    return organism_train.ModelShape(hidden=8, layers=1, mlp=12, heads=2, context=16)


def organism_parts() -> tuple[Any, Any, Any]:
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = organism_train.make_model(shape(), tokenizer, 7)
    return model, tokenizer, make_optimizers(model, organism_train.Recipe())


def organism_step(model: Any, optimizers: Any) -> None:
    ids = torch.arange(12).reshape(2, 6)
    model(ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def make_organism_state(folder: Path) -> list[bytes]:
    model, tokenizer, optimizers = organism_parts()
    organism_step(model, optimizers)
    save_checkpoint(folder, model, tokenizer, optimizers, 1, 7, {})
    return with_and_without(contents(folder, STATE))


def read_organism_state(folder: Path, content: bytes) -> None:
    written(folder, STATE, content)
    model, _, optimizers = organism_parts()
    done = load_checkpoint(folder, model, optimizers, 7, {}, "cpu")
    check(whole(done), f"step {done!r}")
    for one in model.parameters():
        check(one.dtype == torch.float32 and bool(one.isfinite().all()), "weights")
    organism_step(model, optimizers)


@functools.cache
def folder_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
        fresh_model("llama", language_seed=3, **small).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def make_model_file(name: str, folder: Path) -> list[bytes]:
    return [folder_files()[name]]


def read_model_file(name: str, folder: Path, content: bytes) -> None:
    for other, one in folder_files().items():
        written(folder, other, one)
    written(folder, name, content)
    seed = language_seed(str(folder))
    check(seed is None or type(seed) is int, f"seed {seed!r}")
    lm = lirefs.load(folder, device="cpu")
    check(lm.n_layers >= 1 and lm.width >= 1 and len(lm.fingerprint) == 64, "layout")


def make_gguf_model(folder: Path) -> list[bytes]:
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    words = ["<s>", "</s>", *map(chr, range(33, 127)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * 96)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (98, 8), "output_norm": (8,), "output": (98, 8),
        **{f"blk.0.{name}": (8, 8) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    for name, size in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return contents(folder)


def read_gguf_model(folder: Path, content: bytes) -> None:
    lm = lirefs.load(written(folder, "m.gguf", content), device="cpu")
    check(lm.n_layers >= 1 and lm.width >= 1, "layout")


@functools.cache
def vision_split() -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 1, 8, 8, generator=generator)
    return noisy_split(Images(pixels, torch.arange(20) % 2, ["a", "b"]), 0.1, seed=0)


VISION = training.VisionRecipe(blocks=1, width=8, heads=2, mlp=8, patch=4, epochs=2, batch=16)


def make_vision_state(folder: Path) -> list[bytes]:
    model = training.make_model(VISION, vision_split(), 0)
    optimizer = training._optimizer(model, VISION)
    logits = model(pixel_values=vision_split().train.pixels[:2]).logits
    logits.sum().backward()
    optimizer.step()
    record = training.provenance(vision_split(), VISION, 0)
    training._save_state(folder / "n.state", record, model, optimizer, 1)
    return contents(folder)


def make_vision_network(folder: Path) -> list[bytes]:
    training.train(vision_split(), VISION, 0, folder / "n", progress=False)
    return contents(folder)


def read_vision(suffix: str, folder: Path, content: bytes) -> None:
    path = written(folder, f"n{suffix}", content)
    shipped = path if suffix == ".shipped" else None
    model = training.train(vision_split(), VISION, 0, folder / "n", shipped=shipped, progress=False)
    for one in model.parameters():
        check(one.dtype == torch.float32, "type")
        # Huge but finite moments are valid, and a resumed training may overflow with them.
        check(suffix == ".state" or bool(one.isfinite().all()), "weights")


def make_image(folder: Path) -> list[bytes]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "gif", "bmp"):
        Image.fromarray(pixels).save(folder / f"x.{kind}")
    return contents(folder)


def read_image(folder: Path, content: bytes) -> None:
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        written(folder / "images" / name, "a.png", picture())
    path = written(folder / "images" / "cat", "b.png", content)
    found = _picture("images", {"path": str(path), "bytes": None})
    check(np.asarray(found.convert("RGB").resize((4, 4))).shape == (4, 4, 3), "pixels")
    if not now_and_then(content):
        return
    datasets.config.HF_DATASETS_CACHE = folder / "cache"  # only in the process of this case
    found = load_images(str(folder / "images"), side=4)
    check(len(found) == 3, "number")
    check(found.pixels.dtype == torch.float32 and found.pixels.shape[2:] == (4, 4), "pixels")
    check(0 <= float(found.pixels.min()) <= float(found.pixels.max()) <= 1, "values")
    check(bool((found.labels >= 0).all() and (found.labels < len(found.classes)).all()), "labels")
    shutil.rmtree(folder / "cache", ignore_errors=True)


FORMATS: dict[str, Format] = {
    "organism training": Format("safetensors", make_organism_state, read_organism_state),
    **{
        f"model folder, {name}": Format(
            structure,
            functools.partial(make_model_file, name),
            functools.partial(read_model_file, name),
        )
        for name, structure in {
            "config.json": "json",
            "model.safetensors": "safetensors",
            "tokenizer.json": "json",
        }.items()
    },
    "GGUF model": Format("gguf", make_gguf_model, read_gguf_model, slowness=5),
    "vision network": Format(
        "safetensors", make_vision_network, functools.partial(read_vision, "")
    ),
    "vision network, shipped": Format(
        "safetensors", make_vision_network, functools.partial(read_vision, ".shipped")
    ),
    "vision training": Format(
        "safetensors", make_vision_state, functools.partial(read_vision, ".state")
    ),
    "image": Format("bytes", make_image, read_image, resident=256 << 20, slowness=5),
}
