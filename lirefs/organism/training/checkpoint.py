"""Model and training state on disk: safetensors and JSON, each file moved into place whole."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.errors import DataFileError, LirefsError
from lirefs.files import (
    atomic_path,
    atomic_write_text,
    parse_json,
    refuse_folder,
    refuse_foreign,
    usual_file_permissions,
    write_errors,
)
from lirefs.model.untrusted.digest import check_digest, with_digest
from lirefs.organism.training.optimizers import Muon

STATE = "training.safetensors"
RECIPE = "training.json"
LOG = "log.jsonl"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ADAM = ("step", "exp_avg", "exp_avg_sq")


class CheckpointMismatch(LirefsError, ValueError):
    """A folder holds the training state of another run."""


def save_model(
    out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> None:
    """Write a model folder that transformers loads, with weights rounded to a dtype.

    Raises:
        WriteError: The disk is full, or the folder cannot be written to.
    """
    with write_errors(out), tempfile.TemporaryDirectory(dir=out, prefix=".model-") as folder:
        nn.Module.to(copy.deepcopy(model), "cpu", dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        usual_file_permissions(Path(folder))
        # Without its configuration a folder is not a model, so that comes last.
        for file in sorted(Path(folder).iterdir(), key=lambda one: one.name == "config.json"):
            file.replace(out / file.name)


def save_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seed: int,
    recipe: dict[str, object],
) -> None:
    """Write the model (float32) and all that a resumed run needs."""
    # First, because it shows whose the other files are.
    about = {"step": step, "seed": seed, "recipe": recipe}
    atomic_write_text(out / RECIPE, json.dumps(about, indent=2))
    save_model(out, model, tokenizer, torch.float32)
    # What must agree with the tensors is stored with them.
    header = {"step": str(step), "seed": str(seed), "recipe": json.dumps(recipe)}
    write_state(out / STATE, model, optimizers, header)


def load_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    seed: int,
    recipe: Mapping[str, object],
    device: str,
) -> int:
    """Restore model and optimizers; the steps already done, 0 without a training state.

    Raises:
        CheckpointMismatch: If the state is of another seed or recipe.
        DataFileError: If the state is damaged.
        SettingError: If the folder holds files of these names that no training wrote.
    """
    refuse_foreign(out / RECIPE, '"recipe"', MODEL_FILES)
    refuse_foreign(out / LOG, '"tokens_per_second"')
    path = out / STATE
    if not path.exists():
        return 0
    about = state_header(path)
    if not re.fullmatch("[0-9]{1,12}", about.get("step", "")) or "seed" not in about:
        raise DataFileError(f"{path}: damaged (no step or no seed); remove it to start again")
    if about["seed"] != str(seed):
        raise CheckpointMismatch(
            f"{path} was trained with seed {about['seed']:.40}, not {seed}: choose another "
            "folder or the same seed."
        )
    if changed := _changes(_recipe_of(out, about), json.loads(json.dumps(recipe))):
        raise CheckpointMismatch(
            f"{path} was trained by another recipe ({'; '.join(changed)}): choose another folder "
            "or the same recipe."
        )
    read_state(path, model, optimizers, device)
    return int(about["step"])


def _recipe_of(out: Path, header: Mapping[str, str]) -> Any:
    """The recipe of a training state; earlier versions kept it in a file of its own alone."""
    try:
        if "recipe" in header:
            return parse_json(header["recipe"])
        return parse_json((out / RECIPE).read_text("utf-8"))["recipe"]
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise DataFileError(
            f"{out / STATE}: damaged (no recipe); remove it to start again"
        ) from problem


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two recipes, as JSON values, for a message."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        found = [_changes(before.get(key), now.get(key), f"{name}.{key}") for key in keys]
        return [one for some in found for one in some]
    if isinstance(before, list | dict) or isinstance(now, list | dict):
        return [f"other {name.strip('.')}"]
    return [f"{name.strip('.')} is {before!r:.40}, not {now!r:.40}"]


def write_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    header: Mapping[str, str],
) -> None:
    """Write the weights that optimizers train, and what the optimizers keep of each.

    Raises:
        WriteError: The disk is full, or the folder cannot be written to.
    """
    tensors: dict[str, torch.Tensor] = {}
    for optimizer, name, parameter in _parameters(model, optimizers):
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=with_digest(header, tensors))


def state_header(path: Path) -> dict[str, str]:
    """What `write_state` wrote beside the tensors; DataFileError if the file is damaged."""
    refuse_folder(path, DataFileError)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as problem:
        raise DataFileError(f"{path}: damaged ({problem}); remove it to start again") from problem


def read_state(
    path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: str = "cpu"
) -> None:
    """Restore the weights and the optimizers; `device` is where optimizers count their steps.

    Raises:
        CheckpointMismatch: If the state is of another shape.
        DataFileError: If the state is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            check_digest(file)
        with safe_open(path, framework="pt", device=device) as file:
            keys = set(file.keys())
            for optimizer, name, parameter in _parameters(model, optimizers):
                if f"weight.{name}" not in keys:
                    raise CheckpointMismatch(f"{path} has no weights for {name}.")
                weight = file.get_tensor(f"weight.{name}")
                if weight.shape != parameter.shape:
                    raise CheckpointMismatch(
                        f"{path}: {name} has shape {tuple(weight.shape)}, the recipe needs "
                        f"{tuple(parameter.shape)}."
                    )
                wanted = ("momentum",) if isinstance(optimizer, Muon) else ADAM
                # A weight that no loss has reached has no state yet.
                reached = any(f"{key}.{name}" in keys for key in wanted)
                state = {key: file.get_tensor(f"{key}.{name}") for key in wanted if reached}
                for key, tensor in {"weight": weight, **state}.items():
                    _check(key, name, tensor, parameter)
                parameter.data.copy_(weight)
                for key, tensor in state.items():
                    if key != "step":
                        state[key] = tensor.to(parameter.device)
                optimizer.state[parameter] = state
    except CheckpointMismatch:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise DataFileError(f"{path}: damaged ({problem}); remove it to start again") from problem


def _check(key: str, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    step = key == "step"
    shape, dtype = ((), torch.float32) if step else (parameter.shape, parameter.dtype)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{key} of {name} has another shape or type")
    least = 0.0 if key in ("step", "exp_avg_sq") else -math.inf
    if not bool((tensor.isfinite() & (tensor >= least)).all()):
        raise ValueError(f"{key} of {name} is not finite, or negative")


def _parameters(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[tuple[torch.optim.Optimizer, str, torch.Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, names[id(parameter)], parameter
