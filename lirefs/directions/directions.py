"""The directions of one model by place, with their provenance, in memory and in files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lirefs.directions.direction import Direction, places_text
from lirefs.directions.plots import draw_directions
from lirefs.errors import (
    DirectionError,
    DirectionsFileError,
    MissingError,
    ProvenanceError,
    must_be,
)
from lirefs.files import atomic_path, html_table, parse_json
from lirefs.model.identity import is_model
from lirefs.model.language_model import LanguageModel
from lirefs.questions.question import LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FORMAT = "lirefs-directions-1"
_FIELDS = ("layer", "site", "means", "spread", "counts")
"""What the header of a file holds about each direction."""


@dataclass(frozen=True, eq=False)
class Directions(Mapping[tuple[int, str], Direction]):
    """Directions of one model by (layer, site), with their provenance.

    Attributes:
        items_by_place: The directions.
        provenance: Hashes of model, tokenizer and data, settings and library version; `labels`
            are the two labels of the questions (those of files without them: reasoning, memory).

    Raises:
        DirectionError: If a key is not the (layer, site) of its direction, or the provenance has
            `labels` that are not two names.
    """

    items_by_place: dict[tuple[int, str], Direction]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        must_be(self.items_by_place, Mapping, "directions", DirectionError)
        must_be(self.provenance, Mapping, "provenance", DirectionError)
        if problem := _wrong_labels(self.provenance):
            raise DirectionError(problem)
        for place, one in self.items_by_place.items():
            must_be(one, Direction, f"the direction under {place!r}", DirectionError)
            if place != (one.layer, one.site):
                raise DirectionError(
                    f"the direction under {place} belongs to layer {one.layer}, {one.site}: "
                    "its key must be its own (layer, site)"
                )
        model = str(self.provenance.get("model", ""))
        items = {}
        for place, one in self.items_by_place.items():
            made_on, names = model or one.model, self.names if self.provenance else one.names
            same = (one.model, one.names) == (made_on, names)
            items[place] = one if same else replace(one, model=made_on, names=names)
        object.__setattr__(self, "items_by_place", items)

    def __getitem__(self, place: tuple[int, str] | int) -> Direction:
        """The direction at (layer, site), or at a layer that has only one direction.

        Raises:
            MissingError: There is none, or the layer has several (it is also a KeyError).
        """
        found = [one for key, one in self.items_by_place.items() if place in (key, key[0])]
        if len(found) != 1:
            problem = "several directions" if found else "no direction"
            raise MissingError(f"{problem} at {place!r}; there are {places_text(self)}")
        return found[0]

    @property
    def names(self) -> tuple[str, str]:
        """The two labels of the questions, first the one that the directions point to."""
        first, second = self.provenance.get("labels", LABELS)
        return first, second

    def __repr__(self) -> str:
        model = self.provenance.get("model_name", "an unknown model")
        return f"Directions({places_text(self)}; of {model})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), [one.row() for one in self.values()])

    def plot(self) -> Canvas:
        """Norm of each direction by layer, and the cosines between all of them.

        Returns:
            A matplotlib figure to show, restyle or save; pyplot does not know of it.
        """
        return draw_directions(list(self.values()))

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self.items_by_place)

    def __len__(self) -> int:
        return len(self.items_by_place)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all, replacing an existing one.

        The header holds places, statistics and provenance.
        """
        places = [{name: getattr(one, name) for name in _FIELDS} for one in self.values()]
        metadata = {
            "format": FORMAT,
            "places": json.dumps(places),
            "provenance": json.dumps(self.provenance),
        }
        tensors = {
            f"{layer}.{site}": one.vector.detach().float().cpu().contiguous().clone()
            for (layer, site), one in self.items()
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path, lm: LanguageModel | None = None) -> Directions:
        """Read a file written by `save`, as float32 on the CPU.

        Args:
            path: The file.
            lm: If given, the file must come from this model, with or without what is attached.

        Raises:
            DirectionsFileError: If the file is missing, damaged or of another format.
            ProvenanceError: If the directions were fitted on a model other than `lm`, or the file
                does not say on which.
        """
        must_be(path, (str, PathLike), "path", DirectionsFileError)
        must_be(lm, (LanguageModel, type(None)), "lm", DirectionsFileError)
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DirectionsFileError(f"{path}: not a file of directions")
                provenance = parse_json(metadata["provenance"])
                found = [_read_direction(file, one) for one in parse_json(metadata["places"])]
            if not isinstance(provenance, dict):
                raise ValueError("the provenance is not an object")
            if problem := _wrong_labels(provenance):
                raise ValueError(problem)
            if len({(one.layer, one.site) for one in found}) != len(found):
                raise ValueError("two directions of the same place")
            if len({len(one.vector) for one in found}) != 1:
                raise ValueError("no direction, or directions of several widths")
        except FileNotFoundError as error:
            raise DirectionsFileError(f"{path}: no such file") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DirectionsFileError(
                f"{path}: cannot be read as directions: {error}; fit or fetch them again"
            ) from error
        model = provenance.get("model")
        if lm is not None and not model:
            raise ProvenanceError(
                f"{path}: does not say which model it was fitted on; to use it anyway, load it "
                "without a model: Directions.load(path)"
            )
        if lm is not None and not is_model(lm.model, str(model)):
            name = provenance.get("model_name")
            raise ProvenanceError(f"{path}: fitted on another model ({name!r}, not {lm.name!r})")
        return cls({(one.layer, one.site): one for one in found}, provenance)


def _wrong_labels(provenance: Mapping[str, Any]) -> str | None:
    """What is wrong with the labels of a provenance, if it has any."""
    names = provenance.get("labels", LABELS)
    pair = isinstance(names, list | tuple) and len(names) == 2
    if pair and all(isinstance(one, str) for one in names):
        return None
    return f"the labels of the directions are {names!r:.60}, not two names"


def _read_direction(file: Any, place: dict[str, Any]) -> Direction:
    """One direction of an open file; KeyError or ValueError if a field is missing or wrong."""
    layer, site, *pairs = (place[name] for name in _FIELDS)
    if type(layer) is not int or layer < 0 or not isinstance(site, str):
        raise ValueError(f"not the place of a direction: layer {layer!r:.40}, {site!r:.40}")
    where = f"layer {layer}, {site}"
    vector = file.get_tensor(f"{layer}.{site}")
    if vector.dtype != torch.float32 or vector.ndim != 1 or not len(vector):
        raise ValueError(f"{where}: not a vector of float32")
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{where}: the vector is not finite")
    numbers = [one for pair in pairs for one in pair]
    finite = all(type(one) in (int, float) and math.isfinite(one) for one in numbers)
    if not finite or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{where}: means, spread and counts must be two numbers each")
    if any(type(one) is not int or one < 0 for one in pairs[2]):
        raise ValueError(f"{where}: counts are {pairs[2]}")
    means, spread, counts = map(tuple, pairs)
    return Direction(vector, layer, site, means, spread, counts)
