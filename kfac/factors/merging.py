"""Factors of several data sets: merged, weighted, or subtracted again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kfac.factors.factors import Factors
from kfac.target import TargetRecord
from lirefs.errors import FactorsMismatchError, KfacError, as_list, must_be

# After a subtraction, a sum of squares may be negative by this share of its earlier value. Rounding
# stays far below it, even when batches of another shape ran in half precision.
_ROUNDING = 0.01


def merge(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Merge the factors of several data sets.

    Args:
        parts: Factors of the same targets of the same model, at least one.
        weights: Weight of each part's means, positive; they need not sum to 1. None weighs every
            counted position alike, which equals one collection over all data.

    Returns:
        Factors over all positions. Corrected eigenvalues (EK-FAC) are left out because they belong
        to the eigenbasis of one part, and so are sums that a part lacks.

    Raises:
        FactorsMismatchError: The targets, shapes, weights or shared inputs differ.
        KfacError: No parts, or weights that are not one positive number for each part.
    """
    as_list(parts, "parts", Factors, KfacError)
    if not parts:
        raise KfacError("no factors to merge")
    if weights is not None and (
        len(weights) != len(parts) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise KfacError(f"weights={weights!r}: one positive number for each of {len(parts)} parts")
    for part in parts[1:]:
        _check_same(parts[0], part, "merge")
    if len({part.digest for part in parts if part.tokens}) < sum(part.tokens > 0 for part in parts):
        raise KfacError("the same factors are given twice, and their data would count twice")
    totals = {name: sum(part.count(name) for part in parts) for name in parts[0].names}

    def scale(index: int, name: str) -> float:
        if weights is None or not parts[index].count(name):
            return 1.0
        share = sum(w for w, part in zip(weights, parts, strict=True) if part.count(name))
        return weights[index] * totals[name] / (share * parts[index].count(name))

    def add(key: str, name: str) -> Tensor:
        scaled = (part.sums[key] * scale(index, name) for index, part in enumerate(parts))
        return functools.reduce(torch.add, scaled)

    provenance: dict[str, object] = {"merged": [part.provenance for part in parts]}
    if weights is not None:
        provenance["weights"] = [float(weight) for weight in weights]
    labels = {part.labels for part in parts}
    return Factors(
        _with_counts(parts[0], totals),
        _combine(parts, add),
        seeds=[seed for part in parts for seed in part.seeds],
        tokens=sum(part.tokens for part in parts),
        labels=labels.pop() if len(labels) == 1 else "mixed",
        provenance=provenance,
        weighted=weights is not None or any(part.weighted for part in parts),
    )


def subtract(whole: Factors, part: Factors) -> Factors:
    """Remove the factors of a part of the data from merged factors (leave one set out).

    Args:
        whole: Factors that the part was merged into.
        part: What to remove.

    Returns:
        Factors that equal, up to rounding of the sums, those of the other data.

    Raises:
        FactorsMismatchError: The part has other targets, is not smaller than the whole or was not
            in it (sums of squares would turn negative), or one of the two was merged with weights.
    """
    _check_same(whole, part, "subtract")
    if whole.weighted or part.weighted:
        raise FactorsMismatchError(
            "cannot subtract: merging with weights rescaled the sums; merge the other parts instead"
        )
    rest = {name: whole.count(name) - part.count(name) for name in whole.names}
    if part.tokens >= whole.tokens or min(rest.values()) < 0:
        raise FactorsMismatchError(
            f"cannot subtract {part.tokens} tokens from {whole.tokens}: not a part of them"
        )
    sums = _combine([whole, part], lambda key, _: whole.sums[key] - part.sums[key])
    for key, difference in sums.items():
        squares, before = (
            table if key.startswith("D") else table.diagonal()
            for table in (difference, whole.sums[key])
        )
        if bool((squares < -_ROUNDING * before).any()):
            raise FactorsMismatchError(
                f"cannot subtract: sums of squares of target {key.partition('.')[2]!r} would turn "
                "negative, so the part was not in the whole; subtract only what was merged"
            )
    return Factors(
        _with_counts(whole, rest),
        sums,
        seeds=whole.seeds,
        tokens=whole.tokens - part.tokens,
        labels=whole.labels,
        provenance={"whole": whole.provenance, "without": part.provenance},
    )


def _check_same(first: Factors, other: Factors, verb: str) -> None:
    must_be(first, Factors, "factors", KfacError)
    must_be(other, Factors, "factors", KfacError)
    if first.names != other.names:
        raise FactorsMismatchError(
            f"cannot {verb}: targets differ ({first.names} and {other.names})"
        )
    for name, mine in first.records.items():
        theirs = other.records[name]
        if mine != replace(theirs, count=mine.count):
            raise FactorsMismatchError(
                f"cannot {verb}: target {name!r} was collected from another weight, shape or "
                f"input group ({mine} and {theirs})"
            )


def _with_counts(factors: Factors, counts: dict[str, int]) -> dict[str, TargetRecord]:
    return {name: replace(r, count=counts[name]) for name, r in factors.records.items()}


def _combine(
    parts: Sequence[Factors], operation: Callable[[str, str], Tensor]
) -> dict[str, Tensor]:
    """Return operation(key, target name) for each sum that all parts have and that can be added."""
    return {
        key: operation(key, key.partition(".")[2])
        for key in parts[0].sums
        if not key.startswith("E.") and all(key in part.sums for part in parts)
    }
