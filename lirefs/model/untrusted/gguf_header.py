"""Check the header of a GGUF file before another program trusts its counts and lengths."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES

from lirefs.model.untrusted.folder import Weights

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each scalar type."""
_STRING, _ARRAY = 8, 9
_LONGEST_KEY = 65_535  # set by the format
_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
"""Weights and bytes of a block of each type of tensor."""
_MOST_DIMENSIONS = 8
_MOST_ENTRIES = 8_000_000
"""Entries of all lists together: readers hold each as an object. Tokenizers have a million."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file holds: its weights, and the number of blocks if it says so."""

    weights: Weights
    blocks: int | None


def check_header(path: str | os.PathLike[str]) -> Header:
    """Verify a GGUF header and return what it says, else a ValueError.

    Readers of the format loop as often as a file says: a damaged count of 2^60 keeps them busy
    until the memory is full.
    """
    with Path(path).open("rb") as file:
        walk = _Walk(file)
        if walk.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        if walk.number(4) not in (2, 3):
            raise ValueError("it is not a little-endian GGUF file of version 2 or 3")
        architecture, numbers = b"", {}
        tensors, entries = walk.number(8), walk.number(8)
        for _ in range(entries):
            key = walk.take(min(walk.number(8), _LONGEST_KEY))
            kind = walk.number(4)
            if key == b"general.architecture" and kind == _STRING:
                architecture = walk.take(min(walk.number(8), _LONGEST_KEY))
            else:
                numbers[key] = walk.value(kind)
        elements, size = 0, 0
        for _ in range(tensors):
            walk.skip(walk.number(8))
            shape = [walk.number(8) for _ in range(walk.dimensions())]
            type_of_numbers = walk.number(4)
            if type_of_numbers not in _SIZES:
                raise ValueError(f"a tensor of unknown type {type_of_numbers}")
            block, width = _SIZES[type_of_numbers]
            walk.skip(8)  # where it begins
            elements += math.prod(shape)
            size += math.prod(shape) // block * width
        walk.skip(size)
        blocks = numbers.get(architecture + b".block_count")
        if blocks is not None and blocks > tensors:
            raise ValueError(f"it has {tensors} tensors, but says {blocks} blocks")
        return Header(Weights(tensors, elements), blocks)


class _Walk:
    """Reads a file from its beginning; every step must stay within the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size
        self._entries = 0

    def take(self, size: int) -> bytes:
        return self._file.read(self._within(size))

    def skip(self, size: int) -> None:
        self._file.seek(self._within(size), os.SEEK_CUR)

    def _within(self, size: int) -> int:
        if size > self._left:
            raise ValueError("it ends within its header, or a length in the header is wrong")
        self._left -= size
        return size

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def dimensions(self) -> int:
        count = self.number(4)
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor with {count} dimensions")
        return count

    def value(self, kind: int) -> int | None:
        """Pass over a value; return it if it is a whole number of 4 or 8 bytes."""
        if kind in (4, 5, 10, 11):
            return self.number(_WIDTHS[kind])
        length = 1
        if kind == _ARRAY:
            kind, length = self.number(4), self.number(8)
            self._entries += length
            if kind == _ARRAY or self._entries > _MOST_ENTRIES:
                raise ValueError("a list of lists, or lists that are too long")
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.number(8))
        elif kind in _WIDTHS:
            self.skip(length * _WIDTHS[kind])
        else:
            raise ValueError(f"a value of unknown type {kind}")
        return None
