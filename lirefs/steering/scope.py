"""Which tokens are steered, in absolute positions: the same under any padding or cache.

The position of a token is its index in its own unpadded text, from 0. Its age is its index among
the generated tokens: 0 for the first one, -1 for the last token of the prompt, and so on down.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lirefs.errors import ScopeError, as_list
from lirefs.files import sha256_of
from lirefs.model.batching import token_ids_and_spans
from lirefs.model.prompts import expand_to_rows
from lirefs.model.token_positions import Tokens


@dataclass(frozen=True, eq=False)
class Scope:
    """A set of tokens. Made by the functions of this module.

    Attributes:
        name: Its name in reports.
        touches: Gives the tokens it holds, boolean, in a shape that broadcasts to (rows, tokens).
        settings: What else a report has to say, JSON values. For a scope with a function of your
            own, they must tell it from any other: without them, caches and journals refuse it.
        first: The smallest position that it can hold.
        absolute: Whether the position of a token in its text decides, whatever the row.
        ends: For a scope made for certain texts: one past its last position in each row, (rows,).
    """

    name: str
    touches: Callable[[Tokens], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    absolute: bool = False
    ends: Tensor | None = None

    def __repr__(self) -> str:
        return f"Scope({self.name!r})"

    def check(self, tokens: Tokens) -> None:
        """Raise ScopeError if the scope does not fit the texts of a forward pass."""
        prompt = tokens.known_prompt
        # A text that continues an unknown cache has no known length.
        if self.ends is None or prompt is None or self in prompt.checked:
            return
        here = tokens.position.amax(dim=1) + 1
        lengths = torch.maximum(here, expand_to_rows(prompt.lengths.to(here.device), len(here)))
        ends = expand_to_rows(self.ends.to(here.device), len(here), tokens.prompts)
        for row in (ends > lengths).nonzero().flatten().tolist():
            raise ScopeError(
                f"the scope {self.name!r} reaches past the end: position {int(ends[row]) - 1} of "
                f"row {row}, which has {int(lengths[row])} token(s)"
            )
        prompt.checked.add(self)

    def describe(self) -> dict[str, Any]:
        """Its name and settings, as JSON values."""
        own = not getattr(self.touches, "__module__", "").startswith("lirefs.")
        if own and not self.settings:
            reason = f"the scope {self.name!r} is a function of your own; give it settings"
            return {"name": self.name, "unknown": reason}
        return {"name": self.name, **self.settings}


def all_tokens() -> Scope:
    """Every token; the default."""
    return ALL


def prompt() -> Scope:
    """The tokens of the prompt."""
    return Scope("prompt", lambda tokens: (tokens.age < 0) & (tokens.position >= 0))


def generated() -> Scope:
    """The generated tokens.

    The prediction of the first one is made at the last token of the prompt, so this scope cannot
    change it; `last_prompt_token` does.
    """
    return Scope("generated", lambda tokens: (tokens.age >= 0) & (tokens.position >= 0))


def last_prompt_token() -> Scope:
    """The last token of the prompt, which predicts the first generated one."""
    return Scope("last_prompt_token", lambda tokens: (tokens.age == -1) & (tokens.position >= 0))


def first_generated(n: int) -> Scope:
    """The first `n` generated tokens.

    Raises:
        ScopeError: `n` is not a positive integer.
    """
    if type(n) is not int or n < 1:
        raise ScopeError(f"first_generated needs a positive number of tokens, got {n!r}")
    return Scope("first_generated", lambda tokens: (tokens.age >= 0) & (tokens.age < n), {"n": n})


def from_position(position: int) -> Scope:
    """Every token from a position on, counted from 0 in the unpadded text.

    A text that ends earlier is not an error: how long it will get is not known beforehand.

    Raises:
        ScopeError: `position` is not an integer from 0.
    """
    if type(position) is not int or position < 0:
        raise ScopeError(f"from_position needs a position from 0, got {position!r}")
    settings = {"position": position}
    return Scope(
        "from_position", lambda tokens: tokens.position >= position, settings, position, True
    )


def mask(tokens: Tensor | Sequence[bool] | Sequence[Sequence[bool]]) -> Scope:
    """The tokens that are marked, and no others.

    Args:
        tokens: For each row of the batch, True or False for each position of its unpadded text;
            rows may differ in length. A flat list (or tensor of one axis) stands for every row.
            Positions after the end of a mask are not touched.

    Raises:
        ScopeError: The mask has no row, or an entry is not a boolean.
    """
    given = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    rows = as_list(given, "a mask", error=ScopeError)
    if not rows:
        raise ScopeError("a mask needs at least one row")
    if not isinstance(rows[0], Sequence):
        rows = [rows]
    lists = [list(row) for row in rows]
    if not all(isinstance(one, bool) for row in lists for one in row):
        raise ScopeError("a mask holds booleans, True where a token is touched")
    return _marked("mask", [[i for i, one in enumerate(row) if one] for row in lists])


def spans(
    tokenizer: Any,
    texts: Sequence[str],
    ranges: Sequence[Sequence[tuple[int, int]]],
    *,
    add_special_tokens: bool = True,
) -> Scope:
    """The tokens that overlap ranges of characters.

    Args:
        tokenizer: The tokenizer with which the texts become token ids (`lm.tokenizer`).
        texts: The prompt of each row.
        ranges: For each prompt, (start, end) in characters, the end not included.
        add_special_tokens: Whether the prompts are encoded with special tokens.

    Raises:
        ScopeError: A range is empty, reaches past the end of its text or touches no token, the
            numbers of texts and ranges differ, or the tokenizer does not know offsets.
    """
    texts = as_list(texts, "texts", str, ScopeError)
    ranges = as_list(ranges, "ranges", Sequence, ScopeError)
    if not texts or len(texts) != len(ranges):
        raise ScopeError(f"{len(texts)} text(s) but ranges for {len(ranges)}; give each its own")
    if not getattr(tokenizer, "is_fast", False):
        raise ScopeError("spans need a fast tokenizer: this one does not know character offsets")
    encoded = token_ids_and_spans(tokenizer, texts, add_special_tokens)
    touched: list[list[int]] = []
    for row, (text, wanted) in enumerate(zip(texts, ranges, strict=True)):
        offsets = list(enumerate(encoded[row][1]))
        touched.append([])
        for start, end in wanted:
            if not 0 <= start < end <= len(text):
                raise ScopeError(
                    f"span ({start}, {end}) of row {row} is empty or reaches past the end: its "
                    f"text has {len(text)} characters"
                )
            hit = [index for index, (first, last) in offsets if first < end and last > start]
            if not hit:
                raise ScopeError(f"span ({start}, {end}) of row {row} touches no token")
            touched[-1] += hit
    return _marked("spans", touched)


def as_scope(scope: Scope | str) -> Scope:
    """The scope itself, or the one of this name."""
    if isinstance(scope, Scope):
        return scope
    if not isinstance(scope, str) or scope not in _BY_NAME:
        raise ScopeError(
            f"scope {scope!r} is not one of {', '.join(_BY_NAME)}; others are made by the "
            "functions of lirefs.steering.scope"
        )
    return _BY_NAME[scope]()


def _marked(name: str, positions: list[list[int]]) -> Scope:
    """The scope that holds these positions of each row."""
    ends = torch.tensor([max(row, default=-1) + 1 for row in positions])
    table = torch.zeros(len(positions), max(int(ends.max()), 1), dtype=torch.bool)
    for row, marked in enumerate(positions):
        table[row, marked] = True
    table_on = functools.cache(table.to)

    def touches(tokens: Tokens) -> Tensor:
        position = tokens.position
        known = expand_to_rows(table_on(position.device), len(position), tokens.prompts)
        inside = (position >= 0) & (position < table.shape[1])
        return known.gather(1, position.clamp(0, table.shape[1] - 1)) & inside

    rows = [sorted(set(row)) for row in positions]
    digest = sha256_of(json.dumps(rows).encode())[:16]
    settings = {"tokens": [len(row) for row in rows], "digest": digest}
    return Scope(name, touches, settings=settings, ends=ends)


ALL = Scope("all", lambda tokens: tokens.position >= 0, absolute=True)
_BY_NAME: dict[str, Callable[[], Scope]] = {
    "all": all_tokens,
    "prompt": prompt,
    "generated": generated,
    "last_prompt_token": last_prompt_token,
}
