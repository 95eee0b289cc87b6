"""Is the estimated curvature the true one: the loss along single directions of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.analysis.losses import position_losses
from kfac.edits.spectral import check_weight
from kfac.factors.factors import Factors
from kfac.target import Target
from lirefs.errors import BatchError, SpectrumError
from lirefs.model.guest import as_guest
from lirefs.statistics.intervals import Floats

QUANTILES = (0.0, 0.02, 0.1, 0.3, 0.6, 0.95)


@dataclass(frozen=True, eq=False)
class LossSlices:
    """Loss of a model along pairs of eigenvectors of one target.

    Attributes:
        name: Name of the target.
        pairs: Ranks (i, j) of output and input eigenvector, shape (pairs, 2).
        masses: λᵢ·μⱼ of each pair, shape (pairs,).
        slopes: First derivative of the loss along each pair, from backpropagation, (pairs,).
        steps: Distances t in units of ‖W‖, shape (steps,); W + t‖W‖ uᵢ vⱼᵀ was run.
        loss: Mean loss in nats per position, shape (pairs, steps).
        predicted: loss(0) + slope t + mass t² / 2 in the same places, t in units of the weight.
    """

    name: str
    pairs: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    masses: Floats
    slopes: Floats
    steps: Floats
    loss: Floats
    predicted: Floats


def loss_slices(
    model: nn.Module,
    batches: Iterable[Any],
    factors: Factors,
    name: str,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    steps: Sequence[float] = (-0.2, -0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.2),
) -> LossSlices:
    """Measure the loss along eigenvector pairs beside the quadratic that K-FAC predicts.

    The prediction is that of the Fisher: exact for the second derivative only where labels follow
    the model's own distribution, and only as far as the loss is quadratic.

    Args:
        model: The causal language model of the factors; left as it was found.
        batches: A few batches; all are run once for each pair and step.
        factors: Factors of the model.
        name: Name of the target.
        pairs: Ranks (i, j), 0 the sharpest; None for six pairs from the sharpest to the flattest.
        steps: Distances as fractions of the Frobenius norm of the weight.

    Returns:
        Losses beside the prediction, for each pair and step.

    Raises:
        BatchError: No batch, or no position to predict.
        FactorsMismatchError: The factors are not of this model.
        SpectrumError: A pair does not exist, or a step is not finite.
    """
    target = factors.targets(model, [name])[0]
    check_weight(factors, target)
    kept = list(batches)
    if not kept:
        raise BatchError("the iterable of batches is empty")
    basis = factors.eigen(name)
    shape = (target.out_features, target.in_features)
    if pairs is None:
        pairs = [tuple(int(q * (size - 1)) for size in shape) for q in QUANTILES]  # type: ignore[misc]
    wanted = _ranks(pairs)
    if (wanted < 0).any() or (wanted >= np.array(shape)).any():
        raise SpectrumError(f"pairs={list(pairs)}: ranks must lie within {shape}")
    distances = np.array(steps, dtype=np.float64)
    if distances.ndim != 1 or not len(distances) or not np.isfinite(distances).all():
        raise SpectrumError(f"steps={list(steps)} must be finite numbers")

    norm = float(target.weight.double().norm())
    outs = basis.u_out[:, wanted[:, 0]]
    ins = basis.u_in[:, wanted[:, 1]]
    masses = (basis.lam[wanted[:, 0]] * basis.mu[wanted[:, 1]]).numpy()
    with as_guest(model):
        start, gradient = _gradient(model, kept, target)
        slopes = torch.einsum("op,oi,ip->p", outs, gradient, ins).numpy()
        loss = np.array(
            [
                [_loss_at(model, kept, target, outs[:, p], ins[:, p], t * norm) for t in distances]
                for p in range(len(wanted))
            ]
        )
    moved = distances * norm
    predicted = start + slopes[:, None] * moved + masses[:, None] * moved**2 / 2
    return LossSlices(name, wanted, masses, slopes, distances, loss, predicted)


def _ranks(pairs: Sequence[tuple[int, int]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    try:
        ranks = np.array(pairs, dtype=np.int64)
    except (TypeError, ValueError):  # rows of several lengths, or no numbers
        ranks = np.empty(0, dtype=np.int64)
    if ranks.ndim != 2 or ranks.shape[1] != 2:
        raise SpectrumError(f"pairs={list(pairs)}: a list of (output rank, input rank) is needed")
    return ranks


def _gradient(model: nn.Module, batches: list[Any], target: Target) -> tuple[float, Tensor]:
    """Return the mean loss and its gradient by the target's weight, (out, in) float64 on CPU."""
    parameter = target.parameter
    before, parameter.grad = parameter.grad, None
    parameter.requires_grad_(True)
    try:
        total, count = 0.0, 0
        for batch in batches:
            losses = position_losses(model, batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            total += float(losses.detach().sum(dtype=torch.float64))
            count += len(losses)
        if parameter.grad is None:
            raise SpectrumError(f"the loss does not depend on target {target.name!r}")
        gradient = target.view(parameter.grad).double().cpu() / count
        return total / count, gradient
    finally:
        parameter.requires_grad_(False)
        parameter.grad = before


@torch.no_grad()
def _loss_at(
    model: nn.Module, batches: list[Any], target: Target, out: Tensor, inside: Tensor, t: float
) -> float:
    parameter, weight = target.parameter, target.weight
    original = parameter.data
    moved = weight.double() + t * torch.outer(out, inside).to(weight.device)
    try:
        parameter.data = target.placed(moved)
        parts = [position_losses(model, batch) for batch in batches]
    finally:
        parameter.data = original
    return float(sum(p.sum(dtype=torch.float64) for p in parts) / sum(map(len, parts)))
