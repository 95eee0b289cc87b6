"""A language model with its tokenizer and its layout, from wherever it comes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kfac.weight_edit import hold, originals_of
from lirefs.builtin import BUILTIN
from lirefs.errors import (
    InterventionError,
    ModelLoadError,
    ModelNotFoundError,
    SettingError,
    first_line,
)
from lirefs.files import cache_dir, parse_json
from lirefs.fingerprint import model_hash, tokenizer_hash
from lirefs.gguf_header import check_header
from lirefs.guest import accepts, evaluating, input_device
from lirefs.layout import Layout
from lirefs.layout_search import find_layout

_HUB_SECONDS = 5.0
_PARTS = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files without which a built-in model is not whole."""
_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
MOST_LAYERS = 1_000


# Fingerprints of the last few states of each model, so that a sweep hashes its weights once.
_HASHES: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()
_STATES = 4


def is_model(model: nn.Module, made_on: str) -> bool:
    """Whether a model is the one of a fingerprint: as it is, or without the edits it is under.

    Args:
        model: The bare model.
        made_on: What `LanguageModel.fingerprint` said.

    Raises:
        ProvenanceError: A weight is offloaded and cannot be read.
    """
    return made_on in (_fingerprint(model, edited=False), _fingerprint(model))


def _fingerprint(model: nn.Module, edited: bool = True) -> str:
    """SHA-256 of configuration and weights; `edited`: with the removable edits in place."""
    weights = {
        name: parameter if edited else _unedited(parameter)
        for name, parameter in model.named_parameters()
    }
    # An address alone would not do: freed memory is given to the next edit's weights. The version
    # is the parameter's own, which counts changes in place and not the edits that come and go.
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
    """What a parameter held before the edits of `kfac` that are attached now."""
    whole: Any = SimpleNamespace(parameter=parameter, view=lambda tensor: tensor)
    return next(iter(originals_of(whole)), parameter)


def is_edited(model: nn.Module) -> bool:
    """Whether a removable weight edit is attached to a model."""
    return any(_unedited(parameter) is not parameter for parameter in model.parameters())


def held(model: nn.Module) -> Callable[[], None]:
    """Keep the interventions of other threads off a model until the result is called.

    Raises:
        InterventionError: Another thread has one attached, or this is no module.
    """
    must_be_module(model)
    return hold(model, InterventionError)


def must_be_module(model: object) -> None:
    """Refuse what is no model itself, such as an `lm`.

    Raises:
        InterventionError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise InterventionError(
            f"an intervention needs the model itself, got {type(model).__name__}; give lm.model"
        )


class LanguageModel:
    """A decoder and its tokenizer. Made by ``load`` or ``wrap``.

    The model is a guest: nothing here changes its weights, hooks or training mode.

    Attributes:
        model: The ``transformers`` model.
        tokenizer: Its tokenizer.
        layout: Where its parts are, verified.
        name: What it is called in reports.
    """

    def __init__(self, model: Any, tokenizer: Any, layout: Layout, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.name = name
        self._tokenizer_fingerprint: str | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, layers={self.n_layers}, width={self.width})"

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its token ids."""
        return input_device(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self.layout.n_layers

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.layout.width

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every parameter, as 64 hex digits.

        Computed when first asked for, and again after a parameter was replaced or changed in
        place. (A change through ``parameter.data`` is invisible to PyTorch, and so to this.)

        Raises:
            ProvenanceError: A weight is offloaded and cannot be read.
        """
        return _fingerprint(self.model)

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the rules and the special tokens, as 64 hex digits."""
        if self._tokenizer_fingerprint is None:
            self._tokenizer_fingerprint = tokenizer_hash(self.tokenizer)
        return self._tokenizer_fingerprint

    def encode(self, prompts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each prompt, without padding.

        Args:
            prompts: Texts.
            add_special_tokens: Whether the tokenizer adds its own (a beginning-of-sequence token,
                say).

        Returns:
            One list of ids for each prompt.

        Raises:
            SettingError: ``prompts`` is one string, or holds something that is not a string.
        """
        if isinstance(prompts, str):
            raise SettingError("encode takes a list of prompts, got one string: use [prompt]")
        texts = list(prompts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise SettingError(f"prompt {index} is not a string but {type(text).__name__}")
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, padding=False)
        return [list(map(int, ids)) for ids in encoded["input_ids"]]

    def pad(self, ids: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Return a batch for the model.

        Args:
            ids: Token ids of each sequence, not one empty.
            side: Where the padding goes, ``left`` or ``right``.

        Returns:
            ``input_ids`` and ``attention_mask``, and ``position_ids`` if the model takes them:
            integers, ``(batch, tokens)``, on the model's device. Positions count real tokens
            from 0; padding on the left has position 0.

        Raises:
            SettingError: An unknown side, no sequence, or an empty sequence.
        """
        if side not in ("left", "right"):
            raise SettingError(f"side must be 'left' or 'right', got {side!r}")
        if not ids:
            raise SettingError("nothing to pad: the list of sequences is empty")
        for index, row in enumerate(ids):
            if not len(row):
                raise SettingError(f"sequence {index} has no token: the prompt is empty")
        longest = max(map(len, ids))
        input_ids = torch.full((len(ids), longest), self._pad_id)
        mask = torch.zeros_like(input_ids)
        for index, row in enumerate(ids):
            span = slice(longest - len(row), None) if side == "left" else slice(len(row))
            input_ids[index, span] = torch.as_tensor(list(row))
            mask[index, span] = 1
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if accepts(self.model, "position_ids"):
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 40, **kwargs: Any) -> Any:
        """Continue one prompt, or a batch of prompts padded on the left.

        Args:
            prompt: One prompt or a sequence of them.
            max_new_tokens: The most tokens to add.
            **kwargs: For ``model.generate``. Decoding is greedy unless ``do_sample`` is set.

        Returns:
            The new text alone, without special tokens: a string for a string, else a list.

        Raises:
            SettingError: A prompt is empty.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        batch = self.pad(self.encode(prompts))
        batch.pop("position_ids", None)  # generate makes its own, step by step, from the mask
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": self._pad_id, **kwargs}
        if not settings["do_sample"]:
            # A model's own sampling settings would only raise a warning that they are unused.
            settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
        with evaluating(self.model):
            out = self.model.generate(**batch, max_new_tokens=max_new_tokens, **settings)
        start = batch["input_ids"].shape[1]
        texts = [self.tokenizer.decode(row[start:], skip_special_tokens=True) for row in out]
        return texts[0] if isinstance(prompt, str) else texts

    @property
    def _pad_id(self) -> int:
        """The id to pad with; any will do, because padding is masked."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def wrap(
    model: nn.Module,
    tokenizer: Any,
    *,
    layout: Mapping[str, str] | None = None,
    name: str | None = None,
) -> LanguageModel:
    """Make a ``LanguageModel`` of a model and a tokenizer that are already in memory.

    Args:
        model: A decoder; it is not changed.
        tokenizer: Its tokenizer.
        layout: Names of parts, for a model whose parts are not found by themselves.
        name: What to call it; the model's ``name_or_path`` or its class by default.

    Returns:
        Model, tokenizer and verified layout.

    Raises:
        LayoutError: The parts of the model were not found.
        SettingError: ``layout`` has an unknown part.
    """
    called = name or getattr(model, "name_or_path", "") or type(model).__name__
    return LanguageModel(model, tokenizer, find_layout(model, layout), str(called))


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    layout: Mapping[str, str] | None = None,
) -> LanguageModel:
    """Load a model by built-in name, folder, ``.gguf`` file or hub id, in evaluation mode.

    Args:
        name: The model. Built-in: ``organism``, which comes with the package, and
            ``smollm2-135m``, fetched once and then kept in the cache.
        device: CUDA where there is one, else the CPU, by default. Not used with ``device_map``.
        dtype: float32 on the CPU and the checkpoint's own type on CUDA by default.
        device_map: Passed to ``from_pretrained``, for models on several devices.
        trust_remote_code: Whether to run code that comes with the checkpoint.
        layout: Names of parts, for a model whose parts are not found by themselves.

    Returns:
        Model, tokenizer and verified layout, in evaluation mode.

    Raises:
        ModelNotFoundError: Nothing answers to the name, or the hub could not be reached.
        ModelLoadError: What was found could not be read.
        DownloadError: A built-in model could not be fetched.
        LayoutError: The parts of the model were not found.
        SettingError: `device` and `device_map` are both given, or `layout` has an unknown part.
    """
    if device_map is not None and device is not None:
        raise SettingError("give device or device_map, not both")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" and device_map is None else "auto"
    source, common = _resolve(os.fspath(name))
    common["trust_remote_code"] = trust_remote_code
    extra: dict[str, Any] = {"dtype": dtype}
    if "gguf_file" in common:
        # Otherwise a quantizer stays attached, and the model can be neither edited nor saved.
        extra["quantization_config"] = GgufConfig(dequantize=True)
    if device_map is not None:
        extra["device_map"] = device_map
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, **common, **extra, output_loading_info=True
        )
    except Exception as problem:
        raise _load_error(str(name), source, common, problem) from problem
    model, told = loaded
    if lacking := sorted(told["missing_keys"]):
        raise ModelLoadError(
            f"{name}: {len(lacking)} weights are missing, first {lacking[0]}, and would be random "
            "numbers; the file is damaged, or its configuration is of another model"
        )
    if device_map is None:
        model = model.to(place)
    return wrap(model.eval(), tokenizer, layout=layout, name=str(name))


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return what to give to ``from_pretrained``, and with which further arguments."""
    if name in BUILTIN:
        folder = BUILTIN[name]()
        if lost := [one for one in _PARTS if not (folder / one).is_file()]:
            # Without its tokenizer's settings a model would load, and read other tokens.
            raise ModelLoadError(f"{name}: {', '.join(lost)} is missing{_remedy(str(folder))}")
        return str(folder), {"local_files_only": True}
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"{name}: no such GGUF file")
        try:
            if check_header(path) is None:
                raise ValueError("its header does not say how many blocks the model has")
        except (ValueError, OSError) as problem:
            raise ModelLoadError(
                f"{name}: not a GGUF file, or damaged ({problem}); fetch it again"
            ) from problem
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{name}: a folder without config.json, so not a model")
        _check_layers(path / "config.json")
        return str(path), {"local_files_only": True}
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelNotFoundError(_unknown(name)) from None
    # Asked once, briefly: without an answer transformers would try again for a minute.
    return name, {} if _hub_answers() else {"local_files_only": True}


def _check_layers(file: Path) -> None:
    """Refuse a configuration with more layers than weights: making them may take all memory.

    Raises:
        ModelLoadError: It has, or it is no JSON object.
    """
    try:
        config = parse_json(file.read_text("utf-8"))
        most = MOST_LAYERS
        one = file.with_name("model.safetensors")  # there may be several files, or another kind
        with suppress(SafetensorError, OSError), safe_open(one, framework="pt") as weights:
            most = len(weights.keys())
        for part in (config, config.get("text_config")):
            for key in _LAYERS & set(part or ()):
                if isinstance(part[key], int | float) and part[key] > most:
                    raise ValueError(f"{key} is {part[key]}, more than {most}")
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ModelLoadError(
            f"{file}: damaged ({problem}); fetch or write the model again"
        ) from problem


def _hub_answers() -> bool:
    """Return whether the hub answers within a few seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # whatever it is, offline mode included, there is no hub to ask
        return False
    return True


def _unknown(name: str) -> str:
    return (
        f"{name}: no such model; expected a built-in name ({', '.join(sorted(BUILTIN))}), a folder "
        "with config.json, a .gguf file or a hub id"
    )


def _load_error(
    name: str, source: str, common: Mapping[str, Any], problem: Exception
) -> ModelNotFoundError | ModelLoadError:
    """Return the error of this package for an exception of ``transformers``."""
    reason = first_line(problem)
    from_hub = source == name and not Path(source).expanduser().is_dir()
    if from_hub and isinstance(problem, OSError):
        if common.get("local_files_only"):
            offline = "it is not in the local cache and the hub could not be reached"
            return ModelNotFoundError(f"{_unknown(name)}; {offline}")
        return ModelNotFoundError(f"{_unknown(name)}; the hub says: {reason}")
    kind = "the GGUF file is damaged or of an unknown kind" if "gguf_file" in common else "failed"
    remedy = _remedy(source) if name in BUILTIN else ""
    return ModelLoadError(
        f"{name}: could not be loaded, {kind}: {type(problem).__name__}: {reason}{remedy}"
    )


def _remedy(folder: str) -> str:
    """Return what to do about the folder of a built-in model that is damaged."""
    if Path(folder).is_relative_to(cache_dir()):
        return f"; remove {folder}, and the next call makes it again"
    return f"; {folder} belongs to this package, so install that again"
