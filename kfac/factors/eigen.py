"""Eigenbases of curvature factors."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from lirefs.errors import SpectrumError, must_be

_log = logging.getLogger(__name__)


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
    """Diagonalise a symmetric positive semi-definite matrix, on CUDA if there is such a device.

    Without one, or when its memory is short, LAPACK's `syevd` of scipy runs on the CPU: on AMD
    processors it takes 0.6 to 0.75 of the time of torch's, as exactly
    (`benchmarks/decompose.py`). Its threads are those of OpenBLAS (`OMP_NUM_THREADS`).

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
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise SpectrumError(f"a square matrix is needed, not one of shape {tuple(matrix.shape)}")
    wide = matrix.detach().to("cpu", torch.float64)
    if not all(map(math.isfinite, wide.aminmax())):  # without a table of flags
        raise SpectrumError("the matrix holds NaN or infinity")
    symmetric = (wide + wide.T).div_(2)
    values, vectors = _on_cuda(symmetric, matrix) or _on_cpu(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1).contiguous()


def _on_cuda(symmetric: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Decompose on the device of `matrix` or the current one; None if there is none or no room."""
    if not torch.cuda.is_available():
        return None
    device = matrix.device if matrix.is_cuda else torch.device("cuda")
    try:
        values, vectors = torch.linalg.eigh(symmetric.to(device))
        return values.cpu(), vectors.cpu()
    except RuntimeError as error:  # torch and cuSOLVER say in many ways that memory is short
        _log.warning(
            "%s cannot decompose a side of %d: %s; the CPU does", device, len(symmetric), error
        )
        return None


def _on_cpu(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    # The transpose is the same matrix in Fortran's order, so LAPACK needs no copy.
    values, vectors = scipy.linalg.eigh(
        symmetric.numpy().T, driver="evd", overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(values), torch.from_numpy(vectors)
