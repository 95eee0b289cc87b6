"""Factors: the second moments of a target's inputs and output gradients, with what made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from kfac.factors.eigen import Eigen, eigenbasis
from kfac.factors.estimators import ESTIMATORS, Curvature, marginal_spectra
from kfac.factors.factors_file import FORMAT, parts
from kfac.factors.tensor_file import library_version, read_tensors, tensor_bytes, write_tensors
from kfac.target import Target, TargetRecord, weight_digest
from kfac.targets import named_targets
from lirefs.errors import (
    EstimatorError,
    FactorsFileError,
    FactorsMismatchError,
    KfacError,
    TargetError,
)
from lirefs.model.guest import full_precision, widened

_HEADER = "kfac_factors"


class Factors:
    """A = E[a aᵀ] and G = E[g gᵀ] of some targets, and what other estimators need.

    Sums and counts are stored, never means, so factors of different data can be merged. An A
    that several targets share (gate and up read the same input) is stored once.

    Args:
        records: One for each target name, in collection order.
        sums: By letter and target: "A.<source>" sums a aᵀ, "G.<name>" g gᵀ, "AW." ‖g‖² a aᵀ, "GW."
            ‖a‖² g gᵀ, "D." the squared entries of g aᵀ, "E." the same in the eigenbases.
        seeds: Seeds of the sampled labels, one for each collection that was merged.
        tokens: Counted positions of the data.
        labels: "sampled" (Fisher), "data" (empirical Fisher) or "mixed".
        provenance: What the user said about the data; JSON values.
        bases: Eigenvalues and eigenvectors that the sums "E." belong to.
        weighted: The sums of a part were scaled when parts were merged, so no part can be taken
            out again.

    Attributes:
        records: One `TargetRecord` for each target name, in collection order.
        seeds: As given.
        tokens: As given.
        labels: As given.
        provenance: As given.
        weighted: As given.
    """

    def __init__(
        self,
        records: Mapping[str, TargetRecord],
        sums: Mapping[str, Tensor],
        *,
        seeds: Iterable[int],
        tokens: int,
        labels: str = "sampled",
        provenance: Mapping[str, Any] | None = None,
        bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        weighted: bool = False,
    ) -> None:
        self.records = dict(records)
        self.sums = dict(sums)
        self.seeds = list(seeds)
        self.tokens = tokens
        self.labels = labels
        self.provenance = dict(provenance or {})
        self.weighted = weighted
        self._stored_bases = dict(bases or {})
        self._bases = {
            key: (values.double(), vectors.double())
            for key, (values, vectors) in self._stored_bases.items()
        }
        self._coordinates: dict[str, tuple[str, Tensor]] = {}
        self._digest: str | None = None

    def __repr__(self) -> str:
        return f"Factors({len(self.records)} targets, {self.tokens} tokens)"

    @property
    def names(self) -> list[str]:
        """Target names, in collection order."""
        return list(self.records)

    @property
    def dtype(self) -> torch.dtype:
        """Of the sums."""
        return next(iter(self.sums.values())).dtype

    @property
    def estimators(self) -> list[str]:
        """The estimators that `curvature` can give for every target."""
        letters = {"marginal": "AW", "diagonal": "D", "ekfac": "E"}
        return [
            one
            for one in ESTIMATORS
            if all(f"{letters.get(one, 'G')}.{name}" in self.sums for name in self.records)
        ]

    def A(self, name: str) -> Tensor:
        """Return E[a aᵀ] of a target, shape (in, in).

        Args:
            name: Target name.

        Returns:
            In the dtype of the sums, on CPU, in squared units of the activations.

        Raises:
            TargetError: There are no factors for the target.
        """
        return self._mean("A", self._record(name).source)

    def G(self, name: str) -> Tensor:
        """Return E[g gᵀ] of a target, shape (out, out); g belongs to a summed loss.

        Args:
            name: Target name.

        Returns:
            In the dtype of the sums, on CPU, in squared nats per squared unit of the output.

        Raises:
            TargetError: There are no factors for the target.
        """
        return self._mean("G", name)

    def count(self, name: str) -> int:
        """Return the number of positions that a target's factors sum over.

        Args:
            name: Target name.

        Returns:
            A number of positions; that of an expert, its own.

        Raises:
            TargetError: There are no factors for the target.
        """
        return self._record(name).count

    def eigen(self, name: str) -> Eigen:
        """Return spectra and eigenvectors of a target; computed once, a shared A once for all.

        Args:
            name: Target name.

        Returns:
            float64 on CPU, eigenvalues descending and clamped at 0.

        Raises:
            TargetError: There are no factors for the target.
            SpectrumError: A factor is not finite.
        """
        source = self._record(name).source
        if (a_key := "A." + source) not in self._bases:
            self._bases[a_key] = eigenbasis(self.A(source))
        if (g_key := "G." + name) not in self._bases:
            self._bases[g_key] = eigenbasis(self.G(name))
        return Eigen(*self._bases[g_key], *self._bases[a_key])

    def curvature(self, name: str, estimator: str = "kfac") -> Curvature:
        """Return the mass that an estimator gives to each coordinate of a target.

        Args:
            name: Target name.
            estimator: "kfac": λᵢ μⱼ. "ekfac": E[(uᵢ·g)² (vⱼ·a)²], the exact diagonal of the Fisher
                in K-FAC's eigenbasis (George et al. 2018, arXiv 1806.03884), after `correct`.
                "marginal": the separable table with EK-FAC's row and column sums, without a second
                pass. "input": μⱼ, G taken as identity. "output": λᵢ, A taken as identity.
                "diagonal": E[(∂L/∂W)²], the mean squared gradient of each entry of W itself.

        Returns:
            The curvature; for all but "diagonal" in the coordinates of `eigen(name)`.

        Raises:
            EstimatorError: The estimator is unknown, or its sums were not collected.
        """
        if estimator not in ESTIMATORS:
            raise EstimatorError(f"estimator={estimator!r} is unknown: use one of {ESTIMATORS}")
        if estimator == "diagonal":
            return Curvature(estimator, None, None, self._mean("D", name), rotated=False)
        if estimator == "ekfac":
            return Curvature(estimator, None, None, self._mean("E", name), rotated=True)
        basis = self.eigen(name)
        lam, mu = basis.lam, basis.mu
        if estimator == "marginal":
            weighted = self._mean("AW", name), self._mean("GW", name)
            lam, mu = marginal_spectra(*weighted, basis.u_out, basis.u_in)
        elif estimator == "input":
            lam = torch.ones_like(lam)
        elif estimator == "output":
            mu = torch.ones_like(mu)
        return Curvature(estimator, lam, mu, None, rotated=True)

    def coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        """Return C = U_Gᵀ W U_A, the weight in the eigenbases of its target.

        The last result of each target is kept, so a sweep over `keep` rotates each weight once.

        Args:
            name: Target name.
            weight: Shape (out, in).
            digest: `weight_digest(weight)`, the key of the cache.

        Returns:
            Shape (out, in), on the weight's device, float32 (float64 for a float64 weight).
        """
        known = self._coordinates.get(name)
        if known is not None and known[0] == digest and known[1].device == weight.device:
            return known[1]
        basis = self.eigen(name)
        wide = widened(weight)
        u_out, u_in = (u.to(wide.device, wide.dtype) for u in (basis.u_out, basis.u_in))
        with full_precision(wide.device):
            result = u_out.T @ wide @ u_in
        self._coordinates[name] = (digest, result)
        return result

    @property
    def digest(self) -> str:
        """SHA-256 over everything stored except provenance; equal after save and load."""
        if self._digest is None:
            sha = hashlib.sha256(json.dumps(self._header(with_provenance=False)).encode())
            for key, tensor in sorted(self._tensors().items()):
                sha.update(key.encode())
                sha.update(tensor_bytes(tensor))
            self._digest = sha.hexdigest()
        return self._digest

    def check(self, model: nn.Module) -> None:
        """Verify that these factors were collected from this model.

        Args:
            model: The model as it was at collection.

        Raises:
            FactorsMismatchError: A target is missing, has another shape or other weights.
        """
        for target in self.targets(model):
            if weight_digest(target.weight) != self.records[target.name].digest:
                raise FactorsMismatchError(
                    f"target {target.name!r}: the factors were collected from other weights "
                    "(another checkpoint, another dtype, or an edited model)"
                )

    def targets(self, model: nn.Module, names: Iterable[str] | None = None) -> list[Target]:
        """Return the model's targets for all or some names, with their shapes checked.

        Args:
            model: Any model that has the targets.
            names: Target names; None for all.

        Returns:
            In the order of the names.

        Raises:
            FactorsMismatchError: A target is missing or has another shape.
        """
        try:
            targets = named_targets(model, self.names if names is None else names)
        except TargetError as error:
            raise FactorsMismatchError(f"the factors do not fit this model: {error}") from error
        for target in targets:
            record = self._record(target.name)
            shape, expected = tuple(target.weight.shape), (record.out_features, record.in_features)
            if shape != expected:
                raise FactorsMismatchError(
                    f"target {target.name!r} has shape {shape}, the factors are for {expected}"
                )
        return targets

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with a JSON header; an existing file is replaced at once.

        Args:
            path: The file.

        Raises:
            KfacError: The provenance is not JSON.
        """
        try:
            header = json.dumps(self._header(with_provenance=True))
        except TypeError as error:
            raise KfacError(f"provenance must hold JSON values only: {error}") from error
        write_tensors(path, self._tensors(), {_HEADER: header})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Factors:
        """Read a file written by `save`.

        Args:
            path: The file.
            model: If given, `check` is run against it.

        Returns:
            The factors, on CPU.

        Raises:
            FactorsFileError: The file is missing, truncated, foreign, or of a newer format.
            FactorsMismatchError: The factors are not of `model`.
        """
        header, tensors = read_tensors(path, _HEADER, "factors")
        try:
            factors = cls(**parts(header, tensors))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FactorsFileError(
                f"{path} is damaged: {str(error)[:500]!r}; collect the factors again"
            ) from error
        if model is not None:
            factors.check(model)
        return factors

    def _header(self, *, with_provenance: bool) -> dict[str, Any]:
        header: dict[str, Any] = {
            "format": FORMAT,
            "seeds": self.seeds,
            "tokens": self.tokens,
            "labels": self.labels,
            "targets": {name: asdict(record) for name, record in self.records.items()},
        }
        if self.weighted:
            header["weighted"] = True
        if with_provenance:
            header |= {"version": library_version(), "provenance": self.provenance}
        return header

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.sums)
        for key, (values, vectors) in self._stored_bases.items():
            tensors |= {"values." + key: values, "vectors." + key: vectors}
        return tensors

    def _mean(self, letter: str, name: str) -> Tensor:
        record = self._record(name)
        if (key := f"{letter}.{name}") not in self.sums:
            hows = {"E": "run kfac.correct", "D": "collect with diagonal=True"}
            how = hows.get(letter, "collect with marginals=True")
            raise EstimatorError(f"the factors hold no such sums for target {name!r}: {how}")
        return self.sums[key] / max(record.count, 1)

    def _record(self, name: str) -> TargetRecord:
        if name not in self.records:
            raise TargetError(f"no factors for target {name!r}; there are: {self.names}")
        return self.records[name]
