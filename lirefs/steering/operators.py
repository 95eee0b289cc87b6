"""What steering does to a hidden state: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from lirefs.model.interrupts import interrupts_held


class Operator:
    """One operator with its direction, made ready once for each device and dtype it meets.

    Args:
        name: One of `OPERATORS`; `lirefs.Steer` has their formulas.
        direction: d, shape (width,); a zero direction changes nothing.
        strength: a, where a call does not bring its own.
    """

    def __init__(self, name: str, direction: Tensor, strength: float) -> None:
        self.name = name
        self.strength = -1.0 if name == "ablate" else strength
        with torch.inference_mode(False):  # for autograd, wherever it is made
            self.direction = direction.detach().to(torch.float64, copy=True)
            self._norm = float(self.direction.norm())
            self.unit = self.direction / self._norm if self._norm > 0 else self.direction
        self._ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, h: Tensor, strength: Tensor | None = None) -> Tensor:
        """The hidden states `h`, (..., width), after the operator: a new tensor of their dtype.

        `strength` is a for each token and broadcasts to (..., 1); None for the operator's own.
        """
        # Projections of half precision are taken in float32, which keeps their last bits.
        dtype = torch.float32 if h.dtype in (torch.float16, torch.bfloat16) else h.dtype
        direction, unit, scaled = self._ready.get((h.device, dtype)) or self._prepare(h, dtype)
        if strength is not None:
            strength = strength.to(dtype)
        if self.name == "add":
            return h + (scaled if strength is None else strength * direction).to(h.dtype)
        exact = h.to(dtype)
        if self.name == "norm_preserving_add":
            moved = exact + (scaled if strength is None else strength * direction)
            length = moved.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
            kept: Tensor = moved * (exact.norm(dim=-1, keepdim=True) / length)
            return kept.to(h.dtype)
        along = (exact @ unit).unsqueeze(-1)
        factor = 1.0
        if self.name in ("clamp", "ablate_then_add"):
            goal = self.strength if strength is None else strength
            along = (goal if self.name == "clamp" else goal * self._norm) - along
        elif self.name == "amplify" and strength is not None:
            along = along * strength
        else:
            factor = self.strength
        return torch.addcmul(exact, along, unit, value=factor).to(h.dtype)

    def _prepare(self, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        # Not of inference mode, as the next forward pass may need a gradient.
        with interrupts_held(), torch.inference_mode(False):
            direction, unit = (one.to(h.device, dtype) for one in (self.direction, self.unit))
            scaled = (self.strength * self.direction).to(h.device, dtype)
        self._ready[h.device, dtype] = (direction, unit, scaled)
        return direction, unit, scaled
