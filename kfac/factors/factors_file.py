"""What a file of factors must hold, and nothing else is let in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac.target import TargetRecord
from lirefs.errors import FactorsFileError

FORMAT = 1


def parts(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `Factors` that a file holds.

    Args:
        header: Its JSON header.
        tensors: Its tensors by key.

    Returns:
        Names and values for the constructor.

    Raises:
        FactorsFileError: The file is of another format.
        KeyError: A field is missing.
        TypeError: A field is of another type.
        ValueError: A field or tensor is not what it must be.
    """
    if header["format"] != FORMAT:
        raise FactorsFileError(
            f"factors of format {header['format']!r:.40} (written by version "
            f"{header['version']!r:.40}); this version reads format {FORMAT}"
        )
    records = {name: TargetRecord(**record) for name, record in header["targets"].items()}
    bases = {
        key: (tensors["values." + key], tensors["vectors." + key])
        for key in [key[7:] for key in tensors if key.startswith("values.")]
    }
    of_bases = {f"{kind}.{key}" for key in bases for kind in ("values", "vectors")}
    sums = {key: tensor for key, tensor in tensors.items() if key not in of_bases}
    _check_header(header, records)
    _check_shapes(records, sums, bases)
    _check_values(sums, bases)
    return {
        "records": records,
        "sums": sums,
        "seeds": header["seeds"],
        "tokens": header["tokens"],
        "labels": header.get("labels", "sampled"),
        "provenance": header["provenance"],
        "bases": bases,
        "weighted": header.get("weighted", False),
    }


def _check_header(header: Mapping[str, Any], records: Mapping[str, TargetRecord]) -> None:
    """Raise ValueError or KeyError unless the fields of a file have their types."""
    numbers = [header["tokens"]]
    for name, record in records.items():
        sizes = [record.out_features, record.in_features]
        shared = records[record.source]
        if shared.source != record.source or shared.in_features != record.in_features:
            raise ValueError(f"target {name!r} cannot share the input of {record.source!r}")
        if not isinstance(record.digest, str) or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"the record of target {name!r} has a field of another type")
        numbers.append(record.count)
    if not records or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError("no targets, or counts that are no whole numbers of at least 0")
    if not isinstance(header["seeds"], list) or not all(type(n) is int for n in header["seeds"]):
        raise ValueError("its seeds are no list of whole numbers")
    if header.get("labels", "sampled") not in ("sampled", "data", "mixed"):
        raise ValueError("its labels are neither sampled, nor the data's, nor mixed")
    if (
        not isinstance(header["provenance"], dict)
        or type(header.get("weighted", False)) is not bool
    ):
        raise ValueError("its provenance is no object, or `weighted` neither true nor false")


def _check_values(sums: Mapping[str, Tensor], bases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError unless sums and eigenbases are numbers, and second moments symmetric."""
    for key, table in [*sums.items(), *((key, one) for key, both in bases.items() for one in both)]:
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{key} is of {table.dtype}, expected float32 or float64")
        if not bool(table.isfinite().all()):
            raise ValueError(f"{key} is not finite")
    for key, table in sums.items():
        # Those that were collected are equal to the bit; others may have been rounded.
        if not key.startswith(("A", "G")) or torch.equal(table, table.T):
            continue
        if float((table - table.T).abs().max()) > 1e-3 * float(table.abs().max()):
            raise ValueError(f"{key} is not symmetric")
    for key, (values, _) in bases.items():
        if bool((values < 0).any()) or bool((values[1:] > values[:-1]).any()):
            raise ValueError(f"the eigenvalues of {key} are negative or not in descending order")


def _check_shapes(
    records: Mapping[str, TargetRecord],
    sums: Mapping[str, Tensor],
    bases: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Raise ValueError unless a file holds exactly the tensors that its targets ask for."""
    letters = {key.partition(".")[0] for key in sums} | {"A", "G"}
    expected: dict[str, tuple[int, int]] = {}
    for name, record in records.items():
        out, into = record.out_features, record.in_features
        shapes = {"A": (into, into), "G": (out, out), "AW": (into, into), "GW": (out, out)}
        for letter in letters:
            key = f"{letter}.{record.source if letter == 'A' else name}"
            expected[key] = shapes.get(letter, (out, into))
    found = {key: tuple(tensor.shape) for key, tensor in sums.items()}
    if found != expected:
        raise ValueError(f"its tensors do not match its targets: {found}")
    wanted = {key for key in expected if key.startswith(("A.", "G."))} if "E" in letters else set()
    squares = {
        key
        for key, (values, vectors) in bases.items()
        if (tuple(vectors.shape), tuple(values.shape)) == (expected[key], expected[key][:1])
    }
    if set(bases) != wanted or squares != wanted:
        raise ValueError(f"its eigenbases do not match its targets: {sorted(bases)}")
