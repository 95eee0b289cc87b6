"""A model as a guest: read its hidden states, run it and watch, leave it as it was."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import LayoutError, first_line


def hidden_of(output: Any, batch: int | None = None) -> Tensor:
    """Return the hidden states in what a module returned.

    Args:
        output: A tensor, or a tuple or list that begins with one (Bloom, Falcon).
        batch: Where given, a flattened ``(batch * tokens, width)`` is returned with three axes.

    Returns:
        ``(batch, tokens, width)``; a view, not a copy.

    Raises:
        LayoutError: There is no tensor where one is expected.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise LayoutError(f"expected a tensor of hidden states, found {type(hidden).__name__}")
    if batch is not None and hidden.dim() == 2:
        return hidden.view(batch, -1, hidden.shape[-1])
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` rebuilt around ``hidden``, in the shape and the container it came in."""
    shaped = hidden.reshape(hidden_of(output).shape)
    if isinstance(output, tuple | list):
        return type(output)([shaped, *output[1:]])
    return shaped


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states with which a module was called, ``(batch, tokens, width)``.

    Args:
        args: Positional arguments, from a forward pre-hook.
        kwargs: Keyword arguments; read only where there are no positional ones.

    Raises:
        LayoutError: Neither holds hidden states.
    """
    return hidden_of(args[0] if args else kwargs.get("hidden_states"))


def with_hidden_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with ``hidden`` in the place of its hidden states."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}


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
