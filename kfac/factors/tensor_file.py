"""Files of tensors with a JSON header: safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirefs.errors import FactorsFileError, WriteError


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    """Write one safetensors file; an existing file is replaced at once, when all is on disk.

    Raises:
        WriteError: The disk is full, or the folder cannot be written to. An existing file stays.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as folder:
            temporary = Path(folder) / target.name
            whole = {key: value.contiguous() for key, value in tensors.items()}
            save_file(whole, temporary, metadata=dict(header))
            # safetensors makes its files readable by their owner alone. A new file has what the
            # umask leaves, and the umask itself can only be read by setting it, for all threads.
            new = Path(folder) / ".new"
            new.touch()
            temporary.chmod(stat.S_IMODE(new.stat().st_mode))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"{path} cannot be written: {reason}") from error


def read_tensors(
    path: str | os.PathLike[str], key: str, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file written by `write_tensors`.

    Args:
        path: The file.
        key: Of the header's JSON text.
        what: Name of the content, for messages.

    Raises:
        FactorsFileError: The file is missing, truncated or foreign.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FactorsFileError(f"{path} cannot be read as a {what} file: {error}") from error
    if header is None:
        raise FactorsFileError(f"{path} is a safetensors file, but holds no {what}")
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise FactorsFileError(f"{path} has a damaged header: {error!r}") from error
    if not isinstance(values, dict):
        raise FactorsFileError(f"{path} has a damaged header: no object")
    return values, tensors


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def library_version() -> str:
    """Return the installed version; "unknown" when run from a source tree."""
    try:
        return metadata.version("lirefs")
    except metadata.PackageNotFoundError:
        return "unknown"
