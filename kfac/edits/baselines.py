"""Controls for the curvature edit, none of which knows the curvature's directions."""

from __future__ import annotations

import abc
import copy
import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from kfac.edits.selection import Selection, TableSelection, select_separable
from kfac.edits.spectral import SpectralEdit
from kfac.edits.staircase import check_keep
from kfac.edits.weight_edit import WeightEdit
from kfac.factors.factors import Factors
from kfac.target import Target, weight_digest
from kfac.targets import named_targets
from lirefs.errors import EditError, TargetError, as_list, checked_seed
from lirefs.model.guest import full_precision, widened


class _RandomEdit(SpectralEdit):
    """Base of the two random controls: as many pairs as `CurvatureEdit` at the same `keep`."""

    def __init__(self, factors: Factors, keep: float | Mapping[str, float], seed: int = 0) -> None:
        super().__init__(factors, keep)
        self.seed = checked_seed(seed, EditError)

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, seed and the digest of the factors."""
        return super().describe() | {"seed": self.seed}

    def _by_curvature(self, name: str) -> Selection:
        """Return what `CurvatureEdit` would keep."""
        basis = self.factors.eigen(name)
        return select_separable(basis.lam, basis.mu, self._keeps[name])

    def _seeds(self, name: str) -> list[int]:
        key = hashlib.sha256(name.encode()).digest()[:8]
        return [self.seed, int.from_bytes(key, "little")]


class RandomPairsEdit(_RandomEdit):
    """Keep as many pairs as `CurvatureEdit`, drawn uniformly at random in the same eigenbasis.

    Or keep a share of all pairs, so that another number than the edit's can be compared with it,
    such as one that does the same damage.

    Args:
        factors: Factors of the model to be edited.
        keep: Fraction of the curvature mass that fixes the number of pairs; or one for each target.
        seed: Seed of the random choice.
        of: What `keep` is a fraction of: `"mass"`, or `"pairs"`, which keeps that fraction of the
            pairs themselves, at least one. Of the same seed, a smaller set is then part of every
            larger one.

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
        EditError: `of` is neither.
    """

    kind = "random_pairs"

    def __init__(
        self,
        factors: Factors,
        keep: float | Mapping[str, float],
        seed: int = 0,
        *,
        of: Literal["mass", "pairs"] = "mass",
    ) -> None:
        super().__init__(factors, keep, seed)
        if of not in ("mass", "pairs"):
            raise EditError(f"of={of!r} is unknown: use 'mass' or 'pairs'")
        self.of = of

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, seed, the digest of the factors, and `of` unless it is "mass"."""
        return super().describe() | ({} if self.of == "mass" else {"of": self.of})

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep as many random pairs; `kept_mass` is the mass that these happen to hold."""
        basis = self.factors.eigen(name)
        rows, columns = len(basis.lam), len(basis.mu)
        if self.of == "pairs":
            pairs = max(1, round(self._keeps[name] * rows * columns))
            table = nested_pairs_table(rows, columns, pairs, self._seeds(name))
        else:
            pairs = self._by_curvature(name).pairs
            table = random_pairs_table(rows, columns, pairs, self._seeds(name))
        held = basis.lam @ table.double() @ basis.mu
        return TableSelection(table, float(held / (basis.lam.sum() * basis.mu.sum())))


class RandomRotationEdit(_RandomEdit):
    """Keep the pairs that `CurvatureEdit` would, but in random orthogonal bases.

    The kept set has the same shape, and so the same rank; only its directions are meaningless.
    Bases are drawn uniformly (QR of a Gaussian matrix, signs fixed), and again for each use.

    Args:
        factors: Factors of the model to be edited.
        keep: Fraction of the curvature mass that fixes the pairs; or one for each target.
        seed: Seed of the bases.
    """

    kind = "random_rotation"

    def choose(self, name: str, coordinates: Tensor | None) -> Selection:
        """Keep the staircase of the spectra; `kept_mass` is that of the true bases."""
        return self._by_curvature(name)

    def _coordinates(self, name: str, weight: Tensor, digest: str) -> Tensor:
        wide = widened(weight)
        u_out, u_in = self._bases(name, wide)
        return u_out.T @ wide @ u_in

    def _bases(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        seed = int(np.random.default_rng(self._seeds(name)).integers(2**62))
        generator = torch.Generator().manual_seed(seed)
        record = self.factors.records[name]
        u_out = random_rotation(record.out_features, generator)
        u_in = random_rotation(record.in_features, generator)
        return u_out.to(like.device, like.dtype), u_in.to(like.device, like.dtype)


class _DataFreeEdit(WeightEdit):
    """Base of edits that use the weights alone; each subclass says what `keep` is a share of."""

    def __init__(self, names: Iterable[str], keep: float) -> None:
        self.names = as_list(names, "names", str, TargetError)
        self.keep = check_keep(keep)
        if not self.names:
            raise TargetError("no target names were given")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.names)} targets, keep={self.keep:g})"

    def with_keep(self, keep: float) -> Self:
        """Return the same edit at another `keep`; it shares what has been computed already."""
        other = copy.copy(self)
        other.keep = check_keep(keep)
        return other

    @abc.abstractmethod
    def edited(self, target: Target) -> Tensor:
        """Return the new weight (out, in) of a target; `keep` is below 1."""

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the new weights; nothing is changed at keep 1."""
        targets = named_targets(model, self.names)
        return [] if self.keep == 1 else [(target, self.edited(target)) for target in targets]

    def describe(self) -> dict[str, Any]:
        """Return kind, names and keep."""
        return {"kind": self.kind, "names": self.names, "keep": self.keep}


class SVDEdit(_DataFreeEdit):
    """Keep the largest singular values of each weight; uses no data.

    The baseline of Merullo et al. 2025 (arXiv 2510.24256), tables 1 and 2.

    Args:
        names: Dotted names of the target modules.
        keep: Fraction of the singular values to keep, in (0, 1], rounded up.

    Raises:
        KeepError: `keep` is out of range.
        TargetError: No names are given.
    """

    kind = "svd"

    def __init__(self, names: Iterable[str], keep: float) -> None:
        super().__init__(names, keep)
        self._cache: dict[str, tuple[str, Tensor, Tensor, Tensor]] = {}

    def edited(self, target: Target) -> Tensor:
        """Return the truncated weight (out, in), float32 (float64 for a float64 weight)."""
        weight = target.weight
        digest = weight_digest(weight)
        known = self._cache.get(target.name)
        with full_precision(weight.device):
            if known is None or known[0] != digest or known[1].device != weight.device:
                known = (digest, *torch.linalg.svd(widened(weight), full_matrices=False))
                self._cache[target.name] = known
            _, left, values, right = known
            rank = _rounded_up(self.keep, len(values))
            return (left[:, :rank] * values[:rank]) @ right[:rank]


class MagnitudeEdit(_DataFreeEdit):
    """Keep the entries of largest magnitude of each weight; uses no data.

    Args:
        names: Dotted names of the target modules.
        keep: Fraction of the entries to keep, in (0, 1], rounded up. Entries that tie with the
            largest pruned one are pruned as well.

    Raises:
        KeepError: `keep` is out of range.
        TargetError: No names are given.
    """

    kind = "magnitude"

    def edited(self, target: Target) -> Tensor:
        """Return the pruned weight (out, in), in the dtype of the weight."""
        weight = target.weight
        sizes = widened(weight.abs().flatten())
        limit = largest_of_smallest(sizes, len(sizes) - _rounded_up(self.keep, len(sizes)))
        return weight.masked_fill(weight.abs() <= limit, 0.0)


def _rounded_up(share: float, of: int) -> int:
    # The subtraction keeps 0.3 of 10 at 3: in floating point the product is a little above 3.
    return max(1, math.ceil(share * of - 1e-9))


def random_pairs_table(rows: int, columns: int, pairs: int, seeds: list[int]) -> Tensor:
    """Return a bool table (rows, columns) with `pairs` true entries, every set equally likely."""
    generator = np.random.default_rng(seeds)
    counts = generator.multivariate_hypergeometric(
        np.full(rows, columns), pairs, method="marginals"
    )
    table = torch.zeros(rows, columns, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        picked = generator.choice(columns, count, replace=False, shuffle=False)
        table[row, torch.from_numpy(picked)] = True
    return table


def nested_pairs_table(rows: int, columns: int, pairs: int, seeds: list[int]) -> Tensor:
    """Return the same, but a smaller table of the same seeds is part of every larger one."""
    drawn = torch.from_numpy(np.random.default_rng(seeds).random((rows, columns)))
    return drawn <= largest_of_smallest(drawn.flatten(), pairs)


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix (size, size), float32, drawn uniformly (Haar)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    result: Tensor = q * r.diagonal().sign()
    return result


def largest_of_smallest(values: Tensor, count: int) -> Tensor:
    """Return the largest of the `count` smallest values (n,), without sorting; -inf for none."""
    if not count:
        return values.new_tensor(-math.inf)
    if values.device.type == "cpu":  # numpy's introselect; torch.kthvalue is many times slower
        return torch.tensor(np.partition(values.numpy(), count - 1)[count - 1])
    return values.kthvalue(count).values
