"""Watches every forward pass of a steered model, to know the position of each of its tokens.

A hook inside a block cannot know it: under a cache it sees one token at a time. So one hook on the
module that owns the blocks reads what each forward pass is given (mask, position ids, cache) and
derives the absolute positions. Only a cache that does not say how many tokens it holds is counted
from pass to pass; so reordered beams, cropped caches and prompts in chunks need no special care.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lirefs.errors import InterventionError, ScopeError
from lirefs.model.layout import Layout
from lirefs.model.prompts import PROMPT, Prompt, prompt_known
from lirefs.model.token_positions import (
    Cached,
    Tokens,
    anchor_of,
    cache_of,
    prompt_columns,
    read_tokens,
)
from lirefs.model.traits import PROBING
from lirefs.steering.hook_chain import NotCopied, refuse_copy
from lirefs.steering.recompute import Checkpoints
from lirefs.steering.token_mask import TokenMask

_MANAGER = "_cached_continuous_batching_manager"


class Tracker(NotCopied):
    """Watches the forward passes of one model, as long as it is steered.

    It refuses empty batches, tells every `TokenMask` the tokens of the pass that begins, and lets
    activation checkpoints be recomputed under the steering of their own forward pass.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        if _MANAGER in model.__dict__:
            raise InterventionError(
                "a persistent manager of continuous batching keeps states and graphs of this model "
                "without the steering; call model.destroy_cached_continuous_batching_manager()"
            )
        owner = layout.owner(model)
        self._model = weakref.ref(model)
        self._steerings = 0
        self._shadowed = False
        # For each shadow: itself, and what was in its place.
        self._shadows: dict[str, tuple[Any, Any]] = {}
        self._masks: list[TokenMask] = []
        self._caches: Any = WeakIdKeyDictionary()  # to what is known of each
        self._begun: tuple[Tokens, Any] | None = None
        self._names = list(inspect.signature(owner.forward).parameters)
        blocks = model.get_submodule(layout.blocks).children()
        self._checkpoints = Checkpoints(owner, [owner, *blocks], self._masks)
        self._hooks = [
            owner.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            owner.register_forward_hook(self._after),
        ]

    def watch(self, mask: TokenMask | None) -> Callable[[], None]:
        """Watch for one more steering, with or without a mask, until the result is called."""
        self._steerings += 1
        if mask is not None:
            self._masks.append(mask)
            self._shadow()

        def stop() -> None:
            self._steerings -= 1
            if mask is not None:
                self._masks.remove(mask)
                self._shadow()
            if not self._steerings:
                for hook in self._hooks:
                    hook.remove()
                self._checkpoints.end()
                model: Any = self._model()
                _TRACKERS.pop(model, None)
                if _MANAGER in getattr(model, "__dict__", {}):  # it keeps steered states
                    model.destroy_cached_continuous_batching_manager()

        return stop

    def _shadow(self) -> None:
        """While there are masks, let `generate` of this one object say where the prompt ends.

        A forward pass does not show it under chunks, without a cache, or with an assistant. What
        the user puts in the place of a shadow, or removes there, is left as it is.
        """
        if self._shadowed == bool(self._masks) or (model := self._model()) is None:
            return
        self._shadowed = bool(self._masks)
        if self._shadowed:
            for name, made in (
                ("generate", _announcing),
                ("init_continuous_batching", self._checking),
                # For `copy.copy`, whose copy would keep this object's `generate`.
                ("__getstate__", lambda original: refuse_copy),
            ):
                if (original := getattr(model, name, None)) is not None:
                    shadow = made(original)
                    self._shadows[name] = (shadow, model.__dict__.get(name))
                    model.__dict__[name] = shadow
            return
        for name, (shadow, own) in self._shadows.items():
            if model.__dict__.get(name) is shadow:
                del model.__dict__[name]
                if own is not None:
                    model.__dict__[name] = own
        self._shadows = {}

    def _checking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Continuous batching, which packs many texts into a row, where few masks can act."""

        @functools.wraps(original)
        def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
            if not all(mask.packable for mask in self._masks):
                raise ScopeError(
                    "continuous batching packs several texts into one row, where prompts, rows and "
                    "generated tokens cannot be told apart; call generate"
                )
            return original(*args, **kwargs)

        return init_continuous_batching

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if PROBING.get():
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        source = _source(given)
        if self._masks:
            if source is None:
                raise ScopeError("the forward pass has neither input_ids nor inputs_embeds")
            anchor = anchor_of(cache_of(given))
            known = None if anchor is None else self._caches.get(anchor)
            tokens = read_tokens(given, source, known, PROMPT.get())
            self._begun = None if tokens.packed else (tokens, anchor)
            for mask in self._masks:
                mask.prepare(tokens)
        self._checkpoints.begin()

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if PROBING.get():
            return
        self._checkpoints.watch_backward(output)
        if self._begun is None:
            return
        tokens, anchor = self._begun
        self._begun = None
        if anchor is None and isinstance(output, Mapping):  # the model has made a cache
            anchor = anchor_of(cache_of(output))
        if anchor is not None:
            prompt = None if PROMPT.get() is not None else tokens.known_prompt
            columns = tokens.past + tokens.position.shape[1]
            self._caches[anchor] = Cached(prompt, columns, tokens.position)


def _announcing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, which says where the prompt ends."""

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if PROMPT.get() is not None:
            return original(*args, **kwargs)
        with prompt_known(_prompt_of(args, kwargs)):
            return original(*args, **kwargs)

    return generate


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """The prompt of a call of `generate`."""
    source = _source(kwargs | dict(zip(["first"], args, strict=False)), "inputs", "first")
    if source is None:  # generation from nothing: one token, the beginning of a text
        return Prompt(torch.ones(1, dtype=torch.long), width=1)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # Longer than the inputs where a cache holds the beginning.
        lengths, ages = prompt_columns(mask)
        return Prompt(lengths, width=mask.shape[1], ages=ages)
    lengths = torch.full((source.shape[0],), source.shape[1], device=source.device)
    return Prompt(lengths, width=source.shape[1])


def _source(given: Mapping[str, Any], *names: str) -> Tensor | None:
    """What a call reads, (rows, tokens, ...), or None; ScopeError if the batch is empty."""
    found = (given.get(name) for name in ("inputs_embeds", "input_ids", *names))
    source = next((one for one in found if isinstance(one, Tensor)), None)
    if source is not None and not (source.shape[0] and source.shape[1]):
        raise ScopeError(f"the batch is empty: its shape is {tuple(source.shape)}")
    return source


_TRACKERS: weakref.WeakKeyDictionary[nn.Module, Tracker] = weakref.WeakKeyDictionary()


def tracker_of(model: nn.Module, layout: Layout) -> Tracker:
    """The tracker of a model, shared by all its steerings; it goes with the last one."""
    if model not in _TRACKERS:
        _TRACKERS[model] = Tracker(model, layout)
    return _TRACKERS[model]
