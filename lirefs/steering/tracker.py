"""Watches every forward pass of a model, to know the position of each of its tokens.

A hook inside a block cannot know it: under a cache it sees one token at a time. So one hook on the
module that owns the blocks reads what each forward pass is given (mask, position ids, cache) and
derives the absolute positions. Nothing is counted from call to call, so reordered beams, cropped
caches and prompts in chunks need no special care.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lirefs.errors import ScopeError
from lirefs.model.layout import Layout
from lirefs.model.prompts import PROMPT, Prompt, prompt_known
from lirefs.model.token_positions import Tokens


class Tracker:
    """Watches the forward passes of one model, as long as a steering needs positions."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = weakref.ref(model)
        self._listeners: list[Callable[[Tokens], None]] = []
        self._by_cache: weakref.WeakKeyDictionary[Any, Prompt] = weakref.WeakKeyDictionary()
        self._begun: Prompt | None = None
        owner = _owner(model, layout)
        self._hooks = [_on_forward(owner, self._before), owner.register_forward_hook(self._after)]
        self._shadow_generate(model)

    def listen(self, listener: Callable[[Tokens], None]) -> Callable[[], None]:
        """Call `listener` before every forward pass, until the function returned is called."""
        self._listeners.append(listener)

        def stop() -> None:
            self._listeners.remove(listener)
            model = self._model()
            if self._listeners or model is None:
                return
            for hook in self._hooks:
                hook.remove()
            _TRACKERS.pop(model, None)
            model.__dict__.pop("generate", None)
            if self._own_generate is not None:
                model.__dict__["generate"] = self._own_generate

        return stop

    def _shadow_generate(self, model: nn.Module) -> None:
        """Let `generate` announce where the prompt ends: shadow it on this one object.

        A forward pass does not show it under chunks, without a cache, or with an assistant.
        """
        original: Any = getattr(model, "generate", None)
        self._own_generate = model.__dict__.get("generate")
        if original is None:
            return

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if PROMPT.get() is not None:
                return original(*args, **kwargs)
            with prompt_known(_prompt_of(args, kwargs)):
                return original(*args, **kwargs)

        model.__dict__["generate"] = generate

    def _before(self, given: dict[str, Any]) -> None:
        source = _source(given)
        if source is None:
            raise ScopeError("the forward pass has neither input_ids nor inputs_embeds")
        rows, width = source.shape[:2]
        cache: Any = given.get("past_key_values")
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if isinstance(past, Tensor):
            past = past.clone()  # a static cache keeps counting in place
        position = _positions(given, rows, width, past, source.device)
        prompt = PROMPT.get()
        fresh = None
        if prompt is None and not bool(past):
            fresh = prompt = Prompt(position.amax(dim=1) + 1, explicit=False)
            if cache is not None:
                self._by_cache[cache] = fresh
        elif prompt is None:
            prompt = self._by_cache.get(cache)
        self._begun = fresh
        tokens = Tokens(position, past, prompt, begins=fresh is not None)
        for listener in self._listeners:
            listener(tokens)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A model that was given no cache has made one.
        cache = getattr(output, "past_key_values", None)
        if self._begun is not None and hasattr(cache, "get_seq_length"):
            self._by_cache[cache] = self._begun


def _owner(model: nn.Module, layout: Layout) -> nn.Module:
    """The innermost module around the blocks whose forward pass takes token ids."""
    path = layout.blocks
    while path := path.rpartition(".")[0]:
        owner = model.get_submodule(path)
        if "input_ids" in inspect.signature(owner.forward).parameters:
            return owner
    return model


def _on_forward(owner: nn.Module, action: Callable[[dict[str, Any]], object]) -> RemovableHandle:
    """Before every forward pass of a module, give `action` its arguments by name."""
    names = list(inspect.signature(owner.forward).parameters)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        action(dict(zip(names, args, strict=False)) | kwargs)

    return owner.register_forward_pre_hook(before, with_kwargs=True, prepend=True)


def refuse_empty_batch(model: nn.Module, layout: Layout) -> Callable[[], None]:
    """Let an empty batch end every forward pass in a `ScopeError`, until the result is called."""
    return _on_forward(_owner(model, layout), _source).remove


_TRACKERS: weakref.WeakKeyDictionary[nn.Module, Tracker] = weakref.WeakKeyDictionary()


def tracker_of(model: nn.Module, layout: Layout) -> Tracker:
    """The tracker of a model, shared by all its steerings; it goes with its last listener."""
    if model not in _TRACKERS:
        _TRACKERS[model] = Tracker(model, layout)
    return _TRACKERS[model]


def _source(given: dict[str, Any], *names: str) -> Tensor | None:
    """What a call reads, (rows, tokens, ...), or None; ScopeError if the batch is empty."""
    found = (given.get(name) for name in ("inputs_embeds", "input_ids", *names))
    source = next((one for one in found if isinstance(one, Tensor)), None)
    if source is not None and not (source.shape[0] and source.shape[1]):
        raise ScopeError(f"the batch is empty: its shape is {tuple(source.shape)}")
    return source


def _positions(
    given: dict[str, Any], rows: int, width: int, past: int | Tensor, device: torch.device
) -> Tensor:
    """Index of each token in its unpadded row, (rows, width); -1 for padding that is known."""
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        position = _numbered(mask)
        start = mask.shape[1] - width
        if start and start != past:  # a mask as long as a static cache
            start = min(int(past), start)
        return position[:, start : start + width]
    if isinstance(ids, Tensor) and ids.dim() == 2:
        # `generate` under a static cache: its mask has four axes, but these know the padding, which
        # may have position 0 here. That is harmless, as no token attends to it.
        return ids.expand(rows, width)
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        return (seen.sum(dim=-1) - 1).expand(rows, width)
    return (torch.arange(width, device=device) + past).expand(rows, width)


def _numbered(mask: Tensor) -> Tensor:
    """Index of each real token in its row, -1 for padding: the shape of the mask."""
    real = mask != 0
    return (real.cumsum(dim=1) - 1).masked_fill(~real, -1)


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """The prompt of a call of `generate`."""
    source = _source(kwargs | dict(zip(["first"], args, strict=False)), "inputs", "first")
    if source is None:  # generation from nothing: one token, the beginning of a text
        return Prompt(torch.ones(1, dtype=torch.long), width=1)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        position = _numbered(mask)  # longer than the inputs where a cache holds the beginning
        lengths = position.amax(dim=1) + 1
        return Prompt(lengths, width=mask.shape[1], ages=position - lengths.unsqueeze(1))
    lengths = torch.full((source.shape[0],), source.shape[1], device=source.device)
    return Prompt(lengths, width=source.shape[1])
