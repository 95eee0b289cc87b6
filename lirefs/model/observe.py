"""Read and replace hidden states in what modules take and return; watch a model run once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import LayoutError, first_line_of_error
from lirefs.model.guest import accepts, eagerly, evaluating, input_device, maybe_call, text_config
from lirefs.model.interrupts import interrupts_held, undone

TOKENS = 6
"""Length of the text on which a model is observed."""


def in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, restricted to forward passes of the thread that calls this function."""
    thread = threading.get_ident()

    def restricted(*given: Any) -> None:
        if threading.get_ident() == thread:
            hook(*given)

    return restricted


@dataclass
class Seen:
    """First input and output of a module on the CPU, None where it was not a tensor.

    Cloned at once: some models change them in place afterwards (Falcon). What else it took and
    returned is kept as it is, and how often it ran.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    also_took: tuple[Any, ...] = ()
    also_gave: tuple[Any, ...] = ()
    runs: int = 0

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook that keeps the input."""
        value = args[0] if args else kwargs.get("hidden_states")
        if isinstance(value, Tensor) and self.input is None:
            self.input = value.detach().clone().cpu()
            self.also_took = (*args[1:], *kwargs.values())

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook that keeps the output, unless it is as wide as a vocabulary."""
        self.runs += 1
        value = output[0] if isinstance(output, tuple | list) and output else output
        wide = (getattr(module, "out_features", 0) or 0) > 1 << 16
        if isinstance(value, Tensor) and self.output is None and not wide:
            self.output = value.detach().clone().cpu()
            self.also_gave = tuple(output[1:]) if value is not output else ()


def sample_ids(model: nn.Module, rows: int, tokens: int) -> Tensor:
    """Token ids to try a model on, (rows, tokens), from the middle of its vocabulary.

    The ends of a vocabulary hold padding and special tokens.
    """
    vocabulary = getattr(maybe_call(model, "get_input_embeddings"), "num_embeddings", 0)
    vocabulary = vocabulary or getattr(text_config(model), "vocab_size", 0) or 8
    ids = torch.arange(rows * tokens, device=input_device(model)).view(rows, tokens)
    return (ids * 3 + vocabulary // 2) % vocabulary


def observe(model: nn.Module, watched: Mapping[str, nn.Module]) -> dict[str, Seen]:
    """Run ``model`` once on `TOKENS` tokens; return what each watched module took and gave."""
    seen = {name: Seen() for name in watched}
    ids = sample_ids(model, 1, TOKENS)
    extra = {"use_cache": False} if accepts(model, "use_cache") else {}
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with (
        torch.random.fork_rng(devices=cuda),
        evaluating(model),
        eagerly(),
        undone() as steps,
    ):
        with interrupts_held():
            for name, module in watched.items():
                before, after = in_this_thread(seen[name].before), in_this_thread(seen[name].after)
                handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                steps.append(handle.remove)
                steps.append(module.register_forward_hook(after).remove)
        try:
            model(input_ids=ids, **extra)
        except Exception as problem:
            raise LayoutError(
                f"a forward pass of {type(model).__name__} on {ids.shape[1]} tokens failed: "
                f"{type(problem).__name__}: {first_line_of_error(problem)}"
            ) from problem
    return seen


def hidden_of(output: Any, batch: int | None = None) -> Tensor:
    """Return the hidden states in the output of a module, a view; LayoutError if there are none.

    With ``batch``, a flattened ``(batch * tokens, width)`` becomes ``(batch, tokens, width)``.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, Tensor):
        raise LayoutError(f"expected a tensor of hidden states, found {type(hidden).__name__}")
    if batch is not None and hidden.dim() == 2:
        return hidden.view(batch, -1, hidden.shape[-1])
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` with its hidden states replaced; shape and container stay the same."""
    shaped = hidden.reshape(hidden_of(output).shape)
    return type(output)([shaped, *output[1:]]) if isinstance(output, tuple | list) else shaped


def hidden_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states in the arguments that a forward pre-hook gets."""
    return hidden_of(args[0] if args else kwargs.get("hidden_states"))


def with_hidden_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with their hidden states replaced."""
    if args:
        return (hidden, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": hidden}
