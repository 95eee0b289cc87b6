"""Load a model by built-in name, folder, GGUF file or hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lirefs.errors import (
    ModelLoadError,
    ModelNotFoundError,
    SettingError,
    first_line_of_error,
    must_be,
)
from lirefs.files import cache_dir, parse_json
from lirefs.model.builtin import BUILTIN, damaged_files, keep_gguf, kept_gguf
from lirefs.model.language_model import LanguageModel, wrap
from lirefs.model.untrusted.configuration import check_adapter, check_configuration
from lirefs.model.untrusted.folder import Weights, check_files, weights_in
from lirefs.model.untrusted.gguf_header import check_header
from lirefs.model.untrusted.size import no_larger_than

_HUB_SECONDS = 5.0
_OF_BOTH = (
    "revision",
    "token",
    "subfolder",
    "cache_dir",
    "local_files_only",
    "force_download",
    "proxies",
)
"""What the tokenizer is loaded with as the model is."""
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files that every built-in model has."""
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""Files of an adapter of PEFT."""
_MOST_LAYERS = 1_000
"""Where the number of weights is unknown."""
_UNKNOWN = 1 << 50
_MOST_PLANNED = 100_000
"""Weights of a model that is planned for without its files."""


def load(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    layout: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> LanguageModel:
    """Load a model by built-in name, folder, ``.gguf`` file or hub id, in evaluation mode.

        lirefs.load("owner/model", attn_implementation="sdpa", revision="main")
        lirefs.load("owner/model", device_map="auto", max_memory={0: "20GiB"}, offload_folder="off")

    Args:
        name: The model. Built-in are ``organism``, part of the package, and ``smollm2-135m``,
            fetched once and then kept in the cache. A ``.gguf`` file is read in float32 and kept
            there as well, up to 8 GiB, so that only its first load takes long. The folder of a PEFT
            adapter (``adapter_config.json``, needs ``peft``) is loaded with its base model.
        device: CUDA if available, else the CPU, by default. Not used with ``device_map``.
        dtype: float32 on the CPU and the checkpoint's own type on CUDA by default.
        device_map: Passed to ``from_pretrained``, for models on several devices.
        trust_remote_code: Whether to run code that comes with the checkpoint.
        layout: Names of parts, for a model whose parts are not found automatically.
        **kwargs: For ``from_pretrained`` of ``transformers``: ``attn_implementation``,
            ``quantization_config``, ``max_memory``, ``offload_folder`` and others. The tokenizer
            also gets ``revision``, ``token``, ``subfolder``, ``cache_dir``, ``local_files_only``,
            ``force_download`` and ``proxies``.

    Raises:
        ModelNotFoundError: No model has this name, or the hub could not be reached.
        ModelLoadError: A model was found but could not be read.
        DownloadError: A built-in model could not be fetched.
        LayoutError: The parts of the model were not found.
        SettingError: The device does not exist, `device` and `device_map` are both given, `layout`
            has an unknown part, or the model's class does not know one of ``kwargs``.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> lm.generate("Math: 31 + 27 =", max_new_tokens=3)
        '58.'
    """
    must_be(name, (str, os.PathLike), "the name of a model", ModelNotFoundError)
    if device_map is not None and device is not None:
        raise SettingError("give device or device_map, not both")
    place = usable_device(device)
    if dtype is None:
        dtype = torch.float32 if place.type == "cpu" and device_map is None else "auto"
    folder = Path(name).expanduser()
    if (folder / _ADAPTER[0]).is_file() and not (folder / "config.json").is_file():
        given = {"device": device, "dtype": dtype, "device_map": device_map, **kwargs}
        model, tokenizer = _with_adapter(folder, given | {"trust_remote_code": trust_remote_code})
        return wrap(model, tokenizer, layout=layout, name=str(name))
    # A copy is dequantized, which is not what somebody with a quantization in mind wants.
    source, common = _resolve(os.fspath(name), copies="quantization_config" not in kwargs)
    common["trust_remote_code"] = trust_remote_code
    common |= {key: value for key, value in kwargs.items() if key in _OF_BOTH}
    extra: dict[str, Any] = {"dtype": dtype}
    if "gguf_file" in common:
        # Otherwise a quantizer stays attached, and the model can be neither edited nor saved.
        extra["quantization_config"] = GgufConfig(dequantize=True)
    if device_map is not None:
        extra["device_map"] = device_map
    elif "quantization_config" in kwargs:  # quantized on its device, as it cannot always be moved
        extra["device_map"] = {"": place}
    extra |= {**kwargs, **common, "output_loading_info": True}
    try:
        if not Path(source).is_dir():
            check_configuration(_hub_configuration(source, common), _MOST_LAYERS)
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        with no_larger_than(lambda: _weights(source, common)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **extra)
    except Exception as problem:
        if isinstance(problem, TypeError) and "unexpected keyword" in str(problem):
            raise SettingError(f"{name}: {first_line_of_error(problem)}") from problem
        raise _load_error(str(name), source, common, problem) from problem
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"{name}: {len(missing)} weights are missing, first {missing[0]}, and would be random "
            "numbers; the file is damaged, or its configuration is of another model"
        )
    if "device_map" not in extra:
        model = model.to(place)
    lm = wrap(model.eval(), tokenizer, layout=layout, name=str(name))
    if "gguf_file" in common and "quantization_config" not in kwargs:
        # It is dequantized, and what is loaded later from the copy must be the same model.
        vars(lm.model.config).pop("quantization_config", None)
        vars(lm.model).pop("is_quantized", None)
        keep_gguf(folder, lm.model, tokenizer)
    return lm


def _with_adapter(folder: Path, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """The base model with an adapter of PEFT on it, and the tokenizer.

    Settings are those that `load` gets, for the base model. The tokenizer is that of the adapter's
    folder, if there is one.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as problem:
        raise ModelLoadError(f"{folder}: an adapter; pip install peft, which loads it") from problem
    try:
        config = parse_json((folder / _ADAPTER[0]).read_text("utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(name, str) or not name:
            raise ValueError("it does not name its base model")
        check_files(folder)
        with safe_open(folder / _ADAPTER[1], framework="pt") as weights:
            saved = set(weights.keys())
            check_adapter(config, [n for one in saved for n in weights.get_slice(one).get_shape()])
    except Exception as problem:
        raise _adapter_error(folder, problem) from problem
    try:
        base = load(name, **{"revision": revision, **settings} if revision else settings)
    except ModelNotFoundError as problem:
        raise ModelNotFoundError(f"{folder}: its base model was not found: {problem}") from problem
    try:
        model = PeftModel.from_pretrained(base.model, str(folder)).eval()
        if missing := sorted(set(get_peft_model_state_dict(model)) - saved):
            raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
        tokenizer = base.tokenizer
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as problem:
        raise _adapter_error(folder, problem) from problem
    return model, tokenizer


def _adapter_error(folder: Path, problem: Exception) -> ModelLoadError:
    reason = f"{type(problem).__name__}: {first_line_of_error(problem)}"
    return ModelLoadError(
        f"{folder}: the adapter could not be loaded ({reason}); it needs {', '.join(_ADAPTER)} and "
        "the base model that it was trained on"
    )


def usable_device(device: str | torch.device | None, option: str = "device") -> torch.device:
    """A device of this machine; None stands for CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place, count = torch.device(device), torch.cuda.device_count()
        if place.type != "cuda":
            torch.zeros(1, device=place)
        elif (place.index or 0) >= count:
            raise SettingError(f"{option} {device}: there are {count} CUDA devices here")
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as problem:
        reason = first_line_of_error(problem)
        raise SettingError(f"{option} {device!r:.60}: cannot be used ({reason})") from problem
    return place


def without_weights(name: str | os.PathLike[str], dtype: str | torch.dtype) -> Any:
    """Return the model of a configuration on the meta device: shapes and types, and no weights.

    Raises:
        ModelNotFoundError: As for `load`.
        ModelLoadError: As for `load`; a GGUF file has no configuration of its own.
    """
    source, common = _resolve(os.fspath(name))
    if "gguf_file" in common:
        raise ModelLoadError(f"{name}: a GGUF file cannot be read without its weights")
    try:
        if not Path(source).is_dir():
            check_configuration(_hub_configuration(source, common), _MOST_LAYERS)
        config = AutoConfig.from_pretrained(source, **common)
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        with torch.device("meta"), no_larger_than(lambda: Weights(_MOST_PLANNED, _UNKNOWN)):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    except Exception as problem:
        raise _load_error(str(name), source, common, problem) from problem


def _resolve(name: str, copies: bool = True) -> tuple[str, dict[str, Any]]:
    """Return the source for ``from_pretrained``, and further arguments for it.

    With ``copies``, a GGUF file whose conversion was kept is read from there.
    """
    if name in BUILTIN:
        folder = BUILTIN[name]()
        if missing := [file for file in _FILES if not (folder / file).is_file()]:
            # Without its tokenizer's settings a model would load, and read other tokens.
            raise ModelLoadError(f"{name}: {', '.join(missing)} is missing; {_remedy(folder)}")
        return _undamaged(name, folder)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"{name}: no such GGUF file")
        try:
            if check_header(path).blocks is None:
                raise ValueError("its header does not say how many blocks the model has")
        except (ValueError, OSError) as problem:
            raise ModelLoadError(
                f"{name}: not a GGUF file, or damaged ({problem}); fetch it again"
            ) from problem
        if copies and (kept := kept_gguf(path)).is_dir():
            return _undamaged(name, kept)
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"{name}: a folder without config.json, so not a model")
        _check_folder(path)
        return str(path), {"local_files_only": True}
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelNotFoundError(_unknown(name)) from None
    # One short request: without an answer transformers would retry for a minute.
    return name, {} if _hub_answers() else {"local_files_only": True}


def _undamaged(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What `_resolve` returns for a folder of the cache, whose digests were compared."""
    if damaged := damaged_files(folder):
        raise ModelLoadError(
            f"{name}: {', '.join(damaged)} is damaged: its SHA-256 is not that of the file as it "
            f"was made; {_remedy(folder)}"
        )
    return str(folder), {"local_files_only": True}


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose files or configuration are unsafe to read."""
    try:
        check_files(folder)
        config = parse_json((folder / "config.json").read_text("utf-8"))
        # A folder without weights may be planned for; of damaged weights, loading says more.
        tensors = 0
        with suppress(SafetensorError, OSError, ValueError):
            tensors = weights_in(folder).tensors
        check_configuration(config, tensors or _MOST_LAYERS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ModelLoadError(f"{folder}: damaged ({problem}); fetch or write it again") from problem


def _hub_configuration(source: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a repository of the hub, or of the base model of an adapter there."""
    settings = {key: one for key, one in common.items() if key != "trust_remote_code"}
    try:
        return PreTrainedConfig.get_config_dict(source, **settings)[0]
    except OSError:
        adapter = find_adapter_config_file(source, **settings)
        if adapter is None:
            raise
    base = parse_json(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
    return PreTrainedConfig.get_config_dict(base, **{**settings, "revision": None})[0]


def _weights(source: str, common: Mapping[str, Any]) -> Weights:
    """What the files of a model hold, those of the hub in its cache."""
    if "gguf_file" in common:
        return check_header(Path(source) / common["gguf_file"]).weights
    subfolder = common.get("subfolder", "")
    if Path(source).is_dir():
        return weights_in(Path(source) / subfolder)
    settings = {key: common[key] for key in ("cache_dir", "revision") if key in common}
    try:
        file = cached_file(
            source, "config.json", subfolder=subfolder, local_files_only=True, **settings
        )
    except OSError:  # an adapter
        file = None
    return Weights(_UNKNOWN, _UNKNOWN) if file is None else weights_in(Path(file).parent)


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # of any kind, offline mode included
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
    reason = first_line_of_error(problem)
    from_hub = source == name and not Path(source).expanduser().is_dir()
    if from_hub and isinstance(problem, OSError):
        offline = "it is not in the local cache and the hub could not be reached"
        reason = offline if common.get("local_files_only") else f"the hub says: {reason}"
        return ModelNotFoundError(f"{_unknown(name)}; {reason}")
    kind = "the GGUF file is damaged or of an unknown kind" if "gguf_file" in common else "failed"
    remedy = f"; {_remedy(Path(source))}" if name in BUILTIN else ""
    return ModelLoadError(
        f"{name}: could not be loaded, {kind}: {type(problem).__name__}: {reason}{remedy}"
    )


def _remedy(folder: Path) -> str:
    """Say how to repair the folder of a built-in model."""
    if folder.is_relative_to(cache_dir()):
        return f"remove {folder}, and the next call makes it again"
    return f"{folder} belongs to this package: install the package again"
