"""Gates: steering decided by a probe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lirefs.directions.direction import Direction, must_be_finite
from lirefs.errors import InterventionError


@dataclass(frozen=True, eq=False)
class Gate:
    """Steers only where the hidden state projects far enough on the direction of a probe.

    Attributes:
        direction: The probe's direction; read at its own layer and site, before anything is
            steered there.
        threshold: Where h.v begins to pass; None for the middle between the two class means.
        per: `token`: each token by itself. `row`: the last token of the prompt decides for
            itself and for all tokens after it. (Tokens before it are not steered: in a prompt
            that comes in chunks they are gone before the decision falls.)
        above: Whether projections above the threshold pass, or those below.

    Raises:
        InterventionError: There is no probe, or no threshold, or one of them is not finite.
    """

    direction: Direction
    threshold: float | None = None
    per: Literal["token", "row"] = "token"
    above: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            raise InterventionError(
                f"a gate needs the direction of a probe, got {type(self.direction).__name__}"
            )
        must_be_finite(self.direction)
        if self.per not in ("token", "row"):
            raise InterventionError(f"a gate decides per 'token' or 'row', not {self.per!r}")
        if self.threshold is None and not all(self.direction.counts):
            raise InterventionError(
                "a gate without a threshold needs a fitted probe: this direction has no class means"
            )
        if not math.isfinite(self.level):
            raise InterventionError(f"the threshold {self.level} of a gate is not finite")

    @property
    def level(self) -> float:
        """The threshold that counts."""
        return sum(self.direction.means) / 2 if self.threshold is None else self.threshold

    def passes(self, states: Tensor, real: Tensor) -> Tensor:
        """Which hidden states pass.

        Args:
            states: Shape (..., width).
            real: Which of them are no padding, boolean, (...).

        Returns:
            Boolean, (...).

        Raises:
            InterventionError: The projection of one that is no padding is not finite, so nothing
                could be decided.
        """
        dtype = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
        along = states.to(dtype) @ self.direction.unit.to(states.device, dtype)
        if not torch.compiler.is_compiling() and not bool((along.isfinite() | ~real).all()):
            raise InterventionError(
                f"the gate at layer {self.direction.layer}, {self.direction.site} reads hidden "
                "states that are not finite; try a wider dtype"
            )
        return along > self.level if self.above else along < self.level

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object.

        Returns:
            JSON values: place and digest of the probe's direction, threshold, per, above.
        """
        return {
            "layer": self.direction.layer,
            "site": self.direction.site,
            "digest": self.direction.digest,
            "threshold": self.level,
            "per": self.per,
            "above": self.above,
        }
