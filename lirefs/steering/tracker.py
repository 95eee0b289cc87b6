"""Watches every forward pass of a model, to know where each of its tokens stands.

A forward hook inside a block cannot know this: under a cache it sees one token at a time. So one
hook on the module that owns the blocks reads what every forward pass is told (mask, position ids,
cache) and works out the absolute position of every token. Nothing is counted from call to call, so
beams that are reordered, caches that are cropped and prompts that come in chunks need no care.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import ScopeError
from lirefs.model.layout import Layout
from lirefs.model.prompts import PROMPT, Prompt, prompt_known
from lirefs.model.token_positions import Tokens


class Tracker:
    """Watches the forward passes of one model while a steering needs to know positions."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = weakref.ref(model)
        self._listeners: list[Callable[[Tokens], None]] = []
        self._by_cache: weakref.WeakKeyDictionary[Any, Prompt] = weakref.WeakKeyDictionary()
        self._learned: Prompt | None = None
        owner, self._names = _owner(model, layout)
        self._hooks = [
            owner.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            owner.register_forward_hook(self._after),
        ]
        self._shadow_generate(model)

    def listen(self, listener: Callable[[Tokens], None]) -> Callable[[], None]:
        """Call `listener` before every forward pass; the result makes it stop."""
        self._listeners.append(listener)

        def stop() -> None:
            self._listeners.remove(listener)
            if not self._listeners:
                self._close()

        return stop

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        model = self._model()
        if model is not None:
            _TRACKERS.pop(model, None)
            model.__dict__.pop("generate", None)
            if self._own_generate is not None:
                model.__dict__["generate"] = self._own_generate

    def _shadow_generate(self, model: nn.Module) -> None:
        """Let `generate` say where the prompt ends, for as long as this tracker lives.

        The name is shadowed on this one object and uncovered again; with chunks, no cache or
        candidate tokens of an assistant, a forward pass alone does not show it.
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

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        source = _source(given)
        if source is None:
            raise ScopeError("the forward pass has neither input_ids nor inputs_embeds")
        rows, width = source.shape[:2]
        cache: Any = given.get("past_key_values")
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if isinstance(past, Tensor):
            past = past.clone()  # a static cache goes on counting in place
        position = _positions(given, rows, width, past, source.device)
        prompt = PROMPT.get()
        fresh = None
        if prompt is None and not bool(past):
            fresh = prompt = Prompt(position.amax(dim=1) + 1, explicit=False)
            if cache is not None:
                self._by_cache[cache] = fresh
        elif prompt is None:
            prompt = self._by_cache.get(cache)
        self._learned = fresh
        tokens = Tokens(position, past, prompt, begins=fresh is not None)
        for listener in self._listeners:
            listener(tokens)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A model that was given no cache has made one.
        cache = getattr(output, "past_key_values", None)
        if self._learned is not None and hasattr(cache, "get_seq_length"):
            self._by_cache[cache] = self._learned


def _owner(model: nn.Module, layout: Layout) -> tuple[nn.Module, list[str]]:
    """The module that owns the blocks, and the names of what it is called with."""
    owner = model.get_submodule(layout.blocks.rpartition(".")[0])
    return owner, list(inspect.signature(owner.forward).parameters)


def refuse_empty(model: nn.Module, layout: Layout) -> Callable[[], None]:
    """Let every forward pass of an empty batch end with a named error, before a block runs.

    Returns:
        A function that takes this off again.
    """
    owner, names = _owner(model, layout)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _source(dict(zip(names, args, strict=False)) | kwargs)

    return owner.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove


_TRACKERS: weakref.WeakKeyDictionary[nn.Module, Tracker] = weakref.WeakKeyDictionary()


def tracker_of(model: nn.Module, layout: Layout) -> Tracker:
    """The tracker of a model, shared by all steerings on it; gone with its last listener."""
    if model not in _TRACKERS:
        _TRACKERS[model] = Tracker(model, layout)
    return _TRACKERS[model]


def _source(given: dict[str, Any]) -> Tensor | None:
    """What a forward pass reads, (rows, tokens, ...), None where it is not found.

    Raises:
        ScopeError: The batch is empty.
    """
    source = given.get("inputs_embeds")
    source = given.get("input_ids") if source is None else source
    return _not_empty(source) if isinstance(source, Tensor) else None


def _not_empty(batch: Tensor) -> Tensor:
    if not batch.shape[0] or not batch.shape[1]:
        raise ScopeError(f"the batch is empty: its shape is {tuple(batch.shape)}")
    return batch


def _positions(
    given: dict[str, Any], rows: int, width: int, past: int | Tensor, device: torch.device
) -> Tensor:
    """Index of each token in its unpadded row, (rows, width); -1 for padding that is known."""
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask != 0
        position = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        start = mask.shape[1] - width
        if start and start != past:  # a mask as long as a static cache
            start = min(int(past), start)
        return position[:, start : start + width]
    if isinstance(ids, Tensor) and ids.dim() == 2:
        # `generate` under a static cache: the mask is made up already, these know the padding.
        # Padding may stand at position 0 here, which is harmless, because nobody attends to it.
        return ids.expand(rows, width)
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        return (seen.sum(dim=-1) - 1).expand(rows, width)
    return (torch.arange(width, device=device) + past).expand(rows, width)


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """The prompt of a call of `generate`."""
    inputs = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
    source = next((one for one in [*inputs, *args[:1]] if isinstance(one, Tensor)), None)
    if source is None:  # generation from nothing: one token, the beginning of a text
        return Prompt(torch.ones(1, dtype=torch.long), width=1)
    _not_empty(source)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # Longer than the inputs where a cache holds the beginning.
        real = mask != 0
        lengths = real.sum(dim=1)
        position = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        return Prompt(lengths, width=mask.shape[1], ages=position - lengths.unsqueeze(1))
    lengths = torch.full((source.shape[0],), source.shape[1], device=source.device)
    return Prompt(lengths, width=source.shape[1])
