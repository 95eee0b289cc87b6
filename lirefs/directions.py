"""Directions in the residual stream: what was fitted, where, from what; arithmetic on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirefs.errors import DirectionError, DirectionsFileError, ProvenanceError
from lirefs.files import atomic_path, parse_json, sha256_of
from lirefs.layout import SITES

if TYPE_CHECKING:
    from lirefs.intervention import Steer
    from lirefs.models import LanguageModel
    from lirefs.scope import Scope
    from lirefs.strength import Gate, Strength

FORMAT = "lirefs-directions-1"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction at one (layer, site); it points from memory to reasoning.

    Attributes:
        vector: Difference of the class means, float32, shape (width,).
        layer: Decoder block, from 0.
        site: `resid_pre`, `resid_post`, `attn_out` or `mlp_out`.
        means: Mean projection on the unit vector of the memory and of the reasoning items.
        spread: Standard deviation of the projection within each class, same order.
        counts: Number of memory and reasoning items, same order.
        model: Fingerprint of the model it was fitted on; empty when unknown.
    """

    vector: Tensor
    layer: int
    site: str = "resid_pre"
    means: tuple[float, float] = (0.0, 0.0)
    spread: tuple[float, float] = (0.0, 0.0)
    counts: tuple[int, int] = (0, 0)
    model: str = ""

    @property
    def unit(self) -> Tensor:
        """The vector at length 1; zero when the vector is zero."""
        norm = self.vector.norm()
        return self.vector / norm if norm > 0 else self.vector

    @property
    def norm(self) -> float:
        """Length of the vector, in units of the activations."""
        return float(self.vector.norm())

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the vector: what tells two directions apart."""
        return sha256_of(self.vector.detach().float().cpu().numpy().tobytes())[:16]

    def project(self, states: Tensor) -> Tensor:
        """Component of hidden states along the unit vector: (..., width) to (...)."""
        return states.to(self.vector.dtype) @ self.unit.to(states.device)

    def random_like(self, seed: int) -> Direction:
        """A random direction of the same norm at the same place: the control."""
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(self.vector.shape, generator=generator)
        return self._with(vector / vector.norm() * self.vector.norm().cpu())

    def normalized(self) -> Direction:
        """The direction at length 1; what was measured along it still holds."""
        return replace(self, vector=self.unit)

    def project_off(self, other: Direction) -> Direction:
        """What is left of it when its component along `other` is taken away.

        Raises:
            DirectionError: If the other has another width, place or model.
        """
        self._must_fit(other)
        along, unit = self.vector.double(), other.vector.double()
        square = unit @ unit
        if square > 0:
            along = along - (along @ unit) / square * unit
        return self._with(along.to(self.vector.dtype))

    @staticmethod
    def mean_of(directions: Sequence[Direction]) -> Direction:
        """The mean of directions of one place, over seeds or question sets.

        Raises:
            DirectionError: If there is none, or they differ in width, place or model.
        """
        if not directions:
            raise DirectionError("there is no direction to take the mean of")
        for one in directions[1:]:
            directions[0]._must_fit(one)
        total = torch.stack([one.vector.double() for one in directions]).mean(dim=0)
        return directions[0]._with(total.to(directions[0].vector.dtype))

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._must_fit(other)
        return self._with(self.vector + other.vector)

    def __sub__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._must_fit(other)
        return self._with(self.vector - other.vector)

    def __neg__(self) -> Direction:
        return self * -1.0

    def __mul__(self, factor: float) -> Direction:
        if not isinstance(factor, int | float):
            return NotImplemented
        if factor == 0:
            return self._with(self.vector * 0.0)
        sign = 1.0 if factor > 0 else -1.0  # the unit vector turns round
        means = (sign * self.means[0], sign * self.means[1])
        return replace(self, vector=self.vector * factor, means=means)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if not isinstance(divisor, int | float):
            return NotImplemented
        if divisor == 0:
            raise DirectionError("a direction cannot be divided by zero")
        return self * (1.0 / divisor)

    def _with(self, vector: Tensor) -> Direction:
        """Another vector at the same place: nothing has been measured along it."""
        return Direction(vector, self.layer, self.site, model=self.model)

    def _must_fit(self, other: Direction) -> None:
        if self.vector.shape != other.vector.shape:
            raise DirectionError(
                f"directions of width {tuple(self.vector.shape)} and {tuple(other.vector.shape)}"
            )
        if (self.layer, self.site) != (other.layer, other.site):
            raise DirectionError(
                f"directions of layer {self.layer}, {self.site} and of layer {other.layer}, "
                f"{other.site}: give them one place first, with dataclasses.replace"
            )
        if self.model and other.model and self.model != other.model:
            raise DirectionError("directions of two models; their coordinates do not compare")

    def steer(
        self,
        operator: str,
        strength: Strength = 1.0,
        layers: str | Iterable[int] | None = None,
        *,
        sites: Sequence[str] | None = None,
        scope: Scope | str = "all",
        gate: Gate | None = None,
        any_model: bool = False,
    ) -> Steer:
        """Steering along this direction; the arguments are those of `Steer`.

        Args:
            operator: `"add"`, `"ablate"`, `"amplify"`, `"clamp"`, `"norm_preserving_add"` or
                `"ablate_then_add"`.
            strength: The factor a: a number, by layer, by row or by generated token.
            layers: Where to apply it: None for the direction's own layer, `"all"`, or indices.
            sites: Where in these layers; None for the direction's own site.
            scope: Which tokens.
            gate: A condition decided by a probe.
            any_model: Whether another model than the one it was fitted on may be steered.
        """
        from lirefs.intervention import Steer

        return Steer(
            self,
            operator,
            strength,
            layers=layers,
            sites=sites,
            scope=scope,
            gate=gate,
            any_model=any_model,
        )


@dataclass(frozen=True, eq=False)
class Directions(Mapping[tuple[int, str], Direction]):
    """Directions of one model by (layer, site), with what made them.

    Attributes:
        items_by_place: The directions.
        provenance: Hashes of model, tokenizer and data, settings and library version.

    Raises:
        DirectionError: If a key is not the (layer, site) of its direction.
    """

    items_by_place: dict[tuple[int, str], Direction]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, one in self.items_by_place.items():
            if place != (one.layer, one.site):
                raise DirectionError(
                    f"the direction under {place} is of layer {one.layer}, {one.site}: "
                    "the key must be its own (layer, site)"
                )
        made_on = str(self.provenance.get("model", ""))
        items = {
            place: replace(one, model=made_on) if made_on and one.model != made_on else one
            for place, one in self.items_by_place.items()
        }
        object.__setattr__(self, "items_by_place", items)

    def __getitem__(self, place: tuple[int, str] | int) -> Direction:
        """The direction at (layer, site), or at a layer when it has one direction only."""
        if isinstance(place, int):
            found = [key for key in self.items_by_place if key[0] == place]
            if len(found) != 1:
                raise KeyError(place)
            place = found[0]
        return self.items_by_place[place]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.items_by_place)

    def __len__(self) -> int:
        return len(self.items_by_place)

    def normalized(self) -> Directions:
        """Every direction at length 1."""
        return self._map(lambda one: one.normalized(), "normalized")

    def project_off(self, other: Directions | Direction) -> Directions:
        """Take away what lies along another direction, each at its own place.

        Args:
            other: Directions of the same places, or one direction for all places.

        Raises:
            DirectionError: If places, widths or models differ.
        """
        if isinstance(other, Direction):
            return self._map(
                lambda one: one.project_off(replace(other, layer=one.layer, site=one.site)),
                "project_off",
            )
        return self._join(other, Direction.project_off, "project_off")

    @staticmethod
    def mean_of(several: Sequence[Directions]) -> Directions:
        """The mean at each place, over seeds or question sets.

        Raises:
            DirectionError: If there is none, or places, widths or models differ.
        """
        if not several:
            raise DirectionError("there are no directions to take the mean of")
        for one in several[1:]:
            several[0]._same_places(one)
        items = {place: Direction.mean_of([one[place] for one in several]) for place in several[0]}
        return Directions(items, _made_by("mean", *several))

    def __add__(self, other: Directions) -> Directions:
        return self._join(other, Direction.__add__, "+")

    def __sub__(self, other: Directions) -> Directions:
        return self._join(other, Direction.__sub__, "-")

    def __neg__(self) -> Directions:
        return self * -1.0

    def __mul__(self, factor: float) -> Directions:
        if not isinstance(factor, int | float):
            return NotImplemented
        return self._map(lambda one: one * factor, f"* {factor}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Directions:
        if not isinstance(divisor, int | float):
            return NotImplemented
        return self._map(lambda one: one / divisor, f"/ {divisor}")

    def _map(self, change: Callable[[Direction], Direction], name: str) -> Directions:
        items = {place: change(one) for place, one in self.items()}
        return Directions(items, _made_by(name, self))

    def _join(
        self, other: Directions, change: Callable[[Direction, Direction], Direction], name: str
    ) -> Directions:
        if not isinstance(other, Directions):
            return NotImplemented
        self._same_places(other)
        items = {place: change(one, other[place]) for place, one in self.items()}
        return Directions(items, _made_by(name, self, other))

    def _same_places(self, other: Directions) -> None:
        if set(self) != set(other):
            lonely = sorted(set(self) ^ set(other))
            raise DirectionError(f"directions at different places: only one side has {lonely}")

    def steer(
        self,
        operator: str,
        strength: Strength = 1.0,
        *,
        scope: Scope | str = "all",
        gate: Gate | None = None,
        any_model: bool = False,
    ) -> Steer:
        """Steering with each direction at its own place; the arguments are those of `Steer`."""
        from lirefs.intervention import Steer

        return Steer(self, operator, strength, scope=scope, gate=gate, any_model=any_model)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the header holds places, statistics and provenance."""
        places = [
            {
                "layer": direction.layer,
                "site": direction.site,
                "means": direction.means,
                "spread": direction.spread,
                "counts": direction.counts,
            }
            for direction in self.values()
        ]
        metadata = {
            "format": FORMAT,
            "places": json.dumps(places),
            "provenance": json.dumps(self.provenance),
        }
        tensors = {
            f"{layer}.{site}": direction.vector.detach().float().cpu().contiguous().clone()
            for (layer, site), direction in self.items()
        }
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, lm: LanguageModel | None = None) -> Directions:
        """Read a file written by `save`.

        Args:
            path: The file.
            lm: When given, the file must come from this very model.

        Raises:
            DirectionsFileError: If the file is missing, truncated or of another format.
            ProvenanceError: If the directions were fitted on another model than `lm`, or the file
                does not say on which.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DirectionsFileError(f"{path}: not a file of directions")
                provenance = parse_json(metadata["provenance"])
                directions = [
                    _read_direction(file, place) for place in parse_json(metadata["places"])
                ]
            _check_whole(directions, provenance)
        except FileNotFoundError as error:
            raise DirectionsFileError(f"{path}: no such file") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DirectionsFileError(
                f"{path}: cannot be read as directions: {error}; fit or fetch them again"
            ) from error
        result = cls({(one.layer, one.site): one for one in directions}, provenance)
        if lm is not None and not provenance.get("model"):
            raise ProvenanceError(
                f"{path}: does not say which model it was fitted on; load it without the model, "
                "Directions.load(path), to use it all the same"
            )
        if lm is not None and provenance["model"] != lm.fingerprint:
            raise ProvenanceError(
                f"{path}: fitted on another model ({provenance.get('model_name')!r}, not "
                f"{lm.name!r})"
            )
        return result


def _read_direction(file: Any, place: dict[str, Any]) -> Direction:
    """One direction of an open file.

    Raises:
        KeyError: A field is missing.
        ValueError: A field is not of its type, or a number is not finite.
    """
    layer, site = place["layer"], place["site"]
    if type(layer) is not int or layer < 0 or site not in SITES:
        raise ValueError(f"no place of a direction: layer {layer!r:.40}, {site!r:.40}")
    vector = file.get_tensor(f"{layer}.{site}")
    if vector.dtype != torch.float32 or vector.ndim != 1 or not len(vector):
        raise ValueError(f"layer {layer}, {site}: no vector of float32")
    pairs = [place[key] for key in ("means", "spread", "counts")]
    numbers = [one for pair in pairs for one in pair]
    if any(len(pair) != 2 for pair in pairs) or not all(map(_is_number, numbers)):
        raise ValueError(
            f"layer {layer}, {site}: means, spread and counts must be two numbers each"
        )
    if any(type(one) is not int or one < 0 for one in pairs[2]):
        raise ValueError(f"layer {layer}, {site}: counts are {pairs[2]}")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"layer {layer}, {site}: the vector is not finite")
    means, spread, counts = map(tuple, pairs)
    return Direction(vector, layer, site, means, spread, counts)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_whole(directions: Sequence[Direction], provenance: Any) -> None:
    """Raise ValueError unless a file holds directions of one width, and an object beside them."""
    if not isinstance(provenance, dict) or not isinstance(provenance.get("model", ""), str):
        raise ValueError("the provenance is no object, or its model no text")
    if len({(one.layer, one.site) for one in directions}) != len(directions):
        raise ValueError("two directions of one place")
    if len({len(one.vector) for one in directions}) != 1:
        raise ValueError("no direction, or directions of several widths")


def _made_by(operation: str, *operands: Directions) -> dict[str, Any]:
    """The provenance of a result: what all operands share, and how it was made of them."""
    first = operands[0].provenance
    shared: dict[str, Any] = {
        key: first[key]
        for key in ("model", "model_name", "tokenizer")
        if key in first and all(one.provenance.get(key) == first[key] for one in operands)
    }
    return {**shared, "operation": operation, "operands": [one.provenance for one in operands]}
