"""Where each token of a forward pass stands in its text, and where the prompt ends.

A forward hook inside a block cannot know this: under a cache it sees one token at a time. So one
hook on the module that owns the blocks reads what every forward pass is told (mask, position ids,
cache) and works out the absolute position of every token. Nothing is counted from call to call, so
beams that are reordered, caches that are cropped and prompts that come in chunks need no care.

Where the prompt ends cannot be read off a forward pass in general. `generate` knows it, so it is
told from there; a forward pass with an empty cache is a prompt; for anything else `prompt_lengths`
says it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import ScopeError
from lirefs.layout import Layout
from lirefs.scope import for_rows


class Prompt:
    """What is known of the prompt while one batch is processed.

    Attributes:
        lengths: Tokens of each prompt, padding not counted, (items,).
        width: For `generate`: columns of the prompt, padding counted; None elsewhere. There, all
            rows of the batch begin to generate in the same column.
        ages: For `generate` with a mask: index among the generated tokens of each column of the
            prompt, (items, width), so -1 for the last token and -1 - length for padding.
        decisions: What the gates decided for each row, by the attached steering (held weakly:
            another one may come to its address).
        checked: Those whose scopes were compared with the lengths already.
        explicit: Whether somebody said where it ends.
    """

    def __init__(
        self,
        lengths: Tensor,
        width: int | None = None,
        explicit: bool = True,
        ages: Tensor | None = None,
    ) -> None:
        self.lengths = lengths
        self.width = width
        self.explicit = explicit
        self.ages = ages
        self.decisions: weakref.WeakKeyDictionary[object, Tensor] = weakref.WeakKeyDictionary()
        self.checked: weakref.WeakSet[object] = weakref.WeakSet()

    def select(self, rows: Tensor) -> Prompt:
        """What is known after the rows of the batch were picked anew, (rows,) indices."""
        rows = rows.to(self.lengths.device)
        ages = None if self.ages is None else self.ages[rows]
        picked = Prompt(self.lengths[rows], self.width, self.explicit, ages)
        for gate, decided in self.decisions.items():
            picked.decisions[gate] = decided[rows.to(decided.device)]
        return picked


_PROMPT: ContextVar[Prompt | None] = ContextVar("prompt", default=None)


@contextmanager
def prompt_lengths(lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Say where the prompt of each row ends, for every forward pass inside the `with`.

    It is needed for scopes that tell prompt from generated text (and for row gates) when the
    model is called by hand with text that holds both, or with a prompt in several pieces.
    `model.generate` needs no help; where both are given, this counts.

    Args:
        lengths: Tokens of the prompt of each row, padding not counted; one number for all rows.

    Yields:
        Nothing.

    Raises:
        ScopeError: There is no row, or a length is not a positive integer.
    """
    values = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    values = list(values) if isinstance(values, Sequence) else [values]
    if not values:
        raise ScopeError("prompt_lengths needs at least one row: the batch is empty")
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScopeError(f"the prompt length of row {row} must be a positive integer: {value}")
    with prompt_known(Prompt(torch.tensor(values))):
        yield


@contextmanager
def prompt_known(prompt: Prompt) -> Iterator[None]:
    """The same for a caller that keeps what is known, from one forward pass to the next."""
    token = _PROMPT.set(prompt)
    try:
        yield
    finally:
        _PROMPT.reset(token)


class Tokens:
    """The tokens of one forward pass (a `lirefs.scope.Where`).

    Attributes:
        position: Index of each token in its unpadded row, (rows, tokens), -1 for padding.
        known_prompt: What is known of the prompt, None for nothing.
    """

    def __init__(
        self, position: Tensor, past: int | Tensor, prompt: Prompt | None, begins: bool
    ) -> None:
        self.position = position
        self.known_prompt = prompt
        self._past = past
        self._begins = begins
        if prompt is not None and prompt.ages is not None:
            # Its mask knows the padding on either side, under any cache.
            self.position = self.age + self._lengths(prompt)

    @functools.cached_property
    def age(self) -> Tensor:
        """Index among the generated tokens, (rows or 1, tokens); negative inside the prompt."""
        prompt = self.prompt
        if prompt.width is None:
            return self.position - self._lengths(prompt)
        rows, width = self.position.shape
        columns = torch.arange(width, device=self.position.device) + self._past
        new = (columns - prompt.width).unsqueeze(0)
        if prompt.ages is None:
            return new
        prompt.ages = prompt.ages.to(self.position.device)
        old = for_rows(prompt.ages, rows)[:, columns.clamp(max=prompt.width - 1)]
        return torch.where(new < 0, old, new)

    def _lengths(self, prompt: Prompt) -> Tensor:
        """Tokens of the prompt of each row, (rows, 1)."""
        prompt.lengths = prompt.lengths.to(self.position.device)
        return for_rows(prompt.lengths, self.position.shape[0]).unsqueeze(1)

    @property
    def prompts(self) -> int | None:
        """How many prompts the rows belong to (beams share one), None where nobody said."""
        known = self.known_prompt
        if known is None:
            return None
        # One length without `generate` may have been said for all rows.
        alone = len(known.lengths) == 1 and known.width is None and len(self.position) > 1
        return None if alone else len(known.lengths)

    @functools.cached_property
    def prompt(self) -> Prompt:
        """What is known of the prompt.

        Raises:
            ScopeError: Nothing is.
        """
        known = self.known_prompt
        if known is None:
            raise ScopeError(
                "this forward pass continues a cache of which nobody said where its prompt ends; "
                "wrap the calls in lirefs.prompt_lengths([...])"
            )
        if not known.explicit and not self._begins and self.position.shape[1] > 1:
            raise ScopeError(
                "several tokens follow a cache, so they may be the rest of a prompt or generated "
                "text; wrap the calls in lirefs.prompt_lengths([...])"
            )
        return known


class Tracker:
    """Watches the forward passes of one model while a steering needs to know positions."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = weakref.ref(model)
        self._listeners: list[Callable[[Tokens], None]] = []
        self._by_cache: weakref.WeakKeyDictionary[Any, Prompt] = weakref.WeakKeyDictionary()
        self._learned: Prompt | None = None
        owner = model.get_submodule(layout.blocks.rpartition(".")[0])
        self._names = list(inspect.signature(owner.forward).parameters)
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
            if _PROMPT.get() is not None:
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
        prompt = _PROMPT.get()
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


def refuse_empty(model: nn.Module, layout: Layout) -> Callable[[], None]:
    """Let every forward pass of an empty batch end with a named error, before a block runs.

    Returns:
        A function that takes this off again.
    """
    owner = model.get_submodule(layout.blocks.rpartition(".")[0])
    names = list(inspect.signature(owner.forward).parameters)

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
    if not isinstance(source, Tensor):
        return None
    if not source.shape[0] or not source.shape[1]:
        raise ScopeError(f"the batch is empty: its shape is {tuple(source.shape)}")
    return source


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
    if not source.shape[0] or not source.shape[1]:
        raise ScopeError(f"the batch is empty: its shape is {tuple(source.shape)}")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # Longer than the inputs where a cache holds the beginning.
        real = mask != 0
        lengths = real.sum(dim=1)
        position = (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        return Prompt(lengths, width=mask.shape[1], ages=position - lengths.unsqueeze(1))
    lengths = torch.full((source.shape[0],), source.shape[1], device=source.device)
    return Prompt(lengths, width=source.shape[1])
