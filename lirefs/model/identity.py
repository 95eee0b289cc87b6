"""Whether two models are the same: the one answer, for caches, journals and provenance.

There are two views of it.

* `fingerprint`: what a model computes, apart from rounding. Configuration, parameters, buffers that
  are saved with the model, the state of quantized weights, adapters (which are active, merged or
  disabled, and how they are scaled), and the steerings and weight edits that are attached.
  Directions record it, and steering compares it: a direction that was fitted under one attention
  implementation steers the same model under another.
* `identity`: all of that, and whatever else decides the numbers that come out now: the attention
  implementation, autocast, buffers that are not saved, the class, settings and forward method of
  each module, and the hooks. It is the key of caches, journals and checkpoints.

What cannot be read (offloaded or opaque weights, hooks of others) is a `ProvenanceError`. Weights
that FSDP2 shards are read one at a time, by all processes together.

`parts_of` is neither: it tells whether one model, in one process, is what it was a moment ago.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as torch_module

from lirefs.errors import ProvenanceError
from lirefs.files import sha256_of
from lirefs.model.code import (
    class_of,
    code_of,
    forward_of,
    hooks_of,
    is_plain,
    must_be_known,
    origin_of,
    package_of,
    unknown,
)
from lirefs.model.guest import input_device
from lirefs.model.intervention import steerings_on
from lirefs.model.weight_swap import (
    fsdp_modules,
    gathered,
    is_edited,
    is_sharded,
    local_part,
    must_be_readable,
    originals_of,
    reshard,
)

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
_ADAPTER_STATE = (
    "active_adapter",
    "merged_adapters",
    "scaling",
    "_adapters_disabled",
    "_disable_adapters",
)
# Attributes of modules that do not change what an evaluated model computes.
_MODES = {
    *_NOT_ESSENTIAL,
    "gradient_checkpointing",
    "hf_device_map",
    "prepare_inputs_for_generation",
}
_UNREADABLE = (RuntimeError, TypeError, NotImplementedError)
_OF_EVERY_MODULE = set(vars(nn.Module()))

# Hashes of the last few states of each model, so that a sweep hashes its weights once.
_HASHES: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
_STATES = 8


def fingerprint(model: nn.Module, edited: bool = True, steered: int | None = None) -> str:
    """SHA-256 of what a model computes, as 64 hex digits.

    Args:
        model: The model.
        edited: With removable weight edits that are attached, or without them.
        steered: How many of the attached steerings count, in their order; None for all.

    Raises:
        ProvenanceError: A weight is offloaded or opaque, or a steering cannot be told from others.
    """
    weights = _weights_hash(model, edited)
    steerings = [one.describe() for one in steerings_on(model)[:steered]]
    for one in steerings:
        must_be_told_apart(one, "an attached steering")
    more = {"adapters": _adapters(model), "steerings": steerings}
    return _sha(weights, more) if any(more.values()) else weights


def is_model(model: nn.Module, made_on: str) -> bool:
    """Whether a model has the fingerprint `made_on`, with or without what is attached to it."""
    edits = {False, is_edited(model)}
    for steered in range(len(steerings_on(model)) + 1):
        try:
            if made_on in {fingerprint(model, edited, steered) for edited in edits}:
                return True
        except ProvenanceError:
            if not steered:
                raise
    return False


def identity(model: nn.Module, *more: str) -> str:
    """SHA-256 of all that decides which numbers come out of a model now, as 64 hex digits.

    Args:
        model: The model.
        *more: What else decides them, such as a layout.

    Raises:
        ProvenanceError: As for `fingerprint`; or a module has a hook, or a forward method, of which
            nothing is known.
    """
    hooks = [*torch_module._global_forward_hooks.values()]
    hooks += torch_module._global_forward_pre_hooks.values()
    must_be_known(hooks, "every module")
    state, structure = _State(), []
    casts = {one: str(one._get_fsdp_state()._mp_policy) for one in fsdp_modules(model)}
    for name, module in model.named_modules():
        hooks += hooks_of(name, module)
        own = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in _OF_EVERY_MODULE}
        ignored = {*_MODES, *(_ADAPTER_STATE if _is_of_peft(module) else ())}
        own = {key: value for key, value in own.items() if key not in ignored}
        settings: dict[str, Any] = {key: value for key, value in own.items() if is_plain(value)}
        settings |= {"fsdp": casts[module]} if module in casts else {}
        where = f"module {name or type(module).__name__!r}"
        for key, value in own.items():
            if callable(value) and not isinstance(value, type) and not hasattr(type(module), key):
                settings[key] = code_of(value, f"the attribute {key} of {where}")
            elif isinstance(value, np.ndarray | np.generic):
                settings[key] = [str(value.dtype), sha256_of(value.tobytes())]
        structure.append([name, class_of(type(module)), forward_of(name, module), settings])
        for key in sorted(module._non_persistent_buffers_set):
            state.add(f"{name}.{key}", module._buffers.get(key))
        for key, value in own.items():
            parts = value.values() if isinstance(value, dict) else value
            for part in parts if isinstance(value, dict | list | tuple) else [value]:
                if isinstance(part, Tensor):
                    state.add(f"{name}.{key}", part)
    steered = any(origin_of(one).startswith("lirefs.steering") for one in hooks)
    if steered and not steerings_on(model):
        raise unknown("the model has hooks of a steering that is attached to another model")
    kind = input_device(model).type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    runs = [_implementations(getattr(model, "config", None)), ends, precision, structure]
    return _sha(fingerprint(model), runs, state.hash_for(model), more)


def must_be_told_apart(described: Any, what: str) -> None:
    """Raise ProvenanceError if a description may not tell `what` from others.

    It says so by a key `unknown`, at any depth, whose value gives the reason; or it holds something
    that is not JSON, whose text may leave out what differs, as that of a tensor does.
    """
    if isinstance(described, Mapping):
        if "unknown" in described:
            raise unknown(f"{what} cannot be told from others: {described['unknown']}")
        described = list(described.values())
    if isinstance(described, list | tuple):
        for part in described:
            must_be_told_apart(part, what)
    elif not isinstance(described, str | int | float | np.generic | None):
        raise unknown(f"{what} is described by a {type(described).__name__}, which is not JSON")


def parts_of(model: nn.Module) -> dict[str, Any]:
    """What a model consists of now, by names for messages, to be compared with a moment later.

    Weights and saved buffers count by checksums of their values, as their versions miss what is
    written to `parameter.data`: 0.2 s for the 538 MB of SmolLM2-135M. Values that cannot be read
    do not count.
    """
    reshard(model)
    hooks = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    parts: dict[str, Any] = {"a hook of every module": [list(one.values()) for one in hooks]}
    for name, module in model.named_modules():
        where = f"module {name or type(module).__name__}"
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        parts[f"a hook of {where}"] = [list(one.values()) for one in hooks]
        parts[f"the forward method of {where}"] = type(module), vars(module).get("forward")
        for key, buffer in module._buffers.items():
            if key not in module._non_persistent_buffers_set:
                parts[f"buffer {name}.{key}"] = _checksum(buffer)
    for name, parameter in model.named_parameters():
        parts[f"parameter {name}"] = _checksum(parameter)
    return parts


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name of the first of `parts_of` that differs; empty where all are equal."""
    names = dict.fromkeys([*before, *now])
    return next((name for name in names if before.get(name) != now.get(name)), "")


def _checksum(tensor: Tensor | None) -> Any:
    """A number that changes with a tensor's values; None if they cannot be read."""
    if tensor is None or tensor.is_meta:
        return None
    if is_sharded(tensor):
        return _checksum(local_part(tensor))
    if hasattr(tensor, "__tensor_flatten__"):
        return [_checksum(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    try:
        return tensor.shape, tensor.dtype, zlib.crc32(_bytes_of(tensor))
    except _UNREADABLE:
        return None


def _bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, in their order."""
    return gathered(tensor).detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data


class _State:
    """Tensors, and texts about them: their hash, computed once for each state of a model."""

    def __init__(self, text: str = "") -> None:
        self._texts = [text]
        self._tensors: list[tuple[str, Tensor]] = []
        self._versions: list[Any] = []

    def add(self, label: str, value: Any, counter: Tensor | None = None) -> None:
        """Take in a tensor (None: nothing); changes in place are counted by it, or by `counter`."""
        if value is None:
            return
        if not isinstance(value, Tensor):
            return self._texts.append(_shown(label, value))
        # A tensor made of others, as torchao's.
        if hasattr(value, "__tensor_flatten__") and not is_sharded(value):
            names, context = value.__tensor_flatten__()
            self._texts.append(_shown(label, (type(value).__qualname__, context)))
            for name in names:
                self.add(f"{label}.{name}", getattr(value, name))
            return
        if value.is_meta:
            raise unknown(f"{label} is offloaded and cannot be read")
        self._tensors.append((label, value))
        counter = value if counter is None else counter
        # Tensors of inference mode do not count their changes: hashed each time. So are sharded
        # ones, because either all processes gather them or none.
        always = counter.is_inference() or is_sharded(value)
        self._versions.append(object() if always else counter._version)

    def hash_for(self, model: nn.Module) -> str:
        """SHA-256, from the model's cache where the storages and versions are known."""
        # Not the address alone: the next edit's weights may get freed memory.
        key = (
            *self._texts,
            *(
                (label, StorageWeakRef(own.untyped_storage()), own.data_ptr(), version)  # type: ignore[no-untyped-call]
                for (label, one), version in zip(self._tensors, self._versions, strict=True)
                for own in [local_part(one)]
            ),
        )
        hashes = _HASHES.setdefault(model, {})
        if key not in hashes:
            hashes[key] = self._hash()
            for old in list(hashes)[:-_STATES]:
                del hashes[old]
        return hashes[key]

    def _hash(self) -> str:
        # Configuration and parameters first and in this way: saved directions hold such hashes.
        digest = hashlib.sha256(self._texts[0].encode())
        for label, tensor in self._tensors:
            digest.update(f"{label} {tuple(tensor.shape)} {tensor.dtype}".encode())
            try:
                digest.update(_bytes_of(tensor))
            except _UNREADABLE as problem:
                raise unknown(f"{label} is {tensor.dtype} and cannot be read") from problem
        for text in self._texts[1:]:
            digest.update(text.encode())
        return digest.hexdigest()


def _weights_hash(model: nn.Module, edited: bool) -> str:
    """Hash of configuration, parameters, saved buffers and the state of quantized weights."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    state = _State(json.dumps(_essential(settings), sort_keys=True, default=str))
    must_be_readable(model, unknown)
    for name, parameter in model.named_parameters():
        # The version of the parameter itself, which does not count edits that come and go.
        state.add(name, parameter if edited else _unedited(parameter), parameter)
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if key not in module._non_persistent_buffers_set:
                state.add(f"buffer {name}.{key}", buffer)
        for key, value in _saved_apart(module):
            state.add(f"saved {name}.{key}", value)
    return state.hash_for(model)


def _unedited(parameter: nn.Parameter) -> Tensor:
    """The original tensor of a parameter, without the weight edits that are attached now."""
    return next(iter(originals_of(parameter)), parameter)


def _saved_apart(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module saves besides parameters and buffers, as bitsandbytes does scales and codes."""
    names = ("_save_to_state_dict", "get_extra_state")
    if all(getattr(type(module), name) is getattr(nn.Module, name) for name in names):
        return
    packed = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(packed, "packing_format_for_cpu", False):
        # Saving would unpack the weight in place, and the next pass round its scales once more.
        for key in ("absmax", "code", "blocksize", "quant_type", "shape", "dtype"):
            yield key, getattr(packed, key)
        return
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    known = {id(one) for one in (*module._parameters.values(), *module._buffers.values())}
    for key, value in saved.items():
        if id(value) in known:
            continue
        small = isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() <= 4096
        # Small ones are made for each call, so that no storage would be known again.
        yield key, (str(value.dtype), value.tolist()) if small else value


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters of PEFT are active, merged or disabled, and their scaling, by module."""
    found = []
    for name, module in model.named_modules():
        if _is_of_peft(module):
            state = {key: getattr(module, key, None) for key in _ADAPTER_STATE}
            one = state["active_adapter"]  # a name, or a list of names
            state["active_adapter"] = [one] if isinstance(one, str) else one
            found.append([name, {key: one for key, one in state.items() if is_plain(one)}])
    return found


def _is_of_peft(module: nn.Module) -> bool:
    if "peft" not in sys.modules:
        return False
    return any(package_of(kind.__module__) == "peft" for kind in type(module).__mro__)


def _implementations(config: Any) -> list[str]:
    """The attention, expert and quantization settings of a configuration and of its parts."""
    if not hasattr(config, "to_dict"):
        return []
    parts = [config, *(one for one in vars(config).values() if hasattr(one, "to_dict"))]
    names = ("_attn_implementation", "_experts_implementation", "quantization_config")
    return [str(getattr(part, name, None)) for part in parts for name in names]


def _essential(settings: Any) -> Any:
    """Return ``settings`` without what does not change the computation, at every depth."""
    if not isinstance(settings, dict):
        return settings
    return {
        str(key): _essential(value)
        for key, value in settings.items()
        if key not in _NOT_ESSENTIAL and not str(key).startswith("_")
    }


def _shown(label: str, value: Any) -> str:
    """A label and a value as text; ProvenanceError if it is an object that does not show itself."""
    if " at 0x" in (text := repr(value)):
        raise unknown(f"{label} is a {type(value).__name__} and cannot be read")
    return f"{label} {text}"


def _sha(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


def _jsonable(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
