"""What is known of the tokens of a forward pass, and where their prompt ends.

Where the prompt ends cannot be read off a forward pass in general. `generate` knows it, so it is
told from there; a forward pass with an empty cache is a prompt; for anything else `prompt_lengths`
says it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lirefs.errors import ScopeError


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


PROMPT: ContextVar[Prompt | None] = ContextVar("prompt", default=None)


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
    token = PROMPT.set(prompt)
    try:
        yield
    finally:
        PROMPT.reset(token)


class Tokens:
    """The tokens of one forward pass (a `lirefs.steering.scope.Where`).

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


def for_rows(values: Tensor, rows: int, prompts: int | None = None) -> Tensor:
    """Values of each item for the rows of a batch, in which an item may have several (beams).

    Args:
        values: One entry per item along the first axis.
        rows: Rows of the batch; those of an item stand together.
        prompts: How many prompts the rows belong to; None where nobody said.

    Raises:
        ScopeError: The items are neither one nor as many as the prompts, or the rows are no
            multiple of them.
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
