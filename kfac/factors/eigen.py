"""Eigenbases of curvature factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lirefs.errors import SpectrumError, must_be


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

    def __repr__(self) -> str:
        return f"Eigen({len(self.lam)} output and {len(self.mu)} input eigenvectors)"


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonalise a symmetric positive semi-definite matrix.

    Args:
        matrix: Shape (d, d). Its symmetric part is used.

    Returns:
        Eigenvalues (d,), descending and clamped at 0 (rounding makes the tail negative), and
        eigenvectors (d, d) in columns. Both float64 on CPU: in float32 the flat half of the
        spectrum, which decides what an edit removes, is noise.

    Raises:
        SpectrumError: The matrix is not square or not finite.
    """
    must_be(matrix, Tensor, "matrix", SpectrumError)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise SpectrumError(f"a square matrix is needed, not one of shape {tuple(matrix.shape)}")
    wide = matrix.detach().to("cpu", torch.float64)
    if not bool(wide.isfinite().all()):
        raise SpectrumError("the matrix holds NaN or infinity")
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1).contiguous()
