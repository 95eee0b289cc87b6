"""Which tokens an operator touches, in absolute positions: the same under any padding or cache.

A token's position is its index in its own unpadded sequence, from 0. Its age is its index among
the generated tokens: 0 for the first one, -1 for the last token of the prompt, and so on down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lirefs.errors import ScopeError
from lirefs.model.prompts import for_rows


class Where(Protocol):
    """The tokens of one forward pass."""

    @property
    def position(self) -> Tensor:
        """Index of each token in its unpadded row, (rows, tokens), -1 for padding."""
        ...

    @property
    def age(self) -> Tensor:
        """Index of each token among the generated ones, (rows or 1, tokens).

        Raises:
            ScopeError: Nobody said where the prompt ends.
        """
        ...

    @property
    def prompts(self) -> int | None:
        """How many prompts the rows belong to (beams share one), None where nobody said."""
        ...


@dataclass(frozen=True, eq=False)
class Scope:
    """A set of tokens. Made by the functions of this module.

    Attributes:
        name: What it is called in reports.
        touches: The tokens it holds, boolean, of a shape that broadcasts to (rows, tokens).
        settings: What else a report has to say.
        first: The smallest position that it can hold.
        ends: For each row of a scope made for certain texts, one past its last position.
    """

    name: str
    touches: Callable[[Where], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    ends: Tensor | None = None

    def check(self, lengths: Tensor, prompts: int | None = None) -> None:
        """Compare with the texts it is used on.

        Args:
            lengths: Tokens in each row, (rows,).
            prompts: How many prompts the rows belong to, where that is known.

        Raises:
            ScopeError: It was made for another number of rows, or reaches past the end of one.
        """
        if self.ends is None:
            return
        ends = for_rows(self.ends.to(lengths.device), len(lengths), prompts)
        beyond = (ends > lengths).nonzero()
        if len(beyond):
            row = int(beyond[0])
            last = int(ends[row]) - 1
            raise ScopeError(
                f"the scope {self.name!r} reaches past the end: position {last} of row {row}, "
                f"which has {int(lengths[row])} token(s)"
            )

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object.

        Returns:
            JSON values: the name and the settings.
        """
        return {"name": self.name, **self.settings}


def all_tokens() -> Scope:
    """Every token; the default."""
    return ALL


def prompt() -> Scope:
    """The tokens of the prompt."""
    return Scope("prompt", lambda where: (where.age < 0) & (where.position >= 0))


def generated() -> Scope:
    """The generated tokens.

    The first of them is predicted at the last token of the prompt, so it is steered only in what
    it does to those after it; `last_prompt_token` reaches its own prediction.
    """
    return Scope("generated", lambda where: (where.age >= 0) & (where.position >= 0))


def last_prompt_token() -> Scope:
    """The last token of the prompt, which predicts the first generated one."""
    return Scope("last_prompt_token", lambda where: (where.age == -1) & (where.position >= 0))


def first_generated(n: int) -> Scope:
    """The first `n` generated tokens.

    Raises:
        ScopeError: `n` is not a positive integer.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ScopeError(f"first_generated needs a positive number of tokens, got {n!r}")
    return Scope(
        "first_generated", lambda where: (where.age >= 0) & (where.age < n), settings={"n": n}
    )


def from_position(position: int) -> Scope:
    """Every token from a position on, counted from 0 in the unpadded text.

    A text that ends before it is not steered: how far a generation goes is not known beforehand.

    Raises:
        ScopeError: `position` is not an integer from 0.
    """
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise ScopeError(f"from_position needs a position from 0, got {position!r}")
    return Scope(
        "from_position",
        lambda where: where.position >= position,
        settings={"position": position},
        first=position,
    )


def mask(tokens: Tensor | Sequence[bool] | Sequence[Sequence[bool]]) -> Scope:
    """Exactly the tokens that are marked.

    Args:
        tokens: For each row of the batch, True or False for each position of its unpadded text;
            rows may differ in length. One flat list (or tensor of one axis) stands for every row.
            Positions after its end are not touched.

    Raises:
        ScopeError: There is no row, or an entry is not a boolean.
    """
    rows: list[Any] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if not rows:
        raise ScopeError("an explicit mask needs at least one row")
    if not isinstance(rows[0], Sequence):
        rows = [rows]
    lists = [list(row) for row in rows]
    if not all(isinstance(one, bool) for row in lists for one in row):
        raise ScopeError("an explicit mask holds booleans, True where a token is touched")
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
        add_special_tokens: As when the prompts are encoded.

    Raises:
        ScopeError: A range is empty, reaches past the end of its text or touches no token, the
            numbers of texts and ranges differ, or the tokenizer knows no offsets.
    """
    if not texts or len(texts) != len(ranges):
        raise ScopeError(f"{len(texts)} text(s) but ranges for {len(ranges)}; give each its own")
    if not getattr(tokenizer, "is_fast", False):
        raise ScopeError("spans need a fast tokenizer: this one does not know character offsets")
    encoded = tokenizer(
        list(texts), add_special_tokens=add_special_tokens, return_offsets_mapping=True
    )
    touched: list[list[int]] = []
    for row, (text, wanted) in enumerate(zip(texts, ranges, strict=True)):
        touched.append([])
        for start, end in wanted:
            if not 0 <= start < end <= len(text):
                raise ScopeError(
                    f"span ({start}, {end}) of row {row} is empty or reaches past the end: its "
                    f"text has {len(text)} characters"
                )
            hit = [
                index
                for index, (first, last) in enumerate(encoded["offset_mapping"][row])
                if first < end and last > start
            ]
            if not hit:
                raise ScopeError(f"span ({start}, {end}) of row {row} touches no token")
            touched[-1] += hit
    return _marked("spans", touched)


def as_scope(scope: Scope | str) -> Scope:
    """A scope by its name, where it needs nothing else.

    Raises:
        ScopeError: There is no such scope.
    """
    if isinstance(scope, Scope):
        return scope
    if not isinstance(scope, str) or scope not in _BY_NAME:
        raise ScopeError(
            f"scope {scope!r} is not one of {', '.join(_BY_NAME)}; the others are functions of "
            "lirefs.steering.scope"
        )
    return _BY_NAME[scope]()


def _marked(name: str, positions: list[list[int]]) -> Scope:
    """A scope that holds the given positions of each row."""
    ends = torch.tensor([max(row, default=-1) + 1 for row in positions])
    table = torch.zeros(len(positions), max(int(ends.max()), 1), dtype=torch.bool)
    for row, marked in enumerate(positions):
        table[row, marked] = True
    tables: dict[torch.device, Tensor] = {}

    def touches(where: Where) -> Tensor:
        position = where.position
        if position.device not in tables:
            tables[position.device] = table.to(position.device)
        known = for_rows(tables[position.device], position.shape[0], where.prompts)
        inside = (position >= 0) & (position < table.shape[1])
        return known.gather(1, position.clamp(0, table.shape[1] - 1)) & inside

    settings = {"tokens": [len(set(row)) for row in positions]}
    return Scope(name, touches, settings=settings, ends=ends)


ALL = Scope("all", lambda where: where.position >= 0)
_BY_NAME: dict[str, Callable[[], Scope]] = {
    "all": all_tokens,
    "prompt": prompt,
    "generated": generated,
    "last_prompt_token": last_prompt_token,
}
