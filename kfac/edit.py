"""Weight edits: swap a model's weights for edited ones, and put the originals back bit for bit."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from kfac.errors import EditError, EditOrderError, FactorsMismatchError, KeepError
from kfac.factors import Factors, weight_digest
from kfac.spectrum import Staircase, check_keep, staircase
from kfac.targets import Target

# For each edited parameter the attached edits, oldest first: a token of the handle, and the tensor
# that was replaced. Nothing here refers to the parameter, so a model dropped while edited is freed.
_STACKS: Any = WeakIdKeyDictionary()


class EditHandle:
    """An edit that is in place. Remove it with `remove()` or by leaving a `with` block."""

    def __init__(self, originals: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.token = object()
        self._originals = originals

    def remove(self) -> None:
        """Restore the original tensors; does nothing the second time.

        Raises:
            EditOrderError: A later edit of the same weight is still in place. Nothing is changed.
        """
        for parameter, _ in self._originals:
            if _STACKS[parameter][-1][0] is not self.token:
                raise EditOrderError(
                    "a later edit of the same weight is still attached; remove that one first"
                )
        for parameter, original in self._originals:
            parameter.data = original
            stack = _STACKS[parameter]
            stack.pop()
            if not stack:
                del _STACKS[parameter]
        self._originals = []

    def __enter__(self) -> EditHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class WeightEdit(abc.ABC):
    """A reversible change of weights.

    Subclasses compute new weights in `prepare`; this class puts them in place and takes them out.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Return the targets to change, each with its new weight (out, in) in any float dtype."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return kind and parameters as JSON values."""

    def attach(self, model: nn.Module) -> EditHandle:
        """Put the edited weights in place.

        All new weights are computed and checked before the first one is put in place.

        Args:
            model: The model; its parameters stay the same objects, so tied weights stay tied.

        Returns:
            A handle that restores the original tensors.

        Raises:
            EditError: Two targets share one parameter, or a new weight is not finite.
        """
        changes: list[tuple[nn.Parameter, Tensor]] = []
        owners: dict[int, str] = {}
        for target, weight in self.prepare(model):
            parameter = target.parameter
            if id(parameter) in owners:
                raise EditError(
                    f"targets {owners[id(parameter)]!r} and {target.name!r} are tied to one "
                    "parameter; an edit can change it only once"
                )
            owners[id(parameter)] = target.name
            stored = target.orient(weight).to(parameter.device, parameter.dtype).contiguous()
            if not bool(stored.isfinite().all()):
                raise EditError(f"target {target.name!r}: its edited weight is not finite")
            changes.append((parameter, stored))
        originals = [(parameter, parameter.data) for parameter, _ in changes]
        handle = EditHandle(originals)
        for parameter, original in originals:
            _STACKS.setdefault(parameter, []).append((handle.token, original))
        try:
            for parameter, stored in changes:
                parameter.data = stored
        except BaseException:
            handle.remove()
            raise
        return handle

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Edit the model inside a `with` block, and yield it."""
        with self.attach(model):
            yield model


@dataclass(frozen=True)
class TargetReport:
    """What an edit does to one target.

    Attributes:
        name: Target name.
        pairs: Kept eigenvector pairs.
        total_pairs: All pairs.
        kept_share: pairs / total_pairs.
        kept_mass: Share of the curvature mass that is kept.
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
    def select(self, coordinates: Tensor, chosen: Staircase, name: str) -> Tensor:
        """Return the coordinates (out, in) with the removed pairs set to zero."""

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the edited weights; a target with keep 1 is left alone.

        Raises:
            FactorsMismatchError: The factors do not belong to this model.
            EditError: A target has no curvature mass.
        """
        targets = self.factors.targets(model, self._keeps)
        digests = [self._check_weight(target) for target in targets]
        result = []
        for target, digest in zip(targets, digests, strict=True):
            if self._keeps[target.name] < 1:
                result.append((target, self._edited(target.name, target.weight, digest)))
        return result

    def describe(self) -> dict[str, Any]:
        """Return kind, keep and the digest of the factors."""
        return {"kind": self.kind, "keep": self.keep, "factors": self.factors.digest}

    def _staircase(self, name: str) -> Staircase:
        basis = self.factors.eigen(name)
        chosen = staircase(basis.lam.numpy(), basis.mu.numpy(), self._keeps[name])
        if chosen.total <= 0 and self._keeps[name] < 1:
            raise EditError(
                f"target {name!r} has no curvature mass (all activations or all gradients were "
                "zero), so there is nothing to rank its weights by"
            )
        return chosen

    def _edited(self, name: str, weight: Tensor, digest: str) -> Tensor:
        # float32 suffices: eigenvectors come from float64, and the two rotations add an error of
        # about 1e-6 of the weight, a thousandth of a bfloat16 rounding step.
        coordinates = self.factors.coordinates(name, weight, digest)
        kept = self.select(coordinates, self._staircase(name), name)
        basis = self.factors.eigen(name)
        u_out, u_in = (u.to(kept.device, kept.dtype) for u in (basis.u_out, basis.u_in))
        return (u_out @ kept @ u_in.T).to(weight.dtype)

    def _check_weight(self, target: Target) -> str:
        """Return the digest of the current weight, after checking that the factors fit it.

        They fit the weight as it is, or as it was under the edits that are in place now.
        """
        expected = self.factors.records[target.name].digest
        digest = weight_digest(target.weight)
        if digest == expected:
            return digest
        for _, original in _STACKS.get(target.parameter, []):
            if weight_digest(target.orient(original)) == expected:
                return digest
        raise FactorsMismatchError(
            f"target {target.name!r}: the factors were collected from other weights (another "
            "checkpoint or another dtype)"
        )


class CurvatureEdit(SpectralEdit):
    """Remove the flat directions of weights (Merullo et al. 2025, arXiv 2510.24256).

    With G = U_G diag(λ) U_Gᵀ and A = U_A diag(μ) U_Aᵀ, W' = U_G (M ∘ (U_Gᵀ W U_A)) U_Aᵀ. The mask M
    keeps the fewest pairs (i, j) of largest mass λᵢ·μⱼ that hold `keep` of the total mass.
    The rotated weights are cached in the factors, so a sweep over `keep` is cheap.
    """

    kind = "kfac"

    def with_keep(self, keep: float | Mapping[str, float]) -> CurvatureEdit:
        """Return the same edit at another `keep`."""
        return CurvatureEdit(self.factors, keep)

    def select(self, coordinates: Tensor, chosen: Staircase, name: str) -> Tensor:
        """Keep the staircase."""
        counts = torch.from_numpy(chosen.counts).to(coordinates.device)
        columns = torch.arange(chosen.columns, device=coordinates.device)
        return coordinates.masked_fill(columns[None, :] >= counts[:, None], 0.0)

    def report(self, model: nn.Module | None = None) -> list[TargetReport]:
        """Return what the edit keeps of each target.

        Args:
            model: If given, the relative change of its weights is computed too.

        Raises:
            FactorsMismatchError: The factors do not belong to the model.
        """
        changes: dict[str, float] = {}
        if model is not None:
            changes = dict.fromkeys(self._keeps, 0.0)
            for target, weight in self.prepare(model):
                original = target.weight.double()
                changes[target.name] = float((weight - original).norm() / original.norm())
        result = []
        for name in self._keeps:
            chosen = self._staircase(name)
            result.append(
                TargetReport(
                    name,
                    chosen.pairs,
                    chosen.total_pairs,
                    chosen.pairs / chosen.total_pairs,
                    chosen.kept_mass,
                    chosen.rank_bound,
                    changes.get(name),
                )
            )
        return result
