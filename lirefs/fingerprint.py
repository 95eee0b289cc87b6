"""What tells two models, and two tokenizers, apart: hashes of all that decides what they do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import ProvenanceError

# Settings of a configuration that do not change what the model computes, or that depend on how
# it was loaded. Keys that begin with an underscore are left out as well.
_NOT_ESSENTIAL = {
    "architectures",
    "dtype",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def model_hash(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of configuration and weights, streamed one parameter at a time."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    digest = hashlib.sha256()
    digest.update(json.dumps(_essential(settings), sort_keys=True, default=str).encode())
    for name, weight in weights.items():
        if weight.is_meta:
            raise ProvenanceError(f"{name} is offloaded, so the model has no fingerprint")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1).contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _essential(settings: Any) -> Any:
    """Return ``settings`` without what does not change the computation, at every depth."""
    if isinstance(settings, dict):
        return {
            str(key): _essential(value)
            for key, value in settings.items()
            if key not in _NOT_ESSENTIAL and not str(key).startswith("_")
        }
    return settings


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of what decides the token ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("padding", "truncation"):  # left behind by the last call, no part of the rules
        rules.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    parts = [sorted(tokenizer.get_vocab().items()), rules, special, template]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
