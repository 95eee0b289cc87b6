"""The SHA-256 of tensors, by which a file knows its own bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_KEY = "sha256"
OTHER_BYTES = "its bytes are not those that were written (the SHA-256 differs)"


def digest_of(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a header of JSON values and all tensors, as 64 hex digits."""
    return _digest(header, tensors, tensors.__getitem__)


def _digest(
    header: Mapping[str, Any], names: Iterable[str], tensor_of: Callable[[str], Tensor]
) -> str:
    sha = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(names):
        sha.update(name.encode())
        sha.update(tensor_bytes(tensor_of(name)))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def with_digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header of a safetensors file with the SHA-256 of all that the file holds."""
    plain = dict(sorted(header.items()))
    return plain | {_KEY: digest_of(plain, tensors)}


def check_digest(file: Any) -> None:
    """Raise ValueError if an open safetensors file holds other bytes than were written.

    Nothing is known of a file without a digest, as earlier versions wrote it. The digest is against
    bad luck: who wants to change a file can write another one.
    """
    header = dict(sorted((file.metadata() or {}).items()))
    written = header.pop(_KEY, None)
    if written is not None and written != _digest(header, file.keys(), file.get_tensor):
        raise ValueError(OTHER_BYTES)
