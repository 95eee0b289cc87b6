"""Safetensors files with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirefs.errors import FactorsFileError
from lirefs.files import atomic_path, refuse_folder
from lirefs.model.untrusted.digest import OTHER_BYTES, digest_of

_DIGEST = "sha256"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> None:
    """Write one file; an existing file is replaced at once, when all is on disk.

    The header has one entry, a JSON object, which gets the SHA-256 of object and tensors. (Two
    entries would be written in a random order.)
    """
    whole = {key: value.contiguous() for key, value in tensors.items()}
    ((key, text),) = header.items()
    values = json.loads(text)
    signed = json.dumps(values | {_DIGEST: digest_of(values, whole)})
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={key: signed})


def read_tensors(
    path: str | os.PathLike[str], key: str, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of `write_tensors`, with the JSON object that its header holds under `key`.

    Any other file is a FactorsFileError, whose message calls the content `what`.
    """
    refuse_folder(path, FactorsFileError)
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
        raise FactorsFileError(f"{path} has a damaged header: it is not a JSON object")
    written = values.pop(_DIGEST, None)  # earlier versions wrote none
    if written is not None and written != digest_of(values, tensors):
        raise FactorsFileError(f"{path} is damaged: {OTHER_BYTES}")
    return values, tensors
