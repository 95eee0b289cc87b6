"""Directions in the residual stream: what was fitted, where, from what; arithmetic on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lirefs.errors import DirectionsFileError, ProvenanceError
from lirefs.files import atomic_path

if TYPE_CHECKING:
    from lirefs.intervention import Steer
    from lirefs.models import LanguageModel

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
    """

    vector: Tensor
    layer: int
    site: str = "resid_pre"
    means: tuple[float, float] = (0.0, 0.0)
    spread: tuple[float, float] = (0.0, 0.0)
    counts: tuple[int, int] = (0, 0)

    @property
    def unit(self) -> Tensor:
        """The vector at length 1; zero when the vector is zero."""
        norm = self.vector.norm()
        return self.vector / norm if norm > 0 else self.vector

    @property
    def norm(self) -> float:
        """Length of the vector, in units of the activations."""
        return float(self.vector.norm())

    def project(self, states: Tensor) -> Tensor:
        """Component of hidden states along the unit vector: (..., width) to (...)."""
        return states.to(self.vector.dtype) @ self.unit.to(states.device)

    def random_like(self, seed: int) -> Direction:
        """A random direction of the same norm at the same place: the control."""
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(self.vector.shape, generator=generator)
        return replace(
            self,
            vector=vector / vector.norm() * self.vector.norm().cpu(),
            means=(0.0, 0.0),
            spread=(0.0, 0.0),
            counts=(0, 0),
        )

    def steer(
        self, operator: str, strength: float = 1.0, layers: str | Iterable[int] | None = None
    ) -> Steer:
        """Steering along this direction.

        Args:
            operator: `"add"`, `"ablate"` or `"amplify"`.
            strength: The factor a of `add` and `amplify`; `ablate` takes none but 1.
            layers: Where to apply it: None for the direction's own layer, `"all"`, or indices.
        """
        from lirefs.intervention import Steer

        return Steer(self, operator, strength, layers=layers)


@dataclass(frozen=True, eq=False)
class Directions(Mapping[tuple[int, str], Direction]):
    """Directions of one model by (layer, site), with what made them.

    Attributes:
        items_by_place: The directions.
        provenance: Hashes of model, tokenizer and data, settings and library version.
    """

    items_by_place: dict[tuple[int, str], Direction]
    provenance: dict[str, Any] = field(default_factory=dict)

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

    def steer(self, operator: str, strength: float = 1.0) -> Steer:
        """Steering with each direction at its own place."""
        from lirefs.intervention import Steer

        return Steer(self, operator, strength)

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
            f"{layer}.{site}": direction.vector.detach().float().cpu().contiguous()
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
            ProvenanceError: If the directions were fitted on another model than `lm`.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DirectionsFileError(f"{path}: not a file of directions")
                provenance = json.loads(metadata["provenance"])
                directions = [
                    Direction(
                        vector=file.get_tensor(f"{place['layer']}.{place['site']}"),
                        layer=int(place["layer"]),
                        site=str(place["site"]),
                        means=tuple(place["means"]),
                        spread=tuple(place["spread"]),
                        counts=tuple(place["counts"]),
                    )
                    for place in json.loads(metadata["places"])
                ]
        except FileNotFoundError as error:
            raise DirectionsFileError(f"{path}: no such file") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DirectionsFileError(f"{path}: cannot be read as directions: {error}") from error
        result = cls({(one.layer, one.site): one for one in directions}, provenance)
        if lm is not None and provenance.get("model") != lm.fingerprint:
            raise ProvenanceError(
                f"{path}: fitted on another model ({provenance.get('model_name')!r}, not "
                f"{lm.name!r})"
            )
        return result
