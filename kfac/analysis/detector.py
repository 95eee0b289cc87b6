"""A detector of memorized text that needs no labels: its share in flat directions.

Memorized texts put a larger share of their input energy into directions of low curvature
than other texts do. A token's flat share is that share; computing it takes no memorized text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.analysis.bands import band_input_energies, distinct_inputs
from kfac.collection.batches import check_model_and_batches
from kfac.factors.factors import Factors
from lirefs.errors import KfacError, SpectrumError, must_be
from lirefs.model.guest import as_guest
from lirefs.statistics.intervals import Floats


@dataclass(frozen=True, eq=False)
class FlatShares:
    """The flat shares of some texts, in [0, 1]; larger means more like memorized text.

    Attributes:
        names: Names of the targets whose inputs were read.
        tokens: For each text the share of each token, shape (tokens,): the mean over targets.
        passages: Share of each text, shape (texts,): the mean over its tokens.
        by_target: Share of each text at each target, shape (texts, targets).
    """

    names: list[str]
    tokens: list[Floats]
    passages: Floats
    by_target: Floats

    def __repr__(self) -> str:
        return f"FlatShares({len(self.passages)} texts, {len(self.names)} targets)"


def flat_shares(
    model: nn.Module, batches: Iterable[Any], factors: Factors, *, flat: float = 0.6
) -> FlatShares:
    """The share of each text's input energy that lies in the flattest directions of A.

    A share of each token's own energy does not depend on the size of its input, and averaging
    shares keeps a single huge activation (many models have one at the first token) from dominating.

    Args:
        model: The causal language model of the factors; left as it was found.
        batches: Mappings with input_ids (B, T) and an optional attention_mask (B, T).
        factors: Factors of ordinary text; each distinct input of their targets is read.
        flat: Fraction of the input directions, those of smallest eigenvalue, that counts as flat.

    Raises:
        BatchError: No batch, one is malformed, or a text has no token.
        FactorsMismatchError: The factors are not of this model.
        NonFiniteError: The input of a target holds NaN or infinity.
        SpectrumError: `flat` leaves no direction on one side.
    """
    check_model_and_batches(model, batches)
    must_be(factors, Factors, "factors", KfacError)
    names = distinct_inputs(factors)
    widths = [factors.records[name].in_features for name in names]
    sharp = [width - round(flat * width) for width in widths]
    for name, width, count in zip(names, widths, sharp, strict=True):
        if not 0 < count < width:
            raise SpectrumError(
                f"flat={flat} leaves 0 or all of the {width} directions of {name!r}"
            )
    tokens: list[Floats] = []
    by_target: list[Floats] = []
    with as_guest(model):
        for energies, real in band_input_energies(model, batches, factors):
            shares = [_flat_share(*one).double().cpu() for one in zip(energies, sharp, strict=True)]
            table = torch.stack(shares, -1).numpy()
            for row, mask in zip(table, real.cpu().numpy(), strict=True):
                tokens.append(row[mask].mean(-1))
                by_target.append(row[mask].mean(0))
    passages = np.array([one.mean() for one in tokens])
    return FlatShares(names, tokens, passages, np.array(by_target))


def _flat_share(squares: Tensor, sharp: int) -> Tensor:
    """Return for each token the share of its squared norm past the first `sharp` directions."""
    total = squares.sum(-1).clamp(min=torch.finfo(squares.dtype).tiny)
    return squares[..., sharp:].sum(-1) / total
