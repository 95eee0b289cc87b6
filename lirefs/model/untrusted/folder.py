"""What the files of a model folder are, judged without reading their weights."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from lirefs.files import parse_json

_FLOATS = {"F64", "F32", "F16", "BF16"}
_PACKED = 4
"""Most weights that quantized checkpoints pack into a byte."""
_SMALL = 1 << 20
"""Bytes of a file that may be all holes."""


@dataclass(frozen=True)
class Weights:
    """Numbers of tensors in some files, and of the weights that a model can take from them."""

    tensors: int
    elements: float


def check_files(folder: Path) -> None:
    """Raise ValueError unless each file is regular, is there in full, and stays in the folder.

    Links are followed: the hub's own cache is made of them. But an index may not lead outside.
    """
    for file in sorted(folder.iterdir()):
        if not file.exists() or file.is_dir():
            continue
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file.name} is not a regular file")
        if status.st_size > _SMALL and _data_in(file, status) < status.st_size / 2:
            raise ValueError(
                f"{file.name} is mostly holes: most of its {status.st_size} bytes are not on disk"
            )
        if file.name.endswith(".index.json"):
            _check_index(file)


def weights_in(folder: Path) -> Weights:
    """The weights in a folder, by the headers of its files; ValueError if one is damaged."""
    tensors, elements = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                one = opened.get_slice(name)
                if not name.isprintable():  # transformers prints the names of those it cannot use
                    raise ValueError(f"{file.name} has a tensor called {name!r:.80}")
                tensors += 1
                elements += math.prod(one.get_shape()) * (
                    1 if one.get_dtype() in _FLOATS else _PACKED
                )
    for file in sorted(folder.glob("*.bin")):
        size = file.stat().st_size
        if zipfile.is_zipfile(file):
            try:
                inside = zipfile.ZipFile(file).infolist()
            except zipfile.BadZipFile as problem:
                raise ValueError(f"{file.name}: {problem}") from problem
            if sum(one.file_size for one in inside) > size:
                raise ValueError(f"{file.name} is compressed; checkpoints of torch are not")
            tensors += len(inside)
        else:
            tensors += size // 64  # an old format; a tensor takes more than this
        elements += size
    return Weights(tensors, elements)


def _data_in(file: Path, status: os.stat_result) -> int:
    """Bytes of a file that are not in holes, as far as the file system says."""
    if status.st_size <= 2 * 512 * getattr(status, "st_blocks", status.st_size):
        return status.st_size
    # Some file systems count no blocks; their files have no holes either.
    with file.open("rb") as opened:
        data, place = 0, 0
        while place < status.st_size:
            try:
                start = os.lseek(opened.fileno(), place, os.SEEK_DATA)
            except OSError:  # no more data
                break
            place = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            data += place - start
    return data


def _check_index(file: Path) -> None:
    """Raise ValueError if an index names a file that is not in its folder."""
    index = parse_json(file.read_text("utf-8"))
    names = index["weight_map"].values()
    home = file.parent.resolve()
    # A snapshot in the hub's cache is a folder of links to the blobs of the same repository.
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    for name in set(names):
        place = (home / name).resolve()
        if (
            Path(name).is_absolute()
            or ".." in Path(name).parts
            or not any(place.is_relative_to(one) for one in homes)
        ):
            raise ValueError(f"{file.name} names {name!r:.80}, which is outside the folder")
