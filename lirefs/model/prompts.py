"""Where the prompt of each row ends.

A forward pass alone does not show this in general. `generate` knows it, and reports it here; a
forward pass with an empty cache is a prompt; in every other case `prompt_lengths` must say it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from lirefs.errors import ScopeError


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
    token = PROMPT.set(prompt)
    try:
        yield
    finally:
        PROMPT.reset(token)


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
