"""What the fuzzed formats share: values that make sense, files, a model that no case changes."""

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
from tiny import tiny_model, tiny_tokenizer

import lirefs


def check(holds: object, what: str) -> None:
    """Raise `Insane` unless something holds."""
    if not holds:
        raise Insane(what)


def written(folder: Path, name: str, content: bytes) -> Path:
    """The path of a file with this content."""
    path = folder / name
    path.write_bytes(content)
    return path


def contents(folder: Path, pattern: str = "*") -> list[bytes]:
    """What the files of a folder hold."""
    return [path.read_bytes() for path in sorted(folder.glob(pattern)) if path.is_file()]


def now_and_then(content: bytes) -> bool:
    """Whether a case shall do what takes longest: one in ten does."""
    return zlib.crc32(content) % 10 == 0


def text(value: Any) -> bool:
    """Whether a value is a text that can be written."""
    return isinstance(value, str) and value.encode() is not None


def whole(value: Any, least: int = 0) -> bool:
    """Whether a value is an integer of at least so much."""
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
