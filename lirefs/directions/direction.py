"""One direction in the residual stream, and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lirefs.errors import (
    DirectionError,
    InterventionError,
    as_list,
    checked_seed,
    must_be,
    whole_number,
)
from lirefs.files import html_table, sha256_of


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction at one (layer, site); it points to the first of two labels.

    Of the questions that come with the package: from memory to reasoning.

    Attributes:
        vector: Difference of the class means, float32, shape (width,).
        layer: Decoder block, from 0.
        site: `resid_pre`, `resid_post`, `attn_out` or `mlp_out`.
        means: Mean projection on the unit vector of the items of the second label (memory) and of
            the first (reasoning).
        spread: Standard deviation of the projection within each class, same order.
        counts: Number of items of each, same order.
        model: Fingerprint of the model it was fitted on; empty when unknown.
        names: The two labels, for tables: the first one and the second; a `Directions` gives its
            own to each direction.
    """

    vector: Tensor
    layer: int
    site: str = "resid_pre"
    means: tuple[float, float] = (0.0, 0.0)
    spread: tuple[float, float] = (0.0, 0.0)
    counts: tuple[int, int] = (0, 0)
    model: str = ""
    names: tuple[str, str] = ("first", "second")

    def __post_init__(self) -> None:
        must_be(self.vector, Tensor, "the vector of a direction", DirectionError)
        must_be(self.site, str, "the site of a direction", DirectionError)
        whole_number(self.layer, "the layer of a direction", least=0, error=DirectionError)
        if self.vector.ndim != 1 or not self.vector.is_floating_point():
            raise DirectionError(
                f"the vector of a direction has shape {tuple(self.vector.shape)} and dtype "
                f"{self.vector.dtype}; it needs one axis, (width,), of floating-point numbers"
            )

    def __repr__(self) -> str:
        width, norm = len(self.vector), self.norm
        return f"Direction(layer {self.layer}, {self.site}, width {width}, norm {norm:.4g})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), [self.row()])

    def row(self) -> dict[str, Any]:
        """Place, norm and statistics as a row of a table: means and spread in activation units."""
        row: dict[str, Any] = {"layer": self.layer, "site": self.site, "norm": self.norm}
        for what, pair in (("mean", self.means), ("spread", self.spread), ("n", self.counts)):
            row |= {f"{what} {name}": one for name, one in zip(self.names[::-1], pair, strict=True)}
        return row

    @property
    def unit(self) -> Tensor:
        """The vector at length 1; zero when the vector is zero."""
        return _unit(self.vector)

    @property
    def norm(self) -> float:
        """Length of the vector, in units of the activations."""
        return float(_norm(self.vector))

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the vector, to tell directions apart."""
        return sha256_of(self.vector.detach().float().cpu().numpy().tobytes())[:16]

    def project(self, states: Tensor) -> Tensor:
        """Component of hidden states, shape (..., width), along the unit vector, shape (...).

        States may have any floating dtype; the result has that of the vector.
        """
        must_be(states, Tensor, "states", DirectionError)
        return states.to(self.vector.dtype) @ self.unit.to(states.device)

    def random_like(self, seed: int) -> Direction:
        """A random direction of the same norm and place, without statistics: the control."""
        generator = torch.Generator().manual_seed(checked_seed(seed, DirectionError))
        vector = torch.randn(self.vector.shape, generator=generator)
        unit, norm = vector / vector.norm(), _norm(self.vector).cpu()
        return self._with((unit * norm).to(vector.dtype))

    def normalized(self) -> Direction:
        """The direction at length 1, with the same means, spread and counts."""
        return replace(self, vector=self.unit)

    def project_off(self, other: Direction) -> Direction:
        """The direction without its component along `other`; unchanged where `other` is zero.

        Raises:
            DirectionError: If the two differ in width, place or model.
        """
        self._must_fit(other)
        along, unit = self.vector.double(), other.vector.double()
        square = unit @ unit
        if square > 0:
            along = along - (along @ unit) / square * unit
        return self._with(along.to(self.vector.dtype))

    @staticmethod
    def mean_of(directions: Sequence[Direction]) -> Direction:
        """The mean of directions of one place, over seeds or question sets, taken in float64.

        Raises:
            DirectionError: If there is none, or they differ in width, place or model.
        """
        as_list(directions, "directions", Direction, DirectionError)
        if not directions:
            raise DirectionError("no direction to take the mean of")
        first = directions[0]
        for one in directions:
            first._must_fit(one)
        mean = torch.stack([one.vector.double() for one in directions]).mean(dim=0)
        return first._with(mean.to(first.vector.dtype))

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._must_fit(other)
        return self._with(self.vector + other.vector)

    def __sub__(self, other: Direction) -> Direction:
        return self + -other

    def __neg__(self) -> Direction:
        return self * -1.0

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, int | float):
            return NotImplemented
        if factor == 0:
            return self._with(self.vector * 0.0)
        sign = 1.0 if factor > 0 else -1.0  # a negative factor reverses the unit vector
        means = (sign * self.means[0], sign * self.means[1])
        return replace(self, vector=self.vector * factor, means=means)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if divisor == 0:
            raise DirectionError("a direction cannot be divided by zero")
        return self * (1.0 / divisor)

    def _with(self, vector: Tensor) -> Direction:
        """Another vector at the same place, without the statistics measured along this one."""
        return Direction(vector, self.layer, self.site, model=self.model, names=self.names)

    def _must_fit(self, other: Direction) -> None:
        must_be(other, Direction, "the other direction", DirectionError)
        if self.vector.shape != other.vector.shape:
            raise DirectionError(
                f"directions of width {tuple(self.vector.shape)} and {tuple(other.vector.shape)}"
            )
        if (self.layer, self.site) != (other.layer, other.site):
            raise DirectionError(
                f"directions of layer {self.layer}, {self.site} and of layer {other.layer}, "
                f"{other.site}: give them the same place first, with dataclasses.replace"
            )
        if self.model and other.model and self.model != other.model:
            raise DirectionError("directions of two models: their coordinates do not correspond")


def _norm(vector: Tensor) -> Tensor:
    """The length of a vector; in float64 where the squares have no room in the vector's dtype."""
    norm: Tensor = vector.norm()
    # float16 ends at 65504, and below these bounds squares lose digits or are 0.
    fits = 1e-15 < float(norm) < (1e3 if vector.dtype == torch.float16 else 1e18)
    if not fits:
        norm = vector.double().norm()
    return norm


def _unit(vector: Tensor) -> Tensor:
    norm = _norm(vector)
    unit: Tensor = vector.to(norm.dtype) / norm if norm > 0 else vector
    return unit.to(vector.dtype)


def places_text(places: Iterable[tuple[int, str]]) -> str:
    """Layers and sites in words, for messages."""
    by_site: dict[str, list[int]] = {}
    for layer, site in places:
        by_site.setdefault(site, []).append(layer)
    found = []
    for site, layers in by_site.items():
        run = list(range(min(layers), max(layers) + 1))
        many = len(layers) > 2 and sorted(layers) == run
        text = f"{run[0]} to {run[-1]}" if many else ", ".join(map(str, layers))
        found.append(f"layer{'s' * (len(layers) > 1)} {text} at {site}")
    return "; ".join(found) or "none"


def direction_must_be_finite(direction: Direction) -> None:
    """Raise InterventionError if the vector has entries that are NaN or infinite."""
    if not bool(torch.isfinite(direction.vector).all()):
        raise InterventionError(
            f"the direction at layer {direction.layer}, {direction.site} has entries that are NaN "
            "or infinite; fit it again on finite states"
        )
