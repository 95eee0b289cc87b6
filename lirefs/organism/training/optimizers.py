"""The optimizers of an organism's training: Muon for matrices, AdamW for the rest.

Muon is momentum whose matrix is made orthogonal before each step (Jordan et al. 2024).

With the scale of Liu et al. 2025 (arXiv 2502.16982, eq. 4) a step is as large as AdamW's, so that
both share one learning rate schedule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lirefs.organism.training.recipe import Recipe

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately the closest semi-orthogonal matrices, by Newton-Schulz in bfloat16.

    From (n, rows, columns) to the same, float32, with singular values between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices; `lr` is on AdamW's scale, the decay decoupled."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append((parameter, parameter.grad))
            for shape, pairs in shapes.items():
                updates = []
                for parameter, gradient in pairs:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                    updates.append(gradient.lerp(momentum, MOMENTUM))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                steps = orthogonalize(torch.stack(updates))
                for (parameter, _), update in zip(pairs, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    blocks = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    rate = recipe.rate_at(0)
    return [
        Muon(blocks, lr=rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
