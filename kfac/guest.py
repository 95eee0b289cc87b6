"""The rules of a guest in a user's model: what is changed for a collection is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
