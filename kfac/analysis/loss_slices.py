"""A check of the estimated curvature: the true loss along single directions of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.analysis.losses import position_losses
from kfac.collection.batches import check_model_and_batches, must_be_causal
from kfac.edits.weight_edit import check_weight
from kfac.factors.factors import Factors
from kfac.target import Target
from kfac.targets import must_pass_gradients
from lirefs.errors import BatchError, KfacError, SpectrumError, must_be
from lirefs.model.guest import as_guest
from lirefs.model.training.copies import must_be_whole
from lirefs.statistics.intervals import Floats, Ints


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
        predicted: loss(0) + slope t + mass t² / 2 at the same steps, t in units of the weight.
    """

    name: str
    pairs: Ints
    masses: Floats
    slopes: Floats
    steps: Floats
    loss: Floats
    predicted: Floats

    def __repr__(self) -> str:
        return f"LossSlices({self.name}, {len(self.pairs)} pairs, {len(self.steps)} steps)"


def loss_slices(
    model: nn.Module,
    batches: Iterable[Any],
    factors: Factors,
    name: str,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    steps: Sequence[float] = (-0.2, -0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.2),
) -> LossSlices:
    """Measure the loss along eigenvector pairs, and compare it with K-FAC's quadratic prediction.

    The prediction uses the Fisher: its second derivative is exact only where labels follow the
    model's own distribution, and it holds only as far as the loss is quadratic.

    Args:
        model: The causal language model of the factors; left as it was found.
        batches: A few batches; all are run once for each pair and step.
        factors: Factors of the model.
        name: Name of the target.
        pairs: Ranks (i, j), 0 the sharpest; None for six pairs from the sharpest to the flattest.
        steps: Distances as fractions of the Frobenius norm of the weight.

    Raises:
        BatchError: No batch, or no position to predict.
        FactorsMismatchError: The factors are not of this model.
        EditError: The target is sharded over processes.
        SpectrumError: A pair does not exist, a step is not finite, or the loss does not depend on
            the target.
    """
    check_model_and_batches(model, batches)
    must_be_causal(model)
    must_be(factors, Factors, "factors", KfacError)
    target = factors.targets(model, [name])[0]
    must_be_whole([target.parameter])
    check_weight(target, factors.records[name].digest)
    kept = list(batches)
    if not kept:
        raise BatchError("the iterable of batches is empty")
    basis = factors.eigen(name)
    shape = (target.out_features, target.in_features)
    if pairs is None:
        out, inside = (size - 1 for size in shape)
        pairs = [(int(q * out), int(q * inside)) for q in (0.0, 0.02, 0.1, 0.3, 0.6, 0.95)]
    try:
        wanted = np.array(pairs, dtype=np.int64)
    except (TypeError, ValueError):  # rows of several lengths, or not numbers
        wanted = np.empty(0, dtype=np.int64)
    if wanted.shape[1:] != (2,) or (wanted < 0).any() or (wanted >= shape).any():
        raise SpectrumError(f"pairs={list(pairs)} must be (output rank, input rank) below {shape}")
    distances = np.array(steps, dtype=np.float64)
    if distances.ndim != 1 or not len(distances) or not np.isfinite(distances).all():
        raise SpectrumError(f"steps={list(steps)} must be finite numbers")

    moved = distances * float(target.weight.double().norm())
    i, j = wanted.T
    outs, ins = basis.u_out[:, i], basis.u_in[:, j]
    masses = (basis.lam[i] * basis.mu[j]).numpy()
    with as_guest(model):
        must_pass_gradients(model)
        start, gradient = _gradient(model, kept, target)
        slopes = torch.einsum("op,oi,ip->p", outs, gradient, ins).numpy()
        planes = (torch.outer(out, inside) for out, inside in zip(outs.T, ins.T, strict=True))
        loss = np.array([[_loss_at(model, kept, target, t * one) for t in moved] for one in planes])
    predicted = start + slopes[:, None] * moved + masses[:, None] * moved**2 / 2
    return LossSlices(name, wanted, masses, slopes, distances, loss, predicted)


def _gradient(model: nn.Module, batches: list[Any], target: Target) -> tuple[float, Tensor]:
    """Return the mean loss and its gradient at the target's weight, (out, in) float64 on CPU."""
    target.parameter.requires_grad_(True)  # as_guest restores the flag
    total, count, gradient = 0.0, 0, torch.zeros(())
    for batch in batches:
        losses, _ = position_losses(model, batch)
        if not losses.requires_grad:
            raise SpectrumError(f"the loss does not depend on target {target.name!r}")
        gradient = gradient + torch.autograd.grad(losses.sum(), target.parameter)[0]
        total += float(losses.detach().sum(dtype=torch.float64))
        count += len(losses)
    return total / count, target.view(gradient).double().cpu() / count


@torch.no_grad()
def _loss_at(model: nn.Module, batches: list[Any], target: Target, step: Tensor) -> float:
    """Return the mean loss with a step (out, in) added to the target's weight."""
    parameter = target.parameter
    original = parameter.data
    moved = target.weight.double() + step.to(original.device)
    try:
        parameter.data = target.placed(moved)
        losses = [position_losses(model, batch)[0] for batch in batches]
    finally:
        parameter.data = original
    return float(sum(one.sum(dtype=torch.float64) for one in losses) / sum(map(len, losses)))
