"""Model and training state on disk: safetensors and JSON, each file moved into place whole."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.errors import DataFileError, LirefsError
from lirefs.files import atomic_path, atomic_write_text, usual_permissions, write_errors
from lirefs.organism.training.muon import Muon

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
    held = model.config.dtype
    with write_errors(out), tempfile.TemporaryDirectory(dir=out, prefix=".model-") as folder:
        tensors = {
            k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()
        }
        tensors.pop("lm_head.weight", None)  # tied to the embedding
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtype
        try:
            model.config.save_pretrained(folder)
        finally:
            model.config.dtype = held
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        usual_permissions(Path(folder))
        # Without its configuration a folder is no model, so that comes last.
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
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for optimizer, parameter in _parameters(optimizers):
        name = names[id(parameter)]
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    # The step travels in the tensor file, so that step and tensors can never disagree.
    with atomic_path(out / STATE) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "seed": str(seed)})
    atomic_write_text(
        out / RECIPE, json.dumps({"step": step, "seed": seed, "recipe": recipe}, indent=2)
    )


def load_checkpoint(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    seed: int,
    device: str,
) -> int:
    """Restore model and optimizer from a folder.

    Returns:
        UndoStack already done; 0 if the folder holds no training state.

    Raises:
        CheckpointMismatch: If the state is of another seed or shape.
        DataFileError: If the state is damaged.
    """
    if not (out / STATE).exists():
        return 0
    try:
        return _restore(out, model, optimizers, seed, device)
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        if isinstance(problem, CheckpointMismatch):
            raise
        raise DataFileError(
            f"{out / STATE}: damaged ({problem}); remove it to begin anew"
        ) from problem


def _restore(
    out: Path,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    seed: int,
    device: str,
) -> int:
    """As `load_checkpoint`; what is damaged raises what it happens to raise."""
    names = {id(p): name for name, p in model.named_parameters()}
    with safe_open(out / STATE, framework="pt", device=device) as file:
        metadata, keys = file.metadata() or {}, set(file.keys())
        if metadata["seed"] != str(seed):
            raise CheckpointMismatch(
                f"{out / STATE} was trained with seed {metadata['seed']:.40}, not {seed}: "
                "choose another folder or the same seed."
            )
        if not re.fullmatch("[0-9]{1,12}", metadata["step"]):
            raise ValueError(f"its step is {metadata['step']!r:.40}")
        for optimizer, parameter in _parameters(optimizers):
            name = names[id(parameter)]
            if f"weight.{name}" not in keys:
                raise CheckpointMismatch(f"{out / STATE} has no weights for {name}.")
            weight = file.get_tensor(f"weight.{name}")
            if weight.shape != parameter.shape:
                raise CheckpointMismatch(
                    f"{out / STATE}: {name} has shape {tuple(weight.shape)}, "
                    f"the recipe wants {tuple(parameter.shape)}."
                )
            held = ("momentum",) if isinstance(optimizer, Muon) else ADAM
            state = {key: file.get_tensor(f"{key}.{name}") for key in held}
            for key, tensor in {"weight": weight, **state}.items():
                shape = () if key == "step" else parameter.shape
                if tensor.shape != shape or tensor.dtype != torch.float32:
                    raise ValueError(f"{key} of {name} has another shape or type")
                least = 0.0 if key in ("step", "exp_avg_sq") else -math.inf
                if not bool((tensor.isfinite() & (tensor >= least)).all()):
                    raise ValueError(f"{key} of {name} is not finite, or negative")
            parameter.data.copy_(weight)
            optimizer.state[parameter] = state
        return int(metadata["step"])


def _parameters(
    optimizers: Sequence[torch.optim.Optimizer],
) -> Iterator[tuple[torch.optim.Optimizer, torch.Tensor]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, parameter
