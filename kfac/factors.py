"""Factors: the second moments of a target's inputs and output gradients, with what made them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kfac.errors import FactorsFileError, FactorsMismatchError, KfacError, TargetError
from kfac.spectrum import eigenbasis
from kfac.targets import Target, named_targets

FORMAT = 1
_HEADER = "kfac_factors"


@dataclass(frozen=True)
class TargetRecord:
    """What the factors know about one target.

    Attributes:
        out_features: Rows of the weight, size of G.
        in_features: Columns of the weight, size of A.
        count: Positions summed over.
        source: Name of the target under which the shared A is stored.
        digest: SHA-256 of the weight at collection.
    """

    out_features: int
    in_features: int
    count: int
    source: str
    digest: str


@dataclass(frozen=True)
class Eigen:
    """Spectra and eigenvectors of one target, float64 on CPU.

    Attributes:
        lam: Eigenvalues of G, descending, shape (out,).
        u_out: Eigenvectors of G in columns, shape (out, out).
        mu: Eigenvalues of A, descending, shape (in,).
        u_in: Eigenvectors of A in columns, shape (in, in).
    """

    lam: Tensor
    u_out: Tensor
    mu: Tensor
    u_in: Tensor


class Factors:
    """A = E[a aᵀ] and G = E[g gᵀ] of some targets.

    Sums and counts are stored, never means, so factors of different data can be merged. An A
    that several targets share (gate and up read the same input) is stored once.

    Attributes:
        records: One `TargetRecord` for each target name, in collection order.
        seeds: Seeds of the sampled labels, one for each collection that was merged.
        tokens: Counted positions of the data.
        provenance: What the user said about the data; JSON values.
    """

    def __init__(
        self,
        records: Mapping[str, TargetRecord],
        a_sums: Mapping[str, Tensor],
        g_sums: Mapping[str, Tensor],
        *,
        seeds: Iterable[int],
        tokens: int,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.records = dict(records)
        self._a = dict(a_sums)
        self._g = dict(g_sums)
        self.seeds = list(seeds)
        self.tokens = tokens
        self.provenance = dict(provenance or {})
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}
        self._coordinates: dict[str, tuple[str, Tensor]] = {}
        self._digest: str | None = None

    def __repr__(self) -> str:
        return f"Factors({len(self.records)} targets, {self.tokens} tokens)"

    @property
    def names(self) -> list[str]:
        """Target names, in collection order."""
        return list(self.records)

    def A(self, name: str) -> Tensor:
        """Return E[a aᵀ] of a target, shape (in, in)."""
        record = self._record(name)
        return self._a[record.source] / self.records[record.source].count

    def G(self, name: str) -> Tensor:
        """Return E[g gᵀ] of a target, shape (out, out); g belongs to a summed loss."""
        count = self._record(name).count
        return self._g[name] / count

    def count(self, name: str) -> int:
        """Return the number of positions that a target's factors sum over."""
        return self._record(name).count

    def shares_input(self, first: str, second: str) -> bool:
        """Return True when two targets were given the same input tensor and share one A."""
        return self._record(first).source == self._record(second).source

    def eigen(self, name: str) -> Eigen:
        """Return spectra and eigenvectors of a target; computed once, a shared A once for all."""
        source = self._record(name).source
        if (a_key := "A." + source) not in self._bases:
            self._bases[a_key] = eigenbasis(self.A(source))
        if (g_key := "G." + name) not in self._bases:
            self._bases[g_key] = eigenbasis(self.G(name))
        return Eigen(*self._bases[g_key], *self._bases[a_key])

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
        dtype = torch.promote_types(weight.dtype, torch.float32)
        u_out, u_in = (u.to(weight.device, dtype) for u in (basis.u_out, basis.u_in))
        result = u_out.T @ weight.to(dtype) @ u_in
        self._coordinates[name] = (digest, result)
        return result

    @property
    def digest(self) -> str:
        """SHA-256 over everything stored except provenance; equal after save and load."""
        if self._digest is None:
            sha = hashlib.sha256(json.dumps(self._header(with_provenance=False)).encode())
            for key, tensor in sorted(self._tensors().items()):
                sha.update(key.encode())
                sha.update(_bytes(tensor))
            self._digest = sha.hexdigest()
        return self._digest

    def merge(self, other: Factors) -> Factors:
        """Return the factors of both data sets together.

        Raises:
            FactorsMismatchError: Other targets, shapes, weights, or another sharing of inputs.
        """
        if self.names != other.names:
            raise FactorsMismatchError(
                f"cannot merge: targets differ ({self.names} and {other.names})"
            )
        records = {}
        for name, mine in self.records.items():
            yours = other.records[name]
            same = TargetRecord(**{**vars(yours), "count": mine.count})
            if mine != same:
                raise FactorsMismatchError(
                    f"cannot merge: target {name!r} was collected from another weight, shape or "
                    f"input group ({mine} and {yours})"
                )
            records[name] = TargetRecord(**{**vars(mine), "count": mine.count + yours.count})
        return Factors(
            records,
            {key: value + other._a[key] for key, value in self._a.items()},
            {key: value + other._g[key] for key, value in self._g.items()},
            seeds=self.seeds + other.seeds,
            tokens=self.tokens + other.tokens,
            provenance={"merged": [self.provenance, other.provenance]},
        )

    __add__ = merge

    def check(self, model: nn.Module) -> None:
        """Verify that these factors were collected from this model.

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

        Raises:
            KfacError: The provenance is not JSON.
        """
        target = Path(path)
        try:
            header = json.dumps(self._header(with_provenance=True))
        except TypeError as error:
            raise KfacError(f"provenance must hold JSON values only: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
        os.close(handle)
        try:
            tensors = {key: value.contiguous() for key, value in self._tensors().items()}
            save_file(tensors, temporary, metadata={_HEADER: header})
            Path(temporary).replace(target)
        finally:
            Path(temporary).unlink(missing_ok=True)

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
        try:
            with safe_open(str(path), framework="pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FactorsFileError(f"{path} cannot be read as a factors file: {error}") from error
        if header is None:
            raise FactorsFileError(f"{path} is a safetensors file, but holds no factors")
        try:
            factors = cls._from_header(json.loads(header), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise FactorsFileError(f"{path} has a damaged header: {error!r}") from error
        if model is not None:
            factors.check(model)
        return factors

    @classmethod
    def _from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Factors:
        if header["format"] != FORMAT:
            raise FactorsFileError(
                f"factors of format {header['format']} (written by version {header['version']}); "
                f"this version reads format {FORMAT}"
            )
        records = {name: TargetRecord(**record) for name, record in header["targets"].items()}
        sizes = {"G." + name: record.out_features for name, record in records.items()}
        sizes |= {"A." + r.source: r.in_features for r in records.values()}
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != {key: (size, size) for key, size in sizes.items()}:
            raise ValueError(f"its tensors do not match its targets: {found}")
        return cls(
            records,
            {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("A.")},
            {key[2:]: tensor for key, tensor in tensors.items() if key.startswith("G.")},
            seeds=header["seeds"],
            tokens=header["tokens"],
            provenance=header["provenance"],
        )

    def _header(self, *, with_provenance: bool) -> dict[str, Any]:
        header: dict[str, Any] = {
            "format": FORMAT,
            "seeds": self.seeds,
            "tokens": self.tokens,
            "targets": {name: vars(record) for name, record in self.records.items()},
        }
        if with_provenance:
            header |= {"version": library_version(), "provenance": self.provenance}
        return header

    def _tensors(self) -> dict[str, Tensor]:
        named = {"A." + key: value for key, value in self._a.items()}
        return named | {"G." + key: value for key, value in self._g.items()}

    def _record(self, name: str) -> TargetRecord:
        if name not in self.records:
            raise TargetError(f"no factors for target {name!r}; there are: {self.names}")
        return self.records[name]


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of a weight's dtype, shape and bytes."""
    sha = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    sha.update(_bytes(weight))
    return sha.hexdigest()


def library_version() -> str:
    """Return the installed version; "unknown" when run from a source tree."""
    try:
        return metadata.version("lirefs")
    except metadata.PackageNotFoundError:
        return "unknown"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
