"""Steps of training: the order of batches, and gradients that are finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from lirefs.errors import NonFiniteError


def shuffled(n: int, seed: int) -> Iterator[int]:
    """Indices of n items, in a new order in each pass, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def checked_step(model: nn.Module, optimizer: Optimizer, where: str, advice: str) -> None:
    """Step along gradients that are finite; `where` and `advice` begin and end the message.

    Raises:
        NonFiniteError: A gradient is NaN or infinite. No weight is changed.
    """
    gradients = {
        name: one.grad
        for name, one in model.named_parameters()
        if one.requires_grad and one.grad is not None
    }
    # A norm can overflow where no entry does, so after that the entries decide.
    if not bool(torch.nn.utils.get_total_norm(gradients.values()).isfinite()):
        bad = [name for name, one in gradients.items() if not bool(one.isfinite().all())]
        if bad:
            # The backward pass starts at the last block, where the first broken gradient is.
            raise NonFiniteError(
                f"{where}: the gradients of {len(bad)} parameters hold NaN or infinity, the "
                f"deepest in the model being {bad[-1]!r}; {advice}"
            )
    optimizer.step()
