"""How strongly each token is steered: one number, or numbers by layer, row or generated token."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lirefs.errors import InterventionError, as_list
from lirefs.files import sha256_of
from lirefs.model.interrupts import interrupts_held
from lirefs.model.prompts import expand_to_rows
from lirefs.model.token_positions import Tokens

_DESCRIBED = 10_000
"""Generated tokens for which the strengths of a function describe it."""


class RowStrengths:
    """A strength for each row of the batch; None leaves a row as it is."""

    def __init__(self, values: Sequence[float | None] | Tensor) -> None:
        if isinstance(values, Tensor):
            if values.dim() != 1:
                shape = tuple(values.shape)
                raise InterventionError(f"strengths by row have one axis, got shape {shape}")
            values = values.tolist()
        if not len(values):
            raise InterventionError("strengths by row are empty; give one for each row")
        self.values = [None if value is None else _finite(value) for value in values]
        with torch.inference_mode(False):  # for autograd, wherever it is made
            self._table = torch.tensor([(value or 0.0, value is not None) for value in self.values])

    def __repr__(self) -> str:
        return f"{len(self.values)} strengths by row"

    def at(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Strength of each token, and whether it is steered at all: both (rows, 1)."""
        # In a local: another thread, with another model, may want it on another device.
        table = self._table
        if table.device != tokens.position.device:
            with interrupts_held(), torch.inference_mode(False):
                table = self._table = table.to(tokens.position.device)
        table = expand_to_rows(table, len(tokens.position), tokens.prompts)
        return table[:, :1], table[:, 1:] > 0

    def describe(self) -> dict[str, Any]:
        """The strengths, as JSON values."""
        return {"rows": self.values}


class Schedule:
    """A strength for each generated token; tokens of the prompt are not steered.

    Args:
        values: The strengths of the generated tokens in order (later tokens are not steered), or
            a pure function from the index of a generated token, from 0, to its strength: the same
            index gives the same strength, whenever it is asked.

    Raises:
        InterventionError: The sequence is empty, or a strength is not a finite number.
    """

    def __init__(self, values: Sequence[float] | Callable[[int], float]) -> None:
        values = values if callable(values) else as_list(values, "values", error=InterventionError)
        self._function = values if callable(values) else None
        self._values = [] if callable(values) else [_finite(value) for value in values]
        if self._function is None and not self._values:
            raise InterventionError("an empty schedule steers nothing; give it a strength")
        self._known = torch.tensor(self._values)

    def __repr__(self) -> str:
        shown = repr(self._values[:4])[:-1] + (", ...]" if len(self._values) > 4 else "]")
        return f"Schedule({self._function or shown!s:.80})"

    def at(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Strength of each token, and whether it is steered at all: both (rows or 1, tokens)."""
        age = tokens.age
        # In a local: another thread, with another model, may be further on, or on another device.
        known = self._known.to(age.device)
        if self._function is not None:
            needed = range(len(known), max(int(age.max()) + 1, 1))
            more = [_finite(self._function(index)) for index in needed]
            if more:
                known = torch.cat([known, torch.tensor(more, device=known.device)])
        self._known = known
        last = len(known) - 1
        return known[age.clamp(0, last)], (age >= 0) & (age <= last)

    def describe(self) -> dict[str, Any]:
        """The strengths, or a digest of the first 10,000 that a function gives, as JSON values."""
        if self._function is None:
            return {"schedule": self._values}
        return {"schedule": "a function", "digest": self._digest}

    @functools.cached_property
    def _digest(self) -> str:
        assert self._function is not None
        values = array("d")
        with suppress(Exception):  # a function may end somewhere: those before tell it apart
            for index in range(_DESCRIBED):
                values.append(_finite(self._function(index)))
        return sha256_of(values.tobytes())[:16]


Strength: TypeAlias = (
    float
    | Mapping[int, float]
    | Sequence[float | None]
    | Tensor
    | Callable[[int], float]
    | Schedule
)


def as_strength(strength: Strength) -> float | dict[int, float] | RowStrengths | Schedule:
    """The strength in one of its four forms: a number, by layer, by row, by generated token."""
    if isinstance(strength, Schedule):
        return strength
    if isinstance(strength, Tensor) and strength.dim() == 0:
        return _finite(strength.item())
    if isinstance(strength, Mapping):
        for layer in strength:
            if isinstance(layer, bool) or not isinstance(layer, Integral):
                raise InterventionError(f"strengths by layer need integer keys, got {layer!r}")
        return {int(layer): _finite(value) for layer, value in strength.items()}
    if isinstance(strength, Sequence | Tensor) and not isinstance(strength, str):
        return RowStrengths(strength)
    return Schedule(strength) if callable(strength) else _finite(strength)


def _finite(value: Any) -> float:
    try:
        number = float("" if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise InterventionError(f"strength {value!r} is not a number") from None
    if not math.isfinite(number):
        raise InterventionError(f"strength {value} is not a finite number")
    return number
