"""Gates: a probe decides which tokens or rows are steered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lirefs.directions.direction import Direction, direction_must_be_finite
from lirefs.errors import InterventionError, must_be


@dataclass(frozen=True, eq=False)
class Gate:
    """Steer only where the hidden state projects far enough on the direction of a probe.

    Attributes:
        direction: The probe's direction, read at its own layer and site before anything is
            steered there.
        threshold: The projection h·v, in units of the activations, beyond which a token passes;
            None for the middle between the two class means.
        per: `token`: each token decides for itself. `row`: the last token of the prompt decides
            for itself and all later tokens (those before it are never steered, since a prompt
            that comes in chunks has lost them by then).
        above: Whether projections above the threshold pass, or those below.

    Raises:
        InterventionError: No probe or no threshold, or one of them is not finite.
    """

    direction: Direction
    threshold: float | None = None
    per: Literal["token", "row"] = "token"
    above: bool = True

    def __post_init__(self) -> None:
        must_be(self.direction, Direction, "the direction of a gate", InterventionError)
        must_be(self.threshold, (float, int, type(None)), "threshold", InterventionError)
        direction_must_be_finite(self.direction)
        if self.per not in ("token", "row"):
            raise InterventionError(f"a gate decides per 'token' or 'row', not {self.per!r}")
        if self.threshold is None and not all(self.direction.counts):
            raise InterventionError(
                "a gate without a threshold needs a fitted probe: this direction has no class means"
            )
        if not math.isfinite(self.level):
            raise InterventionError(f"the threshold of a gate must be finite, got {self.level}")

    @property
    def level(self) -> float:
        """The threshold in use: the one given, or the middle between the class means."""
        return sum(self.direction.means) / 2 if self.threshold is None else self.threshold

    def passes(self, states: Tensor, real: Tensor) -> Tensor:
        """Which hidden states, (..., width), pass: boolean, (...); `real` are not padding, (...).

        Raises:
            InterventionError: A projection, other than of padding, is not finite.
        """
        dtype = torch.promote_types(states.dtype, torch.float32)
        along = states.to(dtype) @ self.direction.unit.to(states.device, dtype)
        if not bool((along.isfinite() | ~real).all()):
            raise InterventionError(
                f"the gate at layer {self.direction.layer}, {self.direction.site} reads hidden "
                "states that are not finite; try a wider dtype"
            )
        return along > self.level if self.above else along < self.level

    def describe(self) -> dict[str, Any]:
        """What it reads and how it decides, as JSON values."""
        return {
            "layer": self.direction.layer,
            "site": self.direction.site,
            "digest": self.direction.digest,
            "threshold": self.level,
            "per": self.per,
            "above": self.above,
        }
