"""The header of a GGUF file, walked before any other program trusts its counts and lengths."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
LONGEST_KEY = 65_535  # of the format
MOST_ENTRIES = 8_000_000
"""Entries of all lists together: readers hold each as an object. Tokenizers have a million."""


def check_header(path: str | os.PathLike[str]) -> int | None:
    """Verify that a GGUF file holds the entries and lists that its header counts.

    Readers of the format loop as often as a file says, so that a damaged count of 2^60 keeps
    them busy for ever, or until the memory is full.

    Args:
        path: The file.

    Returns:
        The number of blocks that the header says the model has; None where it does not.

    Raises:
        ValueError: It is no GGUF file of version 2 or 3, ends within its header, counts more
            blocks than tensors, or has lists of lists, which no program writes.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        walk = _Walk(file)
        if walk.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        if walk.number(4) not in (2, 3):
            raise ValueError("no little-endian GGUF of version 2 or 3")
        made_for, counts = b"", {}
        tensors, entries = walk.number(8), walk.number(8)
        for _ in range(entries):
            key = walk.take(min(walk.number(8), LONGEST_KEY))
            kind = walk.number(4)
            if key == b"general.architecture" and kind == _STRING:
                made_for = walk.take(min(walk.number(8), LONGEST_KEY))
            else:
                counts[key] = walk.value(kind)
        for _ in range(tensors):
            walk.skip(walk.number(8))
            walk.skip(8 * walk.number(4) + 12)
        blocks = counts.get(made_for + b".block_count")
        if blocks is not None and blocks > tensors:
            raise ValueError(f"it has {tensors} tensors, but says {blocks} blocks")
        return blocks


class _Walk:
    """Goes through a file from its beginning; every step must lie within it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = os.fstat(file.fileno()).st_size
        self._entries = 0

    def skip(self, size: int) -> None:
        self._file.seek(self._within(size), os.SEEK_CUR)

    def take(self, size: int) -> bytes:
        return self._file.read(self._within(size))

    def _within(self, size: int) -> int:
        if size > self._left:
            raise ValueError("it ends within its header, or a length in the header is wrong")
        self._left -= size
        return size

    def number(self, width: int) -> int:
        return int(struct.unpack("<I" if width == 4 else "<Q", self.take(width))[0])

    def value(self, kind: int) -> int | None:
        """Go over a value; return it if it is a whole number of 4 or 8 bytes."""
        if kind in (4, 5, 10, 11):
            return self.number(_WIDTHS[kind])
        if kind == _ARRAY:
            inner, length = self.number(4), self.number(8)
            self._entries += length
            if inner == _ARRAY or self._entries > MOST_ENTRIES:
                raise ValueError("a list of lists, or lists that are too long")
            if inner == _STRING:
                for _ in range(length):
                    self.value(inner)
            else:
                self.skip(length * _width(inner))
        elif kind == _STRING:
            self.skip(self.number(8))
        else:
            self.skip(_width(kind))
        return None


def _width(kind: int) -> int:
    if kind not in _WIDTHS:
        raise ValueError(f"a value of unknown type {kind}")
    return _WIDTHS[kind]
