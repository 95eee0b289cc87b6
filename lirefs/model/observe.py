"""One forward pass, and what went into and came out of some modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import LayoutError, first_line
from lirefs.model.guest import accepts, evaluating, input_device, maybe_call, text_config


def in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, deaf to what other threads run on the same modules."""
    thread = threading.get_ident()

    def heard(*given: Any) -> None:
        if threading.get_ident() == thread:
            hook(*given)

    return heard


@dataclass
class Seen:
    """What went into and came out of one module; None where it was no tensor."""

    input: Tensor | None = None
    output: Tensor | None = None


def observe(model: nn.Module, watched: Mapping[str, nn.Module]) -> dict[str, Seen]:
    """Run ``model`` once on a few tokens and return copies, on the CPU, of what was seen."""
    seen = {name: Seen() for name in watched}
    device = input_device(model)
    vocabulary = getattr(maybe_call(model, "get_input_embeddings"), "num_embeddings", 0)
    vocabulary = vocabulary or getattr(text_config(model), "vocab_size", 0) or 8
    # From the middle of the vocabulary, away from the padding and special tokens at its ends.
    ids = (torch.arange(6, device=device).unsqueeze(0) * 3 + vocabulary // 2) % vocabulary
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(evaluating(model))
        for name, module in watched.items():
            before, after = map(in_this_thread, _watchers(seen[name]))
            handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(after).remove)
        try:
            model(input_ids=ids, **extra)
        except Exception as problem:
            raise LayoutError(
                f"a forward pass of {type(model).__name__} on {ids.shape[1]} tokens failed: "
                f"{type(problem).__name__}: {first_line(problem)}"
            ) from problem
    return seen


def _watchers(record: Seen) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the two hooks that fill ``record`` at the first call of a module.

    Values are cloned at once, because some models go on to change them in place (Falcon).
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("hidden_states")
        if isinstance(value, Tensor) and record.input is None:
            record.input = value.detach().clone().cpu()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(value, Tensor) and record.output is None and not _is_vocabulary(module):
            record.output = value.detach().clone().cpu()

    return before, after


def _is_vocabulary(module: nn.Module) -> bool:
    """Return whether the output is as wide as a vocabulary, and so not worth a copy."""
    return getattr(module, "out_features", 0) > 1 << 16
