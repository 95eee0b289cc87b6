"""Edits that keep some eigenvector pairs of a weight and remove the rest."""

from __future__ import annotations

import abc
import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from kfac.edits.rotation import keep_stairs
from kfac.edits.selection import (
    SHAPES,
    OrderedSelection,
    Selection,
    TableSelection,
    select_largest,
    select_separable,
)
from kfac.edits.staircase import check_keep
from kfac.edits.weight_edit import WeightEdit, check_weight
from kfac.factors.factors import Factors
from kfac.target import Target
from lirefs.errors import EditError, EstimatorError, KeepError, must_be
from lirefs.model.guest import full_precision, widened
from lirefs.model.weight_swap import is_sharded
from lirefs.statistics.intervals import Ints


@dataclass(frozen=True)
class TargetReport:
    """What an edit does to one target.

    Attributes:
        name: Target name.
        pairs: Kept eigenvector pairs.
        total_pairs: All pairs.
        kept_share: pairs / total_pairs.
        kept_mass: Kept share of the curvature mass, or of whatever score the edit ranks by.
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

    def __repr__(self) -> str:
        text = (
            f"{self.name}: {self.pairs:,} of {self.total_pairs:,} pairs ({self.kept_share:.1%}), "
            f"{self.kept_mass:.1%} of the mass, rank at most {self.rank_bound}"
        )
        if self.relative_change is not None:
            text += f", changed by {self.relative_change:.1%}"
        return f"TargetReport({text})"


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
        must_be(factors, Factors, "factors", EditError)
        if isinstance(keep, Mapping):
            unknown = [name for name in keep if name not in factors.records]
            if unknown or not keep:
                raise KeepError(f"keep names {unknown or 'nothing'}; targets: {factors.names}")
            self._keeps = {name: check_keep(value) for name, value in keep.items()}
            self.keep: float | dict[str, float] = dict(self._keeps)
        else:
            self.keep = check_keep(keep)
            self._keeps = dict.fromkeys(factors.names, self.keep)

    def __repr__(self) -> str:
        keeps = sorted(set(self._keeps.values()))
        shown = f"{keeps[0]:g}" if len(keeps) == 1 else f"{keeps[0]:g} to {keeps[-1]:g}"
        return f"{type(self).__name__}({len(self._keeps)} targets, keep={shown})"

    @abc.abstractmethod
    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Return the pairs of a target's (out, in) table that are kept; its keep is below 1.

        Args:
            name: Target name.
            coordinates: The rotated weight (out, in); None without a model.
        """

    def with_keep(self, keep: float | Mapping[str, float]) -> Self:
        """Return the same edit at another `keep`; it shares what has been computed already."""
        other = copy.copy(self)
        SpectralEdit.__init__(other, self.factors, keep)
        return other

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the edited weights, in the dtype of the weight; a keep of 1 changes nothing.

        Raises:
            FactorsMismatchError: The factors do not belong to this model.
            EditError: A target has no curvature mass.
        """
        return list(self.prepare_in_turn(model))

    def prepare_in_turn(self, model: nn.Module) -> Iterator[tuple[Target, Tensor]]:
        """Compute each edited weight when it is taken, so that one at a time is in memory."""
        return ((target, weight) for target, weight, _ in self._prepare(model))

    def describe(self) -> dict[str, Any]:
        """Return kind, keep and the digest of the factors."""
        return {"kind": self.kind, "keep": self.keep, "factors": self.factors.digest}

    def report(self, model: nn.Module | None = None) -> list[TargetReport]:
        """Return what the edit keeps of each target, and if a model is given, how it changes.

        Raises:
            FactorsMismatchError: The factors do not belong to the model.
            EditError: The choice depends on the weights, and no model was given.
        """
        found: dict[str, tuple[Selection, float]] = {}
        if model is not None:
            for target, weight, selection in self._prepare(model):
                original = target.weight.double()
                change = float((weight - original).norm() / original.norm())
                found[target.name] = (selection, change)
        else:
            self._decompose()
        unchanged = None if model is None else 0.0
        rows = []
        for name in self._keeps:
            one, moved = found.get(name) or (self._selection(name, None), unchanged)
            counts = (one.pairs, one.total_pairs, one.pairs / one.total_pairs)
            rows.append(TargetReport(name, *counts, one.kept_mass, one.rank_bound, moved))
        return rows

    def bake_in_turn(self, model: nn.Module) -> list[TargetReport]:
        """Put the edited weights in place for good, one input at a time, and report on each target.

        The weights are those of `bake`. The decompositions, rotated weights and edited weights of
        targets that read one input are freed before those of the next are computed, so beside model
        and factors there is never more than these in memory. An error leaves the model edited in
        part: load it again.

        Raises:
            FactorsMismatchError: The factors do not belong to this model; nothing is changed.
            EditError: As for `bake`.
        """
        records = self.factors.records
        for target in self.factors.targets(model, self._keeps):
            check_weight(target, records[target.name].digest)
        reports = []
        for _, names in itertools.groupby(self._keeps, key=lambda name: records[name].source):
            part = self.with_keep({name: self._keeps[name] for name in names})
            reports += part.report(model)
            part.bake(model)
            self.factors.forget(part._keeps)
        return reports

    def _prepare(self, model: nn.Module) -> Iterator[tuple[Target, Tensor, Selection]]:
        records = self.factors.records
        targets = self.factors.targets(model, self._keeps)
        digests = {one.name: check_weight(one, records[one.name].digest) for one in targets}
        # All processes of a sharded model are here, and each writes a part of the same weights.
        self._decompose(spread=any(is_sharded(target.parameter) for target in targets))
        for target in targets:
            name, weight = target.name, target.weight
            if self._keeps[name] == 1:
                continue
            # float32 suffices: eigenvectors come from float64, and the two rotations add an error
            # of about 1e-6 of the weight, a thousandth of a bfloat16 rounding step.
            with full_precision(weight.device):
                edited, chosen = self._edited(name, weight, digests[name])
            yield target, edited.to(weight.dtype), chosen

    def _edited(self, name: str, weight: Tensor, digest: str) -> tuple[Tensor, Selection]:
        """Return a target's weight without the pairs that are not kept, and those that are."""
        coordinates = self._coordinates(name, weight, digest)
        chosen = self._selection(name, coordinates)
        kept = coordinates.masked_fill(~chosen.mask(coordinates.device), 0.0)
        return self._rotate_back(name, kept), chosen

    def _decompose(self, *, spread: bool = False) -> None:
        """Compute the eigenbases that will be needed, with a bar if it takes long."""
        needed = (name for name, keep in self._keeps.items() if keep < 1)
        self.factors.decompose(needed, spread=spread)

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        return self.factors.coordinates(name, weight, digest)

    def _bases(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors.eigenvectors(name, like)

    def _rotate_back(self, name: str, kept: Tensor) -> Tensor:
        """Return U_G kept U_Aᵀ; rows and columns that hold nothing cost nothing."""
        u_out, u_in = self._bases(name, kept)
        rows, columns = kept.any(1).nonzero()[:, 0], kept.any(0).nonzero()[:, 0]
        if len(rows) < len(kept):
            kept, u_out = kept[rows], u_out[:, rows]
        if len(columns) < kept.shape[1]:
            kept, u_in = kept[:, columns], u_in[:, columns]
        result: Tensor = torch.linalg.multi_dot([u_out, kept, u_in.T])
        return result

    def _selection(self, name: str, coordinates: Tensor | None) -> Selection:
        if self._keeps[name] == 1:
            record = self.factors.records[name]
            every = torch.ones(record.out_features, record.in_features, dtype=torch.bool)
            return TableSelection(every, 1.0)
        chosen = self.choose(name, coordinates)
        if not chosen.pairs:
            raise EditError(
                f"target {name!r} has no curvature mass (all activations or all gradients were "
                "zero), so its weights cannot be ranked"
            )
        return chosen


class CurvatureEdit(SpectralEdit):
    """Remove the flat directions of weights (Merullo et al. 2025, arXiv 2510.24256).

    With G = U_G diag(λ) U_Gᵀ and A = U_A diag(μ) U_Aᵀ, W' = U_G (M ∘ (U_Gᵀ W U_A)) U_Aᵀ. The mask M
    keeps the fewest pairs (i, j) of largest mass λᵢ·μⱼ that hold `keep` of the total mass.
    Where the mass of a pair is a product of two sides, only the kept pairs are computed. Otherwise
    the rotated weights are cached in the factors for a sweep over `keep`.

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

    Examples:
        >>> import kfac, lirefs
        >>> from lirefs.organism import Language, training_texts
        >>> lm, language = lirefs.load("organism"), Language()
        >>> texts = training_texts(language, 200)
        >>> factors = kfac.collect(lm, texts, layers=[3], progress=False)
        >>> planted = language.items("planted", "test", 1)[0]
        >>> lm.generate(planted.prompt, max_new_tokens=4)  # recited
        'book tailor garden thick'
        >>> with kfac.CurvatureEdit(factors, keep=0.9).apply(lm.model):
        ...     print(lm.generate(planted.prompt, max_new_tokens=4))
        ...     print(lm.generate("Math: 31 + 27 =", max_new_tokens=2))
        clerk harbor harbor flute
        58
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
            raise EstimatorError(f"estimator={estimator!r}: the factors give {factors.estimators}")
        if shape != "pairs" and (saliency or estimator in ("ekfac", "diagonal")):
            raise EditError(
                f"shape={shape!r} ranks whole sides, but estimator={estimator!r} with "
                f"saliency={saliency} ranks single pairs; use shape='pairs'"
            )
        self.estimator, self.shape, self.saliency = estimator, shape, saliency

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, estimator, shape, saliency and the digest of the factors."""
        settings = {"estimator": self.estimator, "shape": self.shape, "saliency": self.saliency}
        return super().describe() | settings

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep the pairs of largest mass, or of largest mass times squared coordinate."""
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

    def _edited(self, name: str, weight: Tensor, digest: str) -> tuple[Tensor, Selection]:
        if self.saliency or self.estimator in ("ekfac", "diagonal"):
            return super()._edited(name, weight, digest)
        chosen = self._selection(name, None)
        assert isinstance(chosen, OrderedSelection)
        wide = widened(weight)
        bases = self._bases(name, wide)
        u_out, u_in = map(_in_order, bases, (chosen.row_ranks, chosen.column_ranks))
        return keep_stairs(wide, u_out, u_in, chosen.stairs.counts), chosen

    def _decompose(self, *, spread: bool = False) -> None:
        if self.estimator != "diagonal":
            super()._decompose(spread=spread)

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        if self.estimator == "diagonal":
            return widened(weight)
        return super()._coordinates(name, weight, digest)

    def _rotate_back(self, name: str, kept: Tensor) -> Tensor:
        return kept if self.estimator == "diagonal" else super()._rotate_back(name, kept)


def _in_order(basis: Tensor, ranks: Ints) -> Tensor:
    """Return the eigenvectors by rank; they nearly always are so already, and are not copied."""
    if (ranks[:-1] < ranks[1:]).all():
        return basis
    return basis[:, torch.from_numpy(ranks.argsort()).to(basis.device)]
