"""The curvature that each estimator gives to the coordinates of a weight, from collected sums.

All estimators except "diagonal" use the coordinates C = U_Gᵀ W U_A, so one rotation of the weight
serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ESTIMATORS = ("kfac", "ekfac", "marginal", "input", "output", "diagonal")
"""Names of the estimators of curvature; `Factors.curvature` describes each."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of each coordinate of one target: one number, its mass.

    Separable estimators have `lam` and `mu`, the others `table`.

    Attributes:
        estimator: One of `ESTIMATORS`.
        lam: Shape (out,), float64 on CPU, non-negative, in the order of the basis.
        mu: Shape (in,), float64 on CPU, non-negative, in the order of the basis.
        table: Shape (out, in), on CPU, non-negative.
        rotated: True when coordinates are C = U_Gᵀ W U_A, False when they are the entries of W.
    """

    estimator: str
    lam: Tensor | None
    mu: Tensor | None
    table: Tensor | None
    rotated: bool

    def __repr__(self) -> str:
        return f"Curvature({self.estimator}, rotated={self.rotated})"

    @property
    def total(self) -> float:
        """The mass of all coordinates together."""
        if self.lam is None or self.mu is None:
            return float(self.mass().sum(dtype=torch.float64))
        return float(self.lam.sum() * self.mu.sum())

    def mass(self) -> Tensor:
        """Return the mass of every coordinate, (out, in): float64, a table as it was summed."""
        if self.lam is not None and self.mu is not None:
            return torch.outer(self.lam, self.mu)
        assert self.table is not None
        return self.table


def marginal_spectra(
    weighted_a: Tensor, weighted_g: Tensor, u_out: Tensor, u_in: Tensor
) -> tuple[Tensor, Tensor]:
    """Return spectra whose products have the row and column sums of the EK-FAC table.

    With T_ij = E[(uᵢ·g)² (vⱼ·a)²], the row sums are uᵢᵀ E[‖a‖² g gᵀ] uᵢ and the column sums
    vⱼᵀ E[‖g‖² a aᵀ] vⱼ. The product of both over the total is the separable table nearest to T in
    relative entropy. lam (out,) and mu (in,) are float64 and not sorted.
    """
    rows, columns = (
        torch.einsum("ij,ij->j", u, wide @ u).clamp(min=0)
        for u, wide in ((u_out, weighted_g.double()), (u_in, weighted_a.double()))
    )
    total = rows.sum()
    return rows, columns / total if total > 0 else columns
