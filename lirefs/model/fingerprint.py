"""Fingerprints of models and tokenizers: hashes of everything that decides their behaviour."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lirefs.errors import ProvenanceError
from lirefs.model.weight_swap import originals_of

# Settings that do not change what the model computes, or that depend on how it was loaded. Keys
# that begin with an underscore are left out as well.
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
    if not isinstance(settings, dict):
        return settings
    return {
        str(key): _essential(value)
        for key, value in settings.items()
        if key not in _NOT_ESSENTIAL and not str(key).startswith("_")
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides the token ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("padding", "truncation"):  # left behind by the last call
        rules.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    parts = [sorted(tokenizer.get_vocab().items()), rules, special, template]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# Hashes of the last few states of each model, so that a sweep hashes its weights once.
_HASHES: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
_STATES = 4


def is_model(model: nn.Module, made_on: str) -> bool:
    """Whether a model has the fingerprint `made_on`, as it is or without its attached edits."""
    return made_on in (fingerprint(model, edited=False), fingerprint(model))


def fingerprint(model: nn.Module, edited: bool = True) -> str:
    """SHA-256 of configuration and weights, with (`edited`) or without removable edits."""
    weights = {
        name: parameter if edited else _unedited(parameter)
        for name, parameter in model.named_parameters()
    }
    # Not the address alone: the next edit's weights may get freed memory. The version is the
    # parameter's own, which counts changes in place and not the edits that come and go.
    state = tuple(
        (StorageWeakRef(one.untyped_storage()), one.data_ptr(), parameter._version)  # type: ignore[no-untyped-call]
        for one, parameter in zip(weights.values(), model.parameters(), strict=True)
    )
    hashes = _HASHES.setdefault(model, {})
    if state not in hashes:
        hashes[state] = model_hash(model, weights)
        for old in list(hashes)[:-_STATES]:
            del hashes[old]
    return hashes[state]


def _unedited(parameter: nn.Parameter) -> Tensor:
    """The original tensor of a parameter, without the weight edits that are attached now."""
    return next(iter(originals_of(parameter)), parameter)
