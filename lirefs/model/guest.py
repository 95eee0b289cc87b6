"""A model as a guest: read its hidden states, run it and watch, leave it as it was."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in evaluation mode without gradients; give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def accepts(model: nn.Module, name: str) -> bool:
    """Return whether the forward method of ``model`` has a parameter called ``name``."""
    inner = getattr(model, "get_base_model", lambda: model)()  # PEFT hides it behind **kwargs
    return name in inspect.signature(inner.forward).parameters


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which ``model`` expects its token ids."""
    embedding = maybe_call(model, "get_input_embeddings")
    hook = getattr(embedding, "_hf_hook", None)  # accelerate: an offloaded weight lies on "meta"
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(getattr(hook, "execution_device"))  # noqa: B009 (untyped)
    source = embedding if isinstance(embedding, nn.Module) else model
    tensor = next(itertools.chain(source.parameters(), source.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language part, or None without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def maybe_call(model: nn.Module, method: str) -> Any:
    """Return what a method of ``transformers`` models returns, None where there is none."""
    function = getattr(model, method, None)
    try:
        return None if function is None else function()
    except (NotImplementedError, AttributeError):
        return None


@contextmanager
def as_guest(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and switch to evaluation mode; restore both, whatever happens.

    Activation checkpointing of transformers, which works in training mode only, is kept on.
    Float32 matrix products are computed in float32: TF32 has 10 bits of mantissa, which turns the
    flat end of a spectrum into noise.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            model.eval()
            stack.enter_context(_without_tf32())
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False) is True:
                    stack.enter_context(_checkpointed(module))
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            stack.close()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off: what the caller has set must not round sums and products."""
    with torch.autocast(device.type, enabled=False), _without_tf32():
        yield


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: half precision is for storage, not for arithmetic."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _checkpointed(module: nn.Module) -> Iterator[None]:
    """Let a checkpointing layer of transformers checkpoint, with its inside in evaluation mode.

    The layer checkpoints only if its own `training` flag is set; inside, the flag would switch
    dropout on. Re-entrant checkpoints would cut the graph, as no input requires a gradient.
    """
    name = "_gradient_checkpointing_func"
    own = module.__dict__.get(name)
    if own is None:
        yield
        return
    module.training = True
    setattr(module, name, partial(_run_checkpointed, module))
    try:
        yield
    finally:
        setattr(module, name, own)


def _run_checkpointed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    def inside(*inputs: Any) -> Any:
        module.training = False
        try:
            return function(*inputs)
        finally:
            module.training = True

    return checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a new switch, and refuses to read the old one once the new one was used.
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, "ieee" if name == "fp32_precision" else False)
    try:
        yield
    finally:
        setattr(matmul, name, before)
