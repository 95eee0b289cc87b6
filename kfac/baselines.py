"""Controls for the curvature edit: random pairs of the same number, and truncated SVD."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.edit import SpectralEdit, WeightEdit
from kfac.errors import TargetError
from kfac.factors import Factors, weight_digest
from kfac.spectrum import Staircase, check_keep
from kfac.targets import Target, named_targets


class RandomPairsEdit(SpectralEdit):
    """Keep as many pairs as `CurvatureEdit` would, but chosen at random in the same eigenbasis.

    Every set of that size is equally likely. The number for each row is drawn first, then the
    columns of each row, so no list of pairs is held.

    Args:
        factors: Factors of the model to be edited.
        keep: Fraction of the curvature mass that fixes the number of pairs; or one for each target.
        seed: Of the random choice.
    """

    kind = "random_pairs"

    def __init__(self, factors: Factors, keep: float | Mapping[str, float], seed: int = 0) -> None:
        super().__init__(factors, keep)
        self.seed = seed

    def select(self, coordinates: Tensor, chosen: Staircase, name: str) -> Tensor:
        """Keep `chosen.pairs` random pairs."""
        name_key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        generator = np.random.default_rng([self.seed, name_key])
        rows, columns = coordinates.shape
        counts = generator.multivariate_hypergeometric(
            np.full(rows, columns), chosen.pairs, method="marginals"
        )
        result = torch.zeros_like(coordinates)
        for row, count in enumerate(counts.tolist()):
            picked = generator.choice(columns, count, replace=False, shuffle=False)
            index = torch.from_numpy(picked).to(coordinates.device)
            result[row, index] = coordinates[row, index]
        return result

    def describe(self) -> dict[str, Any]:
        """Return kind, keep, seed and the digest of the factors."""
        return super().describe() | {"seed": self.seed}


class SVDEdit(WeightEdit):
    """Keep the largest singular values of each weight; uses no data.

    Args:
        names: Dotted names of the target modules.
        keep: Fraction of the singular values to keep, in (0, 1], rounded up.

    Raises:
        KeepError: `keep` is out of range.
        TargetError: No names are given.
    """

    kind = "svd"

    def __init__(self, names: Iterable[str], keep: float) -> None:
        self.names = list(names)
        self.keep = check_keep(keep)
        if not self.names:
            raise TargetError("no target names were given")
        self._cache: dict[str, tuple[str, Tensor, Tensor, Tensor]] = {}

    def with_keep(self, keep: float) -> SVDEdit:
        """Return the same edit at another `keep`; decompositions are shared."""
        other = SVDEdit(self.names, keep)
        other._cache = self._cache
        return other

    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Compute the truncated weights; nothing is changed at keep 1."""
        targets = named_targets(model, self.names)
        if self.keep == 1:
            return []
        return [(target, self._truncated(target)) for target in targets]

    def describe(self) -> dict[str, Any]:
        """Return kind, names and keep."""
        return {"kind": self.kind, "names": self.names, "keep": self.keep}

    def _truncated(self, target: Target) -> Tensor:
        weight = target.weight
        digest = weight_digest(weight)
        known = self._cache.get(target.name)
        if known is None or known[0] != digest or known[1].device != weight.device:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
            known = (digest, left, values, right)
            self._cache[target.name] = known
        _, left, values, right = known
        # The subtraction keeps 0.3 of 10 at 3: in floating point the product is a little above 3.
        rank = math.ceil(self.keep * len(values) - 1e-9)
        return (left[:, :rank] * values[:rank]) @ right[:rank]
