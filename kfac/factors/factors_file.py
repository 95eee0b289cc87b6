"""What a file of factors must hold; anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac.target import TargetRecord
from lirefs.errors import FactorsFileError, KfacError
from lirefs.files import parse_json

FORMAT = 1


def checked_provenance(provenance: Any) -> dict[str, Any]:
    """Return JSON values that a file can hold and give back; KfacError for anything else."""
    try:
        found = {} if provenance is None else dict(provenance)
        parse_json(json.dumps(found))
    except (TypeError, ValueError, RecursionError) as problem:
        raise KfacError(f"provenance must be a mapping of JSON values: {problem}") from problem
    return found


def factors_arguments(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `Factors` that the header and tensors of a file hold.

    Another format is a FactorsFileError; damage is a KeyError, TypeError, ValueError or
    AttributeError.
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
    of_bases = {f"{half}.{key}" for key in bases for half in ("values", "vectors")}
    sums = {key: tensor for key, tensor in tensors.items() if key not in of_bases}
    arguments = {
        "records": records,
        "sums": sums,
        "seeds": header["seeds"],
        "tokens": header["tokens"],
        "labels": header.get("labels", "sampled"),
        "provenance": header["provenance"],
        "bases": bases,
        "weighted": header.get("weighted", False),
    }
    _check_fields(arguments)
    _check_shapes(records, sums, bases)
    _check_values(sums, bases)
    return arguments


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError unless the fields of a file have their types."""
    records: Mapping[str, TargetRecord] = fields["records"]
    numbers = [fields["tokens"]]
    for name, record in records.items():
        sizes = [record.out_features, record.in_features]
        shared = records[record.source]
        if shared.source != record.source or shared.in_features != record.in_features:
            raise ValueError(f"target {name!r} cannot share the input of {record.source!r}")
        if not isinstance(record.digest, str) or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"the record of target {name!r} has a field of the wrong type")
        numbers.append(record.count)
    if not records or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError("it has no targets, or counts that are not whole numbers of at least 0")
    if not isinstance(fields["seeds"], list) or not all(type(n) is int for n in fields["seeds"]):
        raise ValueError("its seeds are not a list of whole numbers")
    if fields["labels"] not in ("sampled", "exact", "data", "mixed"):
        raise ValueError("its labels are not 'sampled', 'exact', 'data' or 'mixed'")
    if not isinstance(fields["provenance"], dict) or type(fields["weighted"]) is not bool:
        raise ValueError("its provenance is not an object, or `weighted` is not true or false")


def _check_values(sums: Mapping[str, Tensor], bases: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError unless all tensors are finite floats and second moments are symmetric."""
    for key, table in [*sums.items(), *((key, one) for key, both in bases.items() for one in both)]:
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{key} has dtype {table.dtype}, expected float32 or float64")
        if not bool(table.isfinite().all()):
            raise ValueError(f"{key} is not finite")
    for key, table in sums.items():
        # Collected sums are symmetric to the bit; others may have been rounded.
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
    """Raise ValueError unless a file holds exactly the tensors that its targets need."""
    kinds = {key.partition(".")[0] for key in sums} | {"A", "G"}
    expected = {
        record.key(kind, name): record.shape(kind)
        for name, record in records.items()
        for kind in kinds
    }
    found = {key: tuple(tensor.shape) for key, tensor in sums.items()}
    if found != expected:
        raise ValueError(f"its tensors do not match its targets: {found}")
    wanted = {
        key: (shape[:1], shape)
        for key, shape in expected.items()
        if "E" in kinds and key.startswith(("A.", "G."))
    }
    if wanted != {key: tuple(tuple(one.shape) for one in both) for key, both in bases.items()}:
        raise ValueError(f"its eigenbases do not match its targets: {sorted(bases)}")
