"""Edits that keep some eigenvector pairs of a weight and remove the rest."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kfac.edits.selection import SHAPES, Selection, TableSelection, select_largest, select_separable
from kfac.edits.staircase import check_keep
from kfac.edits.weight_edit import WeightEdit
from kfac.factors.eigen import Eigen
from kfac.factors.factors import Factors
from kfac.target import Target, weight_digest
from lirefs.errors import EditError, EstimatorError, FactorsMismatchError, KeepError
from lirefs.model.guest import full_precision, widened
from lirefs.model.weight_swap import originals_of

# Eigenvectors as an edit multiplies them, by factors, then by what they belong to, device and
# dtype. Without this each step of a sweep would copy both bases from float64 on the CPU.
_BASES: WeakKeyDictionary[Factors, dict[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TargetReport:
    """What an edit does to one target.

    Attributes:
        name: Target name.
        pairs: Kept eigenvector pairs.
        total_pairs: All pairs.
        kept_share: pairs / total_pairs.
        kept_mass: Share of the curvature mass (of the score, where that is another) that is kept.
        rank_bound: Largest rank the edited weight can have.
        relative_change: ‖W' − W‖ / ‖W‖ (Frobenius), or None if no model was given.
    """

    name: str
    pairs: int
    total_pairs: int
    kept_share: float
    kept_mass: float
    rank_bound: int
    relative_change: float | None


class SpectralEdit(WeightEdit):
    """Base of edits that keep some entries of C = U_Gᵀ W U_A and zero the rest.

    Args:
        factors: Factors of the model to be edited.
        keep: Fraction of the curvature mass to keep, in (0, 1]; or one for each target name, then
            only these targets are edited.

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
    """

    def __init__(self, factors: Factors, keep: float | Mapping[str, float]) -> None:
        self.factors = factors
        if isinstance(keep, Mapping):
            unknown = [name for name in keep if name not in factors.records]
            if unknown or not keep:
                raise KeepError(f"keep names {unknown or 'nothing'}; targets: {factors.names}")
            self._keeps = {name: check_keep(value) for name, value in keep.items()}
            self.keep: float | dict[str, float] = dict(self._keeps)
        else:
            self.keep = check_keep(keep)
            self._keeps = dict.fromkeys(factors.names, self.keep)

    @abc.abstractmethod
    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Return the pairs of a target that are kept.

        Args:
            name: Target name.
            coordinates: The rotated weight (out, in); None where there is no model.

        Returns:
            The kept pairs.
        """

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the edited weights; a target with keep 1 is left alone.

        Args:
            model: The model of the factors.

        Returns:
            Target and new weight (out, in), in the dtype of the weight.

        Raises:
            FactorsMismatchError: The factors do not belong to this model.
            EditError: A target has no curvature mass.
        """
        return [(target, weight) for target, weight, _ in self._prepare(model)]

    def describe(self) -> dict[str, Any]:
        """Return kind, keep and the digest of the factors.

        Returns:
            JSON values.
        """
        return {"kind": self.kind, "keep": self.keep, "factors": self.factors.digest}

    def report(self, model: nn.Module | None = None) -> list[TargetReport]:
        """Return what the edit keeps of each target.

        Args:
            model: If given, the relative change of its weights is computed too.

        Returns:
            One row for each target, in order.

        Raises:
            FactorsMismatchError: The factors do not belong to the model.
            EditError: The choice depends on the weights, and no model was given.
        """
        chosen: dict[str, Selection] = {}
        changes: dict[str, float] = {}
        if model is not None:
            changes = dict.fromkeys(self._keeps, 0.0)
            for target, weight, selection in self._prepare(model):
                original = target.weight.double()
                changes[target.name] = float((weight - original).norm() / original.norm())
                chosen[target.name] = selection
        result = []
        for name, keep in self._keeps.items():
            if keep == 1:
                record = self.factors.records[name]
                every = torch.ones(record.out_features, record.in_features, dtype=torch.bool)
                one: Selection = TableSelection(every, 1.0)
            else:
                one = chosen.get(name) or self._checked_choice(name, None)
            result.append(
                TargetReport(
                    name,
                    one.pairs,
                    one.total_pairs,
                    one.pairs / one.total_pairs,
                    one.kept_mass,
                    one.rank_bound,
                    changes.get(name),
                )
            )
        return result

    def _prepare(self, model: nn.Module) -> list[tuple[Target, Tensor, Selection]]:
        targets = self.factors.targets(model, self._keeps)
        digests = [check_weight(self.factors, target) for target in targets]
        return [
            (target, *self._edited(target.name, target.weight, digest))
            for target, digest in zip(targets, digests, strict=True)
            if self._keeps[target.name] < 1
        ]

    def _edited(self, name: str, weight: Tensor, digest: str) -> tuple[Tensor, Selection]:
        # float32 suffices: eigenvectors come from float64, and the two rotations add an error of
        # about 1e-6 of the weight, a thousandth of a bfloat16 rounding step.
        with full_precision(weight.device):
            coordinates = self._coordinates(name, weight, digest)
            chosen = self._checked_choice(name, coordinates)
            kept = coordinates.masked_fill(~chosen.mask(coordinates.device), 0.0)
            return self._rotate_back(name, kept).to(weight.dtype), chosen

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        return self.factors.coordinates(name, weight, digest)

    def _bases(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        return device_bases(self.factors, name, like)

    def _rotate_back(self, name: str, kept: Tensor) -> Tensor:
        """Return U_G kept U_Aᵀ; rows and columns that hold nothing cost nothing."""
        u_out, u_in = self._bases(name, kept)
        rows, columns = kept.any(1).nonzero()[:, 0], kept.any(0).nonzero()[:, 0]
        if len(rows) < len(kept):
            kept, u_out = kept[rows], u_out[:, rows]
        if len(columns) < kept.shape[1]:
            kept, u_in = kept[:, columns], u_in[:, columns]
        # The order of the two products that needs fewer operations.
        m, n, r, c = len(u_out), len(u_in), *kept.shape
        if m * r * c + m * c * n <= r * c * n + m * r * n:
            return (u_out @ kept) @ u_in.T
        return u_out @ (kept @ u_in.T)

    def _checked_choice(self, name: str, coordinates: Tensor | None) -> Selection:
        chosen = self.choose(name, coordinates)
        if not chosen.pairs:
            raise EditError(
                f"target {name!r} has no curvature mass (all activations or all gradients were "
                "zero), so there is nothing to rank its weights by"
            )
        return chosen


class CurvatureEdit(SpectralEdit):
    """Remove the flat directions of weights (Merullo et al. 2025, arXiv 2510.24256).

    With G = U_G diag(λ) U_Gᵀ and A = U_A diag(μ) U_Aᵀ, W' = U_G (M ∘ (U_Gᵀ W U_A)) U_Aᵀ. The mask M
    keeps the fewest pairs (i, j) of largest mass λᵢ·μⱼ that hold `keep` of the total mass.
    The rotated weights are cached in the factors, so a sweep over `keep` is cheap.

    Args:
        factors: Factors of the model to be edited.
        keep: Fraction of the mass to keep, in (0, 1]; or one for each target name.
        estimator: Where the mass comes from, one of `ESTIMATORS`; "diagonal" ranks the entries of
            the weight itself.
        shape: "pairs" as above; "rectangle", "output" or "input": see `select_separable`.
        saliency: Rank by mass times Cᵢⱼ², twice the loss that the removal of one pair alone costs.

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
        EditError: The shape is unknown, or does not go with the estimator or with `saliency`.
        EstimatorError: The factors cannot give this estimator.
    """

    kind = "kfac"

    def __init__(
        self,
        factors: Factors,
        keep: float | Mapping[str, float],
        *,
        estimator: str = "kfac",
        shape: str = "pairs",
        saliency: bool = False,
    ) -> None:
        super().__init__(factors, keep)
        if shape not in SHAPES:
            raise EditError(f"shape={shape!r} is unknown: use one of {', '.join(SHAPES)}")
        if estimator not in factors.estimators:
            raise EstimatorError(
                f"estimator={estimator!r} is not among those that these factors give: "
                f"{', '.join(factors.estimators)}"
            )
        if shape != "pairs" and (saliency or estimator in ("ekfac", "diagonal")):
            raise EditError(
                f"shape={shape!r} ranks whole sides, but estimator={estimator!r} with "
                f"saliency={saliency} ranks single pairs; use shape='pairs'"
            )
        self.estimator, self.shape, self.saliency = estimator, shape, saliency

    def with_keep(self, keep: float | Mapping[str, float]) -> CurvatureEdit:
        """Return the same edit at another `keep`.

        Args:
            keep: As in the constructor.

        Returns:
            A new edit on the same factors.
        """
        return CurvatureEdit(
            self.factors,
            keep,
            estimator=self.estimator,
            shape=self.shape,
            saliency=self.saliency,
        )

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, estimator, shape, saliency and the digest of the factors.

        Returns:
            JSON values.
        """
        return super().describe() | {
            "estimator": self.estimator,
            "shape": self.shape,
            "saliency": self.saliency,
        }

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep the pairs of largest mass, or of largest mass times squared coordinate.

        Args:
            name: Target name.
            coordinates: The rotated weight (out, in); None where there is no model.

        Returns:
            A staircase for separable estimators, a table for the others.

        Raises:
            EditError: The saliency depends on the weights, and there is no model.
        """
        keep = self._keeps[name]
        curvature = self.factors.curvature(name, self.estimator)
        if self.saliency:
            if coordinates is None:
                raise EditError("saliency depends on the weights: give the model to report")
            mass = curvature.mass()
            # Scaled exactly, so that a product with squared float32 weights does not underflow.
            mass = mass.double() / float(mass.max().clamp(min=torch.finfo(torch.float32).tiny))
            return select_largest(mass * coordinates.detach().cpu().double() ** 2, keep)
        if curvature.lam is not None and curvature.mu is not None:
            return select_separable(curvature.lam, curvature.mu, keep, self.shape)
        return select_largest(curvature.mass(), keep)

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        if self.estimator == "diagonal":
            return widened(weight)
        return super()._coordinates(name, weight, digest)

    def _rotate_back(self, name: str, kept: Tensor) -> Tensor:
        return kept if self.estimator == "diagonal" else super()._rotate_back(name, kept)


def device_bases(factors: Factors, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return U_G and U_A of a target on the device and in the dtype of `like`; kept for later."""
    known = _BASES.setdefault(factors, {})
    basis: Eigen | None = None
    result = []
    for side, owner in (("u_out", name), ("u_in", factors.records[name].source)):
        key = (side, owner, like.device, like.dtype)
        if key not in known:
            basis = basis or factors.eigen(name)
            known[key] = getattr(basis, side).to(like.device, like.dtype)
        result.append(known[key])
    return result[0], result[1]


def check_weight(factors: Factors, target: Target) -> str:
    """Return the digest of a target's current weight, after checking that the factors fit it.

    They fit the weight as it is, or as it was under the edits that are in place now.

    Raises:
        FactorsMismatchError: They were collected from other weights.
    """
    expected = factors.records[target.name].digest
    digest = weight_digest(target.weight)
    if digest == expected:
        return digest
    for original in map(target.view, originals_of(target.parameter)):
        if weight_digest(original) == expected:
            return digest
    raise FactorsMismatchError(
        f"target {target.name!r}: the factors were collected from other weights (another "
        "checkpoint or another dtype)"
    )
