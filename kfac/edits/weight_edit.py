"""Weight edits: swap a model's weights for edited ones, and put the originals back bit for bit."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kfac.target import Target, weight_digest
from lirefs.errors import EditError, EditOrderError, FactorsMismatchError
from lirefs.model.guest import without_gradients
from lirefs.model.interrupts import interrupts_held, note, undone
from lirefs.model.intervention import Composable, reserve
from lirefs.model.weight_swap import (
    EditHandle,
    SwappedWeight,
    originals_of,
    put,
)


class WeightEdit(Composable, abc.ABC):
    """A reversible change of weights.

    Subclasses compute new weights in `prepare`; this class puts them in place and takes them out.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Return the targets to change, each with its new weight (out, in) in any float dtype.

        The model itself is not changed.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the kind and all parameters as JSON values; they tell this edit from any other."""

    def prepare_in_turn(self, model: nn.Module) -> Iterable[tuple[Target, Tensor]]:
        """What `prepare` returns; a subclass may compute each new weight when it is taken."""
        return self.prepare(model)

    def attach(self, model: nn.Module) -> EditHandle:
        """Put the edited weights in place.

        All new weights are computed and checked before the first one is put in place.

        Args:
            model: The model; its parameters stay the same objects, so tied weights stay tied.

        Returns:
            A handle that restores the original tensors.

        Raises:
            EditError: Two targets share one parameter, a new weight is not finite, or another
                thread has changed the model and not yet restored it.
        """
        releases: list[Callable[[], None]] = []
        handle = None
        try:
            note(releases, reserve, model, EditError)
            weights = [
                SwappedWeight(target.name, target.module, target.attribute, stored)
                for target, stored in self._changes(model)
            ]
            handle = EditHandle(weights, releases[0], model)
            handle.put()
            return handle
        except BaseException:
            if handle is not None:
                handle.remove(discard=True)
            for release in releases:
                release()
            raise

    def bake(self, model: nn.Module) -> None:
        """Put the edited weights in place for good, as `attach` would, and drop the originals.

        `model.save_pretrained(folder)` then writes a model that loads without this library.

        Raises:
            EditOrderError: A removable edit of the same weight is attached; removing it later would
                undo this one. Nothing is changed.
        """
        with undone() as steps:
            note(steps, reserve, model, EditError)
            changes = self._changes(model)
            if any(originals_of(target.parameter) for target, _ in changes):
                raise EditOrderError(
                    "an edit of the same weight is attached; remove it before baking"
                )
            with interrupts_held():
                for target, stored in changes:
                    put(target.parameter, stored)

    # In this order, and no inference mode inside: it also ends when Python frees what an interrupt
    # left, and sets gradients to what they were at its beginning.
    @torch.inference_mode(False)
    @without_gradients()
    def _changes(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Return a target of each parameter to change, and the parameter's new tensor."""
        changes: dict[int, tuple[Target, Tensor]] = {}
        owners: dict[tuple[int, int | None], str] = {}
        for target, weight in self.prepare_in_turn(model):
            parameter = target.parameter
            key = (id(parameter), target.expert)
            if key in owners or (target.expert is None and id(parameter) in changes):
                raise EditError(
                    f"targets {owners.get(key)!r} and {target.name!r} are tied to one parameter; "
                    "an edit can change it only once"
                )
            owners[key] = target.name
            # Experts of one stack are written into one new tensor.
            _, into = changes.get(id(parameter), (target, None))
            # The data of a parameter must be what it is itself, or the model cannot run any more.
            with torch.inference_mode() if parameter.is_inference() else nullcontext():
                stored = target.placed(weight, into=into)
            if not bool(target.view(stored).isfinite().all()):
                raise EditError(f"target {target.name!r}: its edited weight is not finite")
            changes[id(parameter)] = (target, stored)
        return list(changes.values())


def check_weight(target: Target, expected: str, origin: str = "the factors were collected") -> str:
    """Return the digest of a target's weight, expected as it is or was before attached edits."""
    digest = weight_digest(target.weight)
    if digest != expected:
        originals = map(target.view, originals_of(target.parameter))
        if expected not in map(weight_digest, originals):
            raise FactorsMismatchError(
                f"target {target.name!r}: {origin} from other weights (an edit that is baked into "
                "this model, another checkpoint, or another dtype); use the model that they are of"
            )
    return digest
