"""How strongly each token is steered: numbers, rows, schedules; and gates, which decide whether."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lirefs.errors import InterventionError
from lirefs.model.prompts import for_rows
from lirefs.steering.scope import Where


class RowStrengths:
    """A strength for each row of the batch.

    Args:
        values: The strengths; None leaves a row as it is. A tensor has one axis.

    Raises:
        InterventionError: There is no row, or a strength is no finite number.
    """

    def __init__(self, values: Sequence[float | None] | Tensor) -> None:
        if isinstance(values, Tensor):
            if values.dim() != 1:
                raise InterventionError(
                    f"strengths by row have one axis, this tensor has shape {tuple(values.shape)}"
                )
            values = values.tolist()
        if not len(values):
            raise InterventionError("no strength for any row: the batch is empty")
        self.values = [None if value is None else finite(value) for value in values]
        self._strengths = torch.tensor([value or 0.0 for value in self.values])
        self._steered = torch.tensor([value is not None for value in self.values])

    def at(self, where: Where) -> tuple[Tensor, Tensor]:
        """Strength of each token, and which are steered at all: both (rows, 1)."""
        rows, device = where.position.shape[0], where.position.device
        prompts = where.prompts
        # In locals: another thread, with another model, may want them on another device.
        strengths = self._strengths = self._strengths.to(device)
        steered = self._steered = self._steered.to(device)
        return (
            for_rows(strengths, rows, prompts).unsqueeze(1),
            for_rows(steered, rows, prompts).unsqueeze(1),
        )

    def describe(self) -> Any:
        """What it is, as a JSON value."""
        return {"rows": self.values}


class Schedule:
    """A strength for each generated token; tokens of the prompt are not steered.

    Args:
        values: The strengths of the generated tokens in order (those after the end are not
            steered), or a function from the index of a generated token, from 0, to its strength.

    Raises:
        InterventionError: The sequence is empty, or a strength is no finite number.
    """

    def __init__(self, values: Sequence[float] | Callable[[int], float]) -> None:
        self._function = values if callable(values) else None
        self._values = [] if callable(values) else [finite(value) for value in values]
        if self._function is None and not self._values:
            raise InterventionError("an empty schedule steers nothing; give it a strength")
        self._tensor = torch.tensor(self._values)

    def at(self, where: Where) -> tuple[Tensor, Tensor]:
        """Strength of each token, and which are steered at all.

        Args:
            where: The tokens of a forward pass.

        Returns:
            float32 strengths and bool, both of shape (rows or 1, tokens).
        """
        age = where.age
        # In a local: another thread, with another model, may be further on, or on another device.
        known = self._tensor.to(age.device)
        needed = max(int(age.max()) + 1, 1) if self._function is not None else 0
        if len(known) < needed:
            more = [finite(self._function(index)) for index in range(len(known), needed)]  # type: ignore[misc]
            known = torch.cat([known, torch.tensor(more, device=known.device)])
        self._tensor = known
        last = len(known) - 1
        return known[age.clamp(0, last)], (age >= 0) & (age <= last)

    def describe(self) -> Any:
        """What it is, as a JSON value.

        Returns:
            The strengths, or that it is a function.
        """
        return {"schedule": "a function" if self._function is not None else self._values}


Strength: TypeAlias = (
    float
    | Mapping[int, float]
    | Sequence[float | None]
    | Tensor
    | Callable[[int], float]
    | Schedule
)


def as_strength(strength: Strength) -> float | dict[int, float] | RowStrengths | Schedule:
    """The strength in one of its four forms: a number, by layer, by row, by generated token.

    Raises:
        InterventionError: It is none of these, or a number is not finite.
    """
    if isinstance(strength, Schedule):
        return strength
    if isinstance(strength, Tensor) and strength.dim() == 0:
        return finite(strength.item())
    if isinstance(strength, Mapping):
        for layer in strength:
            if isinstance(layer, bool) or not isinstance(layer, Integral):
                raise InterventionError(f"strengths by layer go under integers, got {layer!r}")
        return {int(layer): finite(value) for layer, value in strength.items()}
    if isinstance(strength, Sequence | Tensor) and not isinstance(strength, str):
        return RowStrengths(strength)
    if callable(strength):
        return Schedule(strength)
    return finite(strength)


def finite(value: Any) -> float:
    """The number, if it is one and finite.

    Raises:
        InterventionError: It is not.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InterventionError(f"strength {value!r} is not a number") from None
    if not math.isfinite(number):
        raise InterventionError(f"strength {value} is not a finite number")
    return number
