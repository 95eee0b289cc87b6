"""The curvature that each estimator gives to the entries of a weight, from the collected sums.

All estimators but the diagonal one speak of the coordinates C = U_Gᵀ W U_A, so that one rotation of
the weight serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lirefs.errors import EstimatorError

ESTIMATORS = ("kfac", "ekfac", "marginal", "input", "output", "diagonal")
"""Names of the estimators of curvature; `Factors.curvature` says what each one is."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """The curvature of each coordinate of one target: one number, its mass, for each.

    Separable estimators give `lam` and `mu`, the others `table`.

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

    @property
    def total(self) -> float:
        """The mass of all coordinates together."""
        if self.table is not None:
            return float(self.table.sum(dtype=torch.float64))
        lam, mu = self._spectra()
        return float(lam.sum() * mu.sum())

    def mass(self) -> Tensor:
        """Return the mass of every coordinate, shape (out, in).

        Returns:
            On CPU; float64, or the dtype of the sums for a table.
        """
        if self.table is not None:
            return self.table
        lam, mu = self._spectra()
        return torch.outer(lam, mu)

    def _spectra(self) -> tuple[Tensor, Tensor]:
        if self.lam is None or self.mu is None:
            raise EstimatorError(
                f"the {self.estimator} estimator has no spectra: its mass is a table"
            )
        return self.lam, self.mu


def marginal_spectra(
    weighted_a: Tensor, weighted_g: Tensor, u_out: Tensor, u_in: Tensor
) -> tuple[Tensor, Tensor]:
    """Return spectra whose products have the row and column sums of the EK-FAC table.

    With T_ij = E[(uᵢ·g)² (vⱼ·a)²], the row sums are uᵢᵀ E[‖a‖² g gᵀ] uᵢ and the column sums
    vⱼᵀ E[‖g‖² a aᵀ] vⱼ; the product of both over the total is the separable table nearest to T in
    relative entropy. No second pass over the data is needed.

    Args:
        weighted_a: E[‖g‖² a aᵀ], shape (in, in).
        weighted_g: E[‖a‖² g gᵀ], shape (out, out).
        u_out: Eigenvectors of G in columns, float64.
        u_in: Eigenvectors of A in columns, float64.

    Returns:
        lam (out,) and mu (in,), float64, not sorted.
    """
    rows, columns = (
        torch.einsum("ij,ij->j", u, wide @ u).clamp(min=0)
        for u, wide in ((u_out, weighted_g.double()), (u_in, weighted_a.double()))
    )
    total = rows.sum()
    return rows, columns / total if total > 0 else columns
