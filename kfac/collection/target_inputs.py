"""The inputs of targets, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from kfac.collection.batches import (
    Forward,
    attended,
    check_tokens,
    language_model_forward,
    on_its_device,
)
from kfac.collection.finite import not_finite_row_error
from kfac.collection.hooks import first_argument
from kfac.target import Target
from lirefs.errors import BatchError, TargetError
from lirefs.model.guest import eagerly, without_gradients
from lirefs.model.interrupts import interrupts_held, undone


def target_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    forward: Forward | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield for each batch the finite inputs (B, T, in) by target, and the bool mask (B, T).

    The mask says which positions are attended; with `forward` it is the one that this returns.
    """
    if experts := [target.name for target in targets if target.expert is not None]:
        raise TargetError(f"inputs of single experts cannot be read text by text: {experts}")
    seen: dict[str, Tensor] = {}
    index = -1
    with undone() as steps:
        with interrupts_held():
            for target in targets:

                def keep(
                    module: nn.Module, args: Any, kwargs: Any, name: str = target.name
                ) -> None:
                    seen[name] = first_argument(args, kwargs).detach()

                handle = target.module.register_forward_pre_hook(keep, with_kwargs=True)
                steps.append(handle.remove)
        for index, batch in enumerate(batches):
            seen.clear()
            with eagerly():  # not around the yield, which runs others' code
                real = _attended_run(model, batch, f"batch {index}", forward)
            if wrong := [t.name for t in targets if t.name not in seen]:
                raise TargetError(f"targets never called by the forward pass: {wrong}")
            if wrong := [name for name, read in seen.items() if read.shape[:-1] != real.shape]:
                raise TargetError(f"targets whose input does not have the batch's shape: {wrong}")
            if not bool(real.any(1).all()):
                raise BatchError(f"batch {index}: a text has no attended token")
            for name, read in seen.items():
                bad = ~read.isfinite().all(-1) & real.to(read.device)
                for position in bad.flatten().nonzero()[:1]:
                    what = f"the input of target {name!r} holds"
                    raise not_finite_row_error(f"batch {index}", int(position), bad.shape, what)
            yield dict(seen), real
    if index < 0:
        raise BatchError("the iterable of batches is empty")


@without_gradients()
def _attended_run(model: nn.Module, batch: Any, place: str, forward: Forward | None) -> Tensor:
    """Run a batch for the hooks, and return the mask of attended positions."""
    if forward is not None:
        return forward(model, on_its_device(batch, model))[1].bool()
    check_tokens(model, batch, place)
    language_model_forward(model, on_its_device(batch, model))
    real = attended(batch)
    assert real is not None  # check_tokens has refused such a batch
    return real
