"""Where the prompt of each row ends, and prompts that are put before others.

A forward pass alone does not show where a prompt ends in general. `generate` knows it, and reports
it here; a forward pass with an empty cache is a prompt; in every other case `prompt_lengths` must
say it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lirefs.errors import InterventionError, ScopeError, first_line_of_error, must_be
from lirefs.model.batching import special_tokens_around, token_ids
from lirefs.model.interrupts import note, undone
from lirefs.model.intervention import (
    Composable,
    Handle,
    UndoStack,
    attaching,
    reserve,
    steerings_of,
    steerings_on,
)

SHOWN = 60
"""Characters of a text that are shown of a `Prompted`."""


@dataclass(eq=False)
class Prompt:
    """What is known of the prompts of one batch."""

    # Tokens of each prompt without padding, (items,).
    lengths: Tensor
    # For `generate`: columns of the prompt, padding included; all rows generate from the next one.
    width: int | None = None
    # Whether the end of the prompt was given, and not derived from an empty cache.
    explicit: bool = True
    # For `generate` with a mask: index among the generated tokens of each column of the prompt,
    # (items, width), so -1 for the last token and -1 - length for padding.
    ages: Tensor | None = None
    # For a batch that may have dropped rows of a cache, of which a recurrent one says nothing:
    # position of each row's next token, (rows, 1).
    follows: Tensor | None = None
    # Decisions of the row gates by attached steering: weakly, as another may get its address.
    decisions: WeakKeyDictionary[object, Tensor] = field(
        default_factory=WeakKeyDictionary, init=False
    )
    # Scopes that were already compared with the lengths.
    checked: WeakSet[object] = field(default_factory=WeakSet, init=False)

    def select(self, rows: Tensor) -> Prompt:
        """The same for a batch made of some rows of this one, given by index, (rows,)."""
        rows = rows.to(self.lengths.device)
        ages = None if self.ages is None else self.ages[rows]
        picked = Prompt(self.lengths[rows], self.width, self.explicit, ages)
        for gate, decided in self.decisions.items():
            picked.decisions[gate] = decided[rows.to(decided.device)]
        return picked


PROMPT: ContextVar[Prompt | None] = ContextVar("prompt", default=None)


@contextmanager
def prompt_lengths(lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Say where the prompt of each row ends, for every forward pass inside the `with`.

    Scopes that tell prompt from generated text, and row gates, need it when you call the model
    yourself on text that holds both, or on a prompt in several pieces. `model.generate` does not
    need it; inside the `with`, these lengths count there as well.

    Args:
        lengths: Tokens of the prompt of each row, padding not counted; one number for all rows.

    Raises:
        ScopeError: No row, or a length is not a positive integer.
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
    """As `prompt_lengths`, for callers that keep a `Prompt` across forward passes."""
    with undone() as steps:
        steps.append(partial(PROMPT.set, PROMPT.get()))
        PROMPT.set(prompt)
        yield


def expand_to_rows(values: Tensor, rows: int, prompts: int | None = None) -> Tensor:
    """Repeat ``values``, (items, ...), for the rows of a batch: a beam search has several per item.

    There must be one item, or one for each of the ``prompts`` (None: unknown).
    """
    items = values.shape[0]
    if prompts is not None and items not in (1, prompts):
        raise ScopeError(
            f"made for {items} row(s), but the batch has {prompts} prompt(s); give one for each"
        )
    if items in (1, rows):
        return values.expand(rows, *values.shape[1:])
    if rows % items:
        raise ScopeError(f"made for {items} row(s), but the batch has {rows}")
    return values.repeat_interleave(rows // items, dim=0)


class Prompted(Composable):
    """Put a text before every prompt: what can be had by asking, with no change of the model.

    A variant like any other: while it is attached, `lirefs.compare` puts the text before each item,
    and `lm.generate` before each prompt. The text is context and is never scored. A perplexity is
    that of the same tokens of the same text, a recitation continues the same prefix, and the
    options of a question are the same, each after the text; the examples with which an item begins
    come after it. In scopes of a steering it belongs to the prompt. Activations (`lirefs.fit`) and
    curvature (`kfac.collect`) are read from texts as they are given, without it.

    A beginning-of-sequence token stays in front. Text and prompt are tokenized apart and nothing is
    put between them. End the text with the space or newline that it needs, but leave a space out if
    the tokenizer puts one before every text itself, as SentencePiece's and the organism's do.

    Args:
        prefix: The text, as it is.
        system: Instead of a prefix, a message of the system, written by the tokenizer's chat
            template. In a prompt that is itself a chat (`lm.chat`) it takes the place of the
            message that the template writes of its own accord.

    Raises:
        InterventionError: Neither or both are given, or the text is empty or not a string. When it
            is put before a prompt: the tokenizer has no chat template, or the template has no place
            for a message of the system there.

    Examples:
        Does asking do what steering does?

        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> direction = lirefs.fit(lm, lirefs.load_questions("organism"), progress=False).best
        >>> variants = {
        ...     "LiReF": lirefs.Steer(direction, "add", 1.0),
        ...     "prompt": lirefs.Prompted("Dan Reed lives in Paris."),
        ... }
        >>> task = lirefs.ShortAnswer("homes", [("dan", "Dan Reed lives in", "Paris")])
        >>> lirefs.compare(lm, variants, [task], progress=False).variants
        ['unchanged', 'LiReF', 'prompt']
    """

    def __init__(self, prefix: str | None = None, *, system: str | None = None) -> None:
        if (prefix is None) == (system is None):
            raise InterventionError("Prompted needs either a prefix or a system message")
        for name, text in (("prefix", prefix), ("system", system)):
            must_be(text, (str, type(None)), name, InterventionError)
            if text == "":
                raise InterventionError(f"{name} is empty: there is nothing to put before a prompt")
        self.prefix = prefix
        self.system = system
        self.prompts_reached = 0
        """Prompts that it has been put before, by which a task that ignores it is noticed."""

    def attach(self, model: nn.Module) -> Handle:
        """Put it before the prompts of a model (`lm.model`) until the handle's `remove`."""
        undo = UndoStack()
        try:
            with attaching(undo):
                note(undo.steps, reserve, model)
                attached = steerings_of(model)
                attached.append(self)
                undo.steps.append(lambda: attached.remove(self))
            return undo
        except BaseException:
            undo.remove()
            raise

    def describe(self) -> dict[str, Any]:
        """Kind and text as JSON values."""
        text = {"system": self.system} if self.prefix is None else {"prefix": self.prefix}
        return {"kind": "prompted", **text}

    def __repr__(self) -> str:
        given = str(self.system if self.prefix is None else self.prefix)
        shown = repr(given if len(given) <= SHOWN else f"{given[:SHOWN]}…")
        return f"Prompted({'system=' if self.prefix is None else ''}{shown})"

    def tokens(self, tokenizer: Any, first: int) -> tuple[list[int], list[int], list[int]]:
        """Its ids before a text; those before a chat; and those of the chat that they replace.

        `first` is the number of special tokens that the tokenizer adds in front, which are left
        out.
        """
        if self.prefix is not None:
            (ids,) = token_ids(tokenizer, [self.prefix], add_special_tokens=False)
            return ids, ids, []
        system = {"role": "system", "content": self.system}
        asked = {"role": "user", "content": "a"}
        try:
            texts = [
                str(tokenizer.apply_chat_template(talk, tokenize=False))
                for talk in ([system], [system, asked], [asked])
            ]
        except Exception as problem:  # of the template, which may raise anything
            raise InterventionError(
                f"{self._unwritten} ({first_line_of_error(problem)})"
            ) from problem
        alone, opening, plain = (ids[first:] for ids in token_ids(tokenizer, texts))
        if not alone or opening == plain:  # some templates leave it out
            raise InterventionError(self._unwritten)
        same = 0  # tokens at the end that a chat has with and without a message of the system
        while same < min(len(opening), len(plain)) and opening[-same - 1] == plain[-same - 1]:
            same += 1
        return alone, opening[: len(opening) - same], plain[: len(plain) - same]

    @property
    def _unwritten(self) -> str:
        return (
            f"{self!r}: the tokenizer's chat template does not write such a message by itself; "
            "give Prompted a prefix"
        )


def with_prompts(
    model: nn.Module, tokenizer: Any, rows: Sequence[Sequence[int]], chats: bool = True
) -> list[Sequence[int]]:
    """Rows of token ids after the texts of every `Prompted` that is attached.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Token ids of each prompt or text.
        chats: Whether a row may be a chat, whose beginning is replaced by a message of the system;
            False for texts, of which every token stays.
    """
    found = list(rows)
    for one in reversed(_attached(model)):  # the first stands in front
        one.prompts_reached += len(rows)
        first, _ = special_tokens_around(tokenizer)
        alone, opening, replaced = one.tokens(tokenizer, len(first))
        for index, row in enumerate(map(list, found)):
            start = len(first) if row[: len(first)] == first else 0
            end = start + len(replaced)
            if chats and replaced and row[start:end] == replaced:
                found[index] = [*row[:start], *opening, *row[end:]]
            else:
                found[index] = [*row[:start], *alone, *row[start:]]
    return found


def tokens_before(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that the texts of every attached `Prompted` add to a row."""
    attached = _attached(model)
    first, _ = special_tokens_around(tokenizer) if attached else ([], [])
    return sum(len(one.tokens(tokenizer, len(first))[0]) for one in attached)


def _attached(model: nn.Module) -> list[Prompted]:
    return [one for one in steerings_on(model) if isinstance(one, Prompted)]
