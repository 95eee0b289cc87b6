"""Shared by the fuzzed formats: checks of values, files, and a model that no case changes."""

from __future__ import annotations

import functools
import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

from fuzzing import Insane
from PIL import Image
from safetensors.torch import load, save
from tiny import tiny_model, tiny_tokenizer

import lirefs


def check(holds: object, what: str) -> None:
    """Raise `Insane` unless a condition holds."""
    if not holds:
        raise Insane(what)


def written(folder: Path, name: str, content: bytes) -> Path:
    """Write a file with this content and return its path."""
    path = folder / name
    path.write_bytes(content)
    return path


def contents(folder: Path, pattern: str = "*") -> list[bytes]:
    """The contents of the files in a folder."""
    return [path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()]


def without_digest(content: bytes) -> bytes:
    """A safetensors file as earlier versions wrote it, without the SHA-256 of its bytes."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = {key: one for key, one in header["__metadata__"].items() if key != "sha256"}
    for key, one in metadata.items():
        if '"sha256"' in one:  # inside the only entry
            values = json.loads(one)
            del values["sha256"]
            metadata[key] = json.dumps(values)
    return save(load(content), metadata)


def with_and_without(made: list[bytes]) -> list[bytes]:
    """Files and what earlier versions wrote: where no digest refuses a change, the reader must."""
    return [*made, *map(without_digest, made)]


def now_and_then(content: bytes) -> bool:
    """Whether a case does the slowest checks: one in ten does."""
    return zlib.crc32(content) % 10 == 0


def text(value: Any) -> bool:
    """Whether a value is a string that can be encoded."""
    return isinstance(value, str) and value.encode() is not None


def whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer of at least `least`."""
    return type(value) is int and value >= least


def finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


@functools.cache
def tiny_lm() -> lirefs.LanguageModel:
    """A model that no case changes."""
    return lirefs.wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@functools.cache
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "png")
    return buffer.getvalue()
