"""A detector of recitation that needs no label: how much of a text lies in flat directions.

Texts that a model recites put more of their input energy into directions of low curvature than
other texts do. The score of a token is that share; no memorized text is needed to compute it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.bands import distinct_inputs
from kfac.edit import check_weight
from kfac.errors import BatchError, SpectrumError
from kfac.factors import Factors
from kfac.guest import as_guest, full_precision
from kfac.passages import target_inputs
from kfac.statistics import Floats


@dataclass(frozen=True, eq=False)
class RecitationScores:
    """Scores of some texts, in [0, 1]; larger means more like recited text.

    Attributes:
        names: Names of the targets whose inputs were read.
        tokens: For each text the score of each token, shape (tokens,): the mean over targets.
        passages: Score of each text, shape (texts,): the mean over its tokens.
        by_target: Score of each text at each target, shape (texts, targets).
    """

    names: list[str]
    tokens: list[Floats]
    passages: Floats
    by_target: Floats


def score_recitation(
    model: nn.Module, batches: Iterable[Any], factors: Factors, *, flat: float = 0.6
) -> RecitationScores:
    """Score texts by the share of their input energy in the flattest directions of A.

    A share of each token's own energy does not depend on the size of its input, and averaging
    shares keeps a single huge activation (many models have one at the first token) from deciding.

    Args:
        model: The causal language model of the factors; left as it was found.
        batches: Mappings with input_ids (B, T) and an optional attention_mask (B, T).
        factors: Factors of ordinary text; each distinct input of their targets is read.
        flat: Fraction of the input directions, those of smallest eigenvalue, that counts as flat.

    Returns:
        Scores of tokens and of whole texts.

    Raises:
        BatchError: No batch, a malformed one, or a text without a token.
        FactorsMismatchError: The factors are not of this model.
        NonFiniteError: The input of a target holds NaN or infinity.
        SpectrumError: `flat` leaves no direction on one side.
    """
    names = distinct_inputs(factors)
    targets = factors.targets(model, names)
    sharp: dict[str, int] = {}
    for target in targets:
        check_weight(factors, target)
        sharp[target.name] = target.in_features - round(flat * target.in_features)
        if not 0 < sharp[target.name] < target.in_features:
            raise SpectrumError(
                f"flat={flat} of the {target.in_features} input directions of {target.name!r} "
                "leaves none on one side"
            )
    bases: dict[str, Tensor] = {}
    tokens: list[Floats] = []
    by_target: list[Floats] = []
    with as_guest(model):
        for inputs, real in target_inputs(model, batches, targets):
            shares = []
            for name in names:
                states = inputs[name].float()
                if name not in bases:
                    bases[name] = factors.eigen(name).u_in.to(states.device, states.dtype)
                shares.append(_flat_share(states, bases[name], sharp[name]).double().cpu())
            table = torch.stack(shares, -1).numpy()
            for row, mask in zip(table, real.cpu().numpy(), strict=True):
                if not mask.any():
                    raise BatchError("a text has no attended token")
                tokens.append(row[mask].mean(-1))
                by_target.append(row[mask].mean(0))
    return RecitationScores(
        names, tokens, np.array([one.mean() for one in tokens]), np.array(by_target)
    )


def _flat_share(states: Tensor, basis: Tensor, sharp: int) -> Tensor:
    """Return for each token the share of its squared norm past the first `sharp` directions."""
    with full_precision(states.device):
        squares = (states @ basis).square()
    total = squares.sum(-1).clamp(min=torch.finfo(squares.dtype).tiny)
    return squares[..., sharp:].sum(-1) / total
