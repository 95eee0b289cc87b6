"""Factors: the second moments of targets' inputs and output gradients, with their provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfac.factors.bases import Bases
from kfac.factors.eigen import Eigen
from kfac.factors.estimators import ESTIMATORS, Curvature, marginal_spectra
from kfac.factors.factors_file import FORMAT, checked_provenance, factors_arguments
from kfac.factors.spectrum import draw_spectrum, spectrum_of
from kfac.factors.tensor_file import read_tensors, write_tensors
from kfac.target import Target, TargetRecord, weight_digest
from kfac.targets import named_targets
from lirefs.errors import (
    EstimatorError,
    FactorsFileError,
    FactorsMismatchError,
    KfacError,
    TargetError,
    must_be,
)
from lirefs.files import html_table
from lirefs.model.guest import full_precision, widened
from lirefs.model.untrusted.digest import digest_of
from lirefs.version import __version__

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure as Canvas

_HEADER = "kfac_factors"


class Factors:
    """A = E[a aᵀ] and G = E[g gᵀ] of some targets, and the sums that other estimators need.

    Sums and counts are stored, never means, so factors of different data can be merged. An A
    that several targets share (gate and up read the same input) is stored once. All tensors are on
    CPU. All arguments except `bases` become attributes. A method that is given a name without
    factors raises TargetError.

    Args:
        records: One `TargetRecord` for each target name, in collection order.
        sums: By kind and target: "A.<source>" sums a aᵀ, "G.<name>" g gᵀ, "AW." ‖g‖² a aᵀ, "GW."
            ‖a‖² g gᵀ, "D." the squared entries of g aᵀ, "DS." those of its sum over a sequence,
            "E." the squared entries in the eigenbases.
        seeds: Seeds of the sampled labels, one for each collection that was merged.
        tokens: Counted positions of the data.
        labels: "sampled" or "exact" (Fisher), "data" (empirical Fisher) or "mixed".
        provenance: The user's notes about the data; JSON values.
        bases: Eigenvalues and eigenvectors of the basis in which the sums "E." were collected.
        weighted: Parts were merged with weights, so none of them can be subtracted.
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
        self.provenance = checked_provenance(provenance)
        self.weighted = weighted
        self._stored_bases = dict(bases or {})
        self._bases = Bases(self.records, self._mean, self._stored_bases)
        self._coordinates: dict[str, tuple[str, Tensor]] = {}
        self._digest: str | None = None

    def __repr__(self) -> str:
        return f"Factors({len(self.records)} targets, {self.tokens} tokens)"

    def _repr_html_(self) -> str:
        shown = ["target", "out_features", "in_features", "count", "trace_A", "trace_G"]
        return html_table(repr(self), self.to_dataframe()[shown].to_dict("records"))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each target: its `TargetRecord`, and the traces of A and G.

        A trace is the summed curvature of one side, in the units of `A` and `G`.
        """
        import pandas

        return pandas.DataFrame(
            {
                "target": name,
                **asdict(record),
                "trace_A": float(self.A(name).trace()),
                "trace_G": float(self.G(name).trace()),
            }
            for name, record in self.records.items()
        )

    def plot(self, names: Iterable[str] | None = None, keep: float = 0.8) -> Canvas:
        """Curvature mass against the share of pairs, and the pairs of one target that are kept.

        Args:
            names: Target names; None for all, or nine of them from first to last.
            keep: Share of the mass whose pairs are marked.

        Returns:
            A matplotlib figure to show, restyle or save; pyplot does not know of it.

        Raises:
            TargetError: A name has no factors, or none is given.
            KeepError: `keep` is outside (0, 1].
        """
        if names is None:
            last = len(self.names) - 1
            some = dict.fromkeys(round(last * part / 8) for part in range(9))
            names = [self.names[index] for index in some]
        sides = ((name, self.eigen_G(name)[0], self.eigen_A(name)[0]) for name in names)
        spectra = [spectrum_of(name, lam.numpy(), mu.numpy(), keep) for name, lam, mu in sides]
        if not spectra:
            raise TargetError("no target names were given to plot")
        return draw_spectrum(spectra)

    @property
    def names(self) -> list[str]:
        """Target names, in collection order."""
        return list(self.records)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sums."""
        return next(iter(self.sums.values())).dtype

    @property
    def estimators(self) -> list[str]:
        """The estimators that `curvature` can give for every target."""
        kinds = {"marginal": "AW", "diagonal": self._diagonal, "ekfac": "E"}
        return [
            one
            for one in ESTIMATORS
            if all(f"{kinds.get(one, 'G')}.{name}" in self.sums for name in self.records)
        ]

    @property
    def _diagonal(self) -> str:
        """The kind of sums of the "diagonal" estimator."""
        return "DS" if any(key.startswith("DS.") for key in self.sums) else "D"

    def A(self, name: str) -> Tensor:
        """Return E[a aᵀ] of a target, shape (in, in), in squared units of the activations."""
        return self._mean("A", self._record(name).source)

    def G(self, name: str) -> Tensor:
        """Return E[g gᵀ] of a target, shape (out, out), where g belongs to a summed loss.

        Its unit is squared nats per squared unit of the output.
        """
        return self._mean("G", name)

    def count(self, name: str) -> int:
        """Return the number of positions that a target, or one expert, has sums of."""
        return self._record(name).count

    def eigen(self, name: str) -> Eigen:
        """Return float64 spectra and eigenvectors of a target; a shared A is decomposed only once.

        Raises:
            SpectrumError: A factor is not finite.
        """
        return Eigen(*self.eigen_G(name), *self.eigen_A(name))

    def eigen_A(self, name: str) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (in,), descending, and eigenvectors (in, in) of A, as in `eigen`."""
        return self._bases[self._record(name).key("A", name)]

    def eigen_G(self, name: str) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (out,), descending, and eigenvectors (out, out) of G."""
        return self._bases[self._record(name).key("G", name)]

    def decompose(
        self,
        names: Iterable[str] | None = None,
        *,
        sides: str = "AG",
        spread: bool = False,
        progress: bool = True,
    ) -> None:
        """Compute missing eigenbases; with a file each is kept at once, so a stopped run goes on.

        Args:
            names: Target names; None for all.
            sides: "A", "G" or "AG".
            spread: Share the work with all processes of `torch.distributed`, which must call this.
            progress: Show a bar if it takes longer than a second.

        Raises:
            SpectrumError: A factor is not finite.
            DistributedError: Another process failed, or has other factors.
        """
        if not sides or not set(sides) <= {"A", "G"}:
            raise KfacError(f"sides={sides!r}: use 'A', 'G' or 'AG'")
        named = [(name, self._record(name)) for name in (self.names if names is None else names)]
        keys = [record.key(side, name) for name, record in named for side in sides]
        self._bases.compute(keys, spread=spread, progress=progress)

    def eigenvectors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return U_G and U_A of a target on the device and in the dtype of `like`, copied once."""
        output, inside = (self._record(name).key(kind, name) for kind in "GA")
        return self._bases.vectors(output, like), self._bases.vectors(inside, like)

    def forget(self, names: Iterable[str]) -> None:
        """Free the eigenvectors and rotated weights of targets; they are computed when needed."""
        self._bases.forget({self._record(name).key(kind, name) for name in names for kind in "AG"})
        self._coordinates = {}

    def curvature(self, name: str, estimator: str = "kfac") -> Curvature:
        """Return the mass that an estimator gives to each coordinate of a target.

        Args:
            name: Target name.
            estimator: "kfac": λᵢ μⱼ. "ekfac": the mean squared gradient of each coordinate in
                K-FAC's eigenbasis (George et al. 2018, arXiv 1806.03884), after `correct`, whose
                `per` says of what gradient. "marginal": the separable table with EK-FAC's row and
                column sums for `per="position"`, without a second pass. "input": μⱼ, with G the
                identity. "output": λᵢ, with A the identity. "diagonal": the mean squared gradient
                of each entry of W itself; `per` of `collect` says of what gradient.

        Raises:
            EstimatorError: The estimator is unknown, or its sums were not collected.
        """
        if estimator not in ESTIMATORS:
            raise EstimatorError(f"estimator={estimator!r} is unknown: use one of {ESTIMATORS}")
        if estimator in ("diagonal", "ekfac"):
            table = self._mean(self._diagonal if estimator == "diagonal" else "E", name)
            return Curvature(estimator, None, None, table, rotated=estimator == "ekfac")
        record = self._record(name)
        if estimator == "marginal":
            sums, basis = (self._mean("AW", name), self._mean("GW", name)), self.eigen(name)
            lam, mu = marginal_spectra(*sums, basis.u_out, basis.u_in)
        else:
            ones = torch.ones(max(record.shape("D")), dtype=torch.float64)
            lam = ones[: record.out_features] if estimator == "input" else self.eigen_G(name)[0]
            mu = ones[: record.in_features] if estimator == "output" else self.eigen_A(name)[0]
        return Curvature(estimator, lam, mu, None, rotated=True)

    def coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        """Return C = U_Gᵀ W U_A, the weight in the eigenbases of its target.

        The last result of each target is cached, so a sweep over `keep` rotates each weight once.

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
        wide = widened(weight)
        u_out, u_in = self.eigenvectors(name, wide)
        with full_precision(wide.device):
            result = u_out.T @ wide @ u_in
        self._coordinates[name] = (digest, result)
        return result

    @property
    def digest(self) -> str:
        """SHA-256 over everything stored except provenance; equal after save and load."""
        if self._digest is None:
            self._digest = digest_of(self._header(), self._tensors())
        return self._digest

    def check(self, model: nn.Module) -> None:
        """Verify that these factors were collected from this model, in its present state.

        Raises:
            FactorsMismatchError: A target is missing, has another shape or other weights.
        """
        for target in self.targets(model):
            if weight_digest(target.weight) != self.records[target.name].digest:
                raise FactorsMismatchError(
                    f"target {target.name!r}: the factors were collected from other weights "
                    "(an edit that is baked into this model, another checkpoint or another dtype); "
                    "use the model that they are of, or collect again"
                )

    def targets(self, model: nn.Module, names: Iterable[str] | None = None) -> list[Target]:
        """Return the model's targets, of all names or those given, in their order.

        Raises:
            FactorsMismatchError: A target is missing or has another shape.
        """
        try:
            targets = named_targets(model, self.names if names is None else names)
        except TargetError as error:
            raise FactorsMismatchError(f"the factors do not fit this model: {error}") from error
        for target in targets:
            shape = (target.out_features, target.in_features)
            if shape != (wanted := self._record(target.name).shape("D")):
                raise FactorsMismatchError(
                    f"target {target.name!r} has shape {shape}, the factors are for {wanted}"
                )
        return targets

    def save(self, path: str | os.PathLike[str], *, keep_bases: bool = True) -> None:
        """Write one safetensors file with a JSON header, whole or not at all.

        Args:
            path: The file.
            keep_bases: Keep eigenbases in `<path>.bases` (8 d² bytes a side), which may be deleted.

        Raises:
            KfacError: The provenance is not JSON.
            WriteError: The disk is full, or the folder cannot be written to.
        """
        notes = {"version": __version__, "provenance": self.provenance}
        try:
            header = json.dumps(self._header() | notes)
        except TypeError as error:
            raise KfacError(f"provenance must hold JSON values only: {error}") from error
        write_tensors(path, self._tensors(), {_HEADER: header})
        if keep_bases:
            self._bases.save_in(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None, keep_bases: bool = True
    ) -> Factors:
        """Read a file written by `save`; if a model is given, `check` the factors against it.

        Args:
            path: The file.
            model: The model of the factors.
            keep_bases: As in `save`; those needed are read, and damaged ones computed again.

        Raises:
            FactorsFileError: The file is missing, truncated or damaged, or has another format.
            FactorsMismatchError: The factors are not of `model`.
        """
        must_be(path, (str, os.PathLike), "path", FactorsFileError)
        must_be(model, (nn.Module, type(None)), "model", KfacError)
        header, tensors = read_tensors(path, _HEADER, "factors")
        try:
            factors = cls(**factors_arguments(header, tensors))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FactorsFileError(
                f"{path} is damaged: {str(error)[:500]!r}; collect the factors again"
            ) from error
        if model is not None:
            factors.check(model)
        if keep_bases:
            factors._bases.keep_in(path)
        return factors

    def _header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "format": FORMAT,
            "seeds": self.seeds,
            "tokens": self.tokens,
            "labels": self.labels,
            "targets": {name: asdict(record) for name, record in self.records.items()},
        }
        if self.weighted:
            header["weighted"] = True
        return header

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.sums)
        for key, (values, vectors) in self._stored_bases.items():
            tensors |= {"values." + key: values, "vectors." + key: vectors}
        return tensors

    def _mean(self, kind: str, name: str) -> Tensor:
        record = self._record(name)
        if (key := f"{kind}.{name}") not in self.sums:
            advice = {"E": "run kfac.correct", "D": "collect with diagonal=True"}
            raise EstimatorError(
                f"the factors do not have the sums of this estimator for target {name!r}: "
                f"{advice.get(kind, 'collect with marginals=True')}"
            )
        return self.sums[key] / max(record.count, 1)

    def _record(self, name: str) -> TargetRecord:
        if name not in self.records:
            raise TargetError(f"no factors for target {name!r}; the factors have: {self.names}")
        return self.records[name]
