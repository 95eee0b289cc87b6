"""How much of an estimated spectrum is real: agreement of two halves of the data.

The flattest eigenvalues are the least certain, yet they decide what an edit removes. Two sets of
factors from disjoint data show where the order of directions is signal and where it is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kfac.edits.union_removal import check_same_weights, second_moments_along
from kfac.factors.eigen import eigenbasis
from kfac.factors.factors import Factors
from lirefs.errors import SpectrumError
from lirefs.statistics.intervals import Floats

CUTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class SideAgreement:
    """Agreement of two estimates of one second-moment matrix (d, d)."""

    own: Floats  # (d,) eigenvalues of the first half, descending
    other: Floats  # (d,) second moment of the second half along them; if apart, order is noise
    cuts: Floats  # (cuts,) fractions of the directions
    overlap: Floats  # (cuts,) share of one flat subspace (past the cut) that lies in the other
    chance: Floats  # (cuts,) the share expected of random subspaces: 1 - cut

    def __repr__(self) -> str:
        return f"SideAgreement({len(self.cuts)} cuts)"


@dataclass(frozen=True, eq=False)
class SplitHalf:
    """Split-half agreement of both sides of one target.

    Attributes:
        name: Name of the target.
        output: Agreement of the two G.
        input: Agreement of the two A.
    """

    name: str
    output: SideAgreement
    input: SideAgreement


def split_half(
    first: Factors, second: Factors, name: str, *, cuts: Sequence[float] = CUTS
) -> SplitHalf:
    """Compare the factors of two halves of the data, on both sides of a target.

    Args:
        first: Factors of one half.
        second: Factors of the other half, of the same targets and weights.
        name: Name of the target.
        cuts: Where the flat end may begin, as fractions of the directions, each in (0, 1).

    Raises:
        FactorsMismatchError: The halves were collected from different targets or weights.
        SpectrumError: A cut is not in (0, 1).
        TargetError: No such target.
    """
    check_same_weights(first, second)
    shares = np.array(cuts, dtype=np.float64)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares < 1)).all():
        raise SpectrumError(f"cuts={list(cuts)} must be a list of fractions in (0, 1)")
    return SplitHalf(
        name,
        output=matrix_agreement(first.G(name), second.G(name), shares),
        input=matrix_agreement(first.A(name), second.A(name), shares),
    )


def matrix_agreement(first: Tensor, second: Tensor, cuts: Floats) -> SideAgreement:
    """Compare two estimates (d, d) of one second-moment matrix; see `SideAgreement`."""
    values, vectors = eigenbasis(first)
    _, others = eigenbasis(second)
    # Prefix sums of the squared cosines give the overlap of every pair of leading subspaces.
    running = (vectors.T @ others).square().cumsum(0).cumsum(1)
    size = len(values)
    sharp = torch.from_numpy(np.clip(np.round(cuts * size), 1, size - 1).astype(np.int64))
    shared = running[sharp - 1, sharp - 1]  # by the two sharp subspaces
    # Of the `sharp` dimensions of one sharp subspace, those not shared lie in the other's flat one.
    overlap = 1 - (sharp - shared) / (size - sharp)
    arrays = (
        values,
        second_moments_along(second, vectors),
        sharp / size,
        overlap.clamp(0, 1),
        1 - sharp / size,
    )
    return SideAgreement(*(one.numpy() for one in arrays))
