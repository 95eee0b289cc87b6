"""Model and training state on disk: safetensors and JSON, each file moved into place whole."""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.errors import DataFileError, LirefsError
from lirefs.files import atomic_path, atomic_write_text, usual_file_permissions, write_errors
from lirefs.model.untrusted.digest import check_digest, with_digest
from lirefs.organism.training.optimizers import Muon

STATE = "training.safetensors"
RECIPE = "training.json"
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
    save_model(out, model, tokenizer, torch.float32)
    # The step is stored with the tensors, so that the two can never disagree.
    write_state(out / STATE, model, optimizers, {"step": str(step), "seed": str(seed)})
    about = {"step": step, "seed": seed, "recipe": recipe}
    atomic_write_text(out / RECIPE, json.dumps(about, indent=2))


def load_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    seed: int,
    device: str,
) -> int:
    """Restore model and optimizers; the steps already done, 0 without a training state.

    Raises:
        CheckpointMismatch: If the state is of another seed or shape.
        DataFileError: If the state is damaged.
    """
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
    read_state(path, model, optimizers, device)
    return int(about["step"])


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
