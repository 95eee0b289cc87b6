"""Edits by the curvature of two data sets: protect one set, or remove what only one set curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac.edits.selection import Selection, TableSelection, select_largest
from kfac.edits.spectral import SpectralEdit
from kfac.factors.eigen import eigenbasis
from kfac.factors.factors import Factors
from lirefs.errors import EditError, FactorsMismatchError, KfacError, must_be
from lirefs.model.guest import widened


class UnionEdit(SpectralEdit):
    """Keep what either of two data sets curves, so that an edit spares a skill (arithmetic, say).

    Both sets are scaled to a total mass of 1. The basis of each side comes from the weighted mean
    of the two factors; a pair's score is the weighted mean of the masses that the two sets give it.
    (Products of the mean factors would also count pairs where one set has curvature on one side
    and the other set on the other.)

    Args:
        factors: Factors of general text.
        protected: Factors of texts that need the skill, of the same targets and weights.
        keep: Fraction of the summed score to keep, in (0, 1]; or one for each target name.
        weight: Share of the protected set in the score, in [0, 1].

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
        EditError: `weight` is out of range.
        FactorsMismatchError: The two sets were collected from different targets or weights.
    """

    kind = "union"

    def __init__(
        self,
        factors: Factors,
        protected: Factors,
        keep: float | Mapping[str, float],
        *,
        weight: float = 0.5,
    ) -> None:
        super().__init__(factors, keep)
        if not 0 <= weight <= 1:
            raise EditError(f"weight={weight!r} must be a share in [0, 1]")
        check_same_weights(factors, protected)
        self.protected, self.weight = protected, float(weight)
        self._made: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._rotated: dict[tuple[str, str, torch.device], Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, weight and the digests of both sets of factors."""
        return super().describe() | {"protected": self.protected.digest, "weight": self.weight}

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep the pairs of largest score."""
        return select_largest(self._union(name)[2], self._keeps[name])

    def _decompose(self, *, spread: bool = False) -> None:
        """Do nothing: the bases are those of the two sets together."""

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        key = (name, digest, weight.device)
        if key not in self._rotated:
            wide = widened(weight)
            u_out, u_in = self._bases(name, wide)
            self._rotated[key] = u_out.T @ wide @ u_in
        return self._rotated[key]

    def _bases(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        u_out, u_in, _ = self._union(name)
        return u_out.to(like.device, like.dtype), u_in.to(like.device, like.dtype)

    def _union(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return both bases and the score of each pair."""
        if name not in self._made:
            parts = [(self.factors, 1 - self.weight), (self.protected, self.weight)]
            outs = [share * _unit_trace(one.G(name), name) for one, share in parts]
            ins = [share * _unit_trace(one.A(name), name) for one, share in parts]
            u_out, u_in = (eigenbasis(sides[0] + sides[1])[1] for sides in (outs, ins))
            score = torch.zeros(len(u_out), len(u_in), dtype=torch.float64)
            for out, inside, (_, share) in zip(outs, ins, parts, strict=True):
                if share > 0:  # both sides carry the share, so one of the two is divided out
                    score += (
                        torch.outer(
                            second_moments_along(out, u_out), second_moments_along(inside, u_in)
                        )
                        / share
                    )
            self._made[name] = (u_out, u_in, score)
        return self._made[name]


class RemovalEdit(SpectralEdit):
    """Remove the pairs that hold a data set's own curvature: the reverse of `CurvatureEdit`.

    Args:
        factors: Factors of the set whose curvature is removed (memorized texts, say).
        keep: Fraction of the set's mass to keep, in (0, 1]; or one for each target name. The fewest
            pairs that hold the rest are removed.
        spared: Factors of general text. If given, pairs are ranked by the set's mass divided by the
            mass of this text (each of total 1), so that what all text needs is removed last;
            otherwise by the set's mass alone.

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
        FactorsMismatchError: The two sets were collected from different targets or weights.
        EditError: On application: the set has no mass, or no pair would be left.
    """

    kind = "removal"

    def __init__(
        self, factors: Factors, keep: float | Mapping[str, float], *, spared: Factors | None = None
    ) -> None:
        super().__init__(factors, keep)
        if spared is not None:
            check_same_weights(factors, spared)
        self.spared = spared
        self._scores: dict[str, tuple[Tensor, Tensor]] = {}

    def describe(self) -> dict[str, Any]:
        """Return kind, keep and the digests of the factors."""
        spared = None if self.spared is None else self.spared.digest
        return super().describe() | {"spared": spared}

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep all but the pairs of largest score."""
        score, mass = self._ranked(name)
        removed = select_largest(score, 1 - self._keeps[name], weights=mass)
        if removed.pairs == removed.total_pairs:
            raise EditError(
                f"target {name!r}: keep={self._keeps[name]} would remove every pair, as too few of "
                "them hold the mass; use a larger keep"
            )
        return TableSelection(~removed.table, 1 - removed.kept_mass)

    def _ranked(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the score that ranks the pairs and the set's own mass, each (out, in)."""
        if name not in self._scores:
            basis = self.factors.eigen(name)
            mass = torch.outer(basis.lam, basis.mu)
            total = mass.sum()
            if total <= 0:
                raise EditError(f"target {name!r} has no curvature mass in the set to remove")
            score = mass = mass / total
            if self.spared is not None:
                out = second_moments_along(_unit_trace(self.spared.G(name), name), basis.u_out)
                inside = second_moments_along(_unit_trace(self.spared.A(name), name), basis.u_in)
                general = torch.outer(out, inside)
                # The floor, far below the rounding of float32 sums, keeps the score finite where
                # the general text has no mass.
                score = mass / general.clamp(min=1e-12 / general.numel())
            self._scores[name] = (score, mass)
        return self._scores[name]


def second_moments_along(matrix: Tensor, basis: Tensor) -> Tensor:
    """Return uᵢᵀ M uᵢ for each column uᵢ of a basis (d, k): the second moment along it, (k,)."""
    wide = matrix.to(basis.dtype)
    result: Tensor = torch.einsum("ij,ij->j", basis, wide @ basis).clamp(min=0)
    return result


def check_same_weights(first: Factors, second: Factors) -> None:
    """Verify that the second factors have all targets of the first, with the same weights."""
    for one in (first, second):
        must_be(one, Factors, "factors", KfacError)
    for name, record in first.records.items():
        if (other := second.records.get(name)) is None:
            raise FactorsMismatchError(f"the second factors have no target {name!r}")
        if record != replace(other, count=record.count, source=record.source):
            raise FactorsMismatchError(
                f"target {name!r}: the two sets of factors were collected from other weights"
            )


def _unit_trace(matrix: Tensor, name: str) -> Tensor:
    wide = matrix.double()
    trace = float(wide.diagonal().sum())
    if trace <= 0:
        raise EditError(f"target {name!r} has no curvature mass in one of the two sets")
    return wide / trace
