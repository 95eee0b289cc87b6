"""The blocks of a model below everything that interventions change, which run once for a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from kfac.edits.weight_edit import WeightEdit
from lirefs.model.guest import eagerly
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.intervention import Composition, Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.model.observe import hidden_input, hidden_of, with_hidden
from lirefs.model.weight_swap import originals_of
from lirefs.steering.steer import Steer


def first_changed(lm: LanguageModel, intervention: Intervention | None) -> int:
    """The first block that an attached intervention changes; 0 also where that is not known."""
    parts = intervention.members if isinstance(intervention, Composition) else (intervention,)
    layers = [lm.n_layers]
    for one in parts:
        if isinstance(one, Steer) and one.gate is None:
            # Where it acts, which need not be the layer of its direction.
            layers += [layer for layer, *_ in one.operators(lm.layout)]
        elif one is not None and not isinstance(one, WeightEdit):
            return 0
    of_block = {
        id(parameter): layer
        for layer in range(lm.n_layers)
        for parameter in lm.layout.block(lm.model, layer).parameters()
    }
    edited = [one for one in lm.model.parameters() if originals_of(one)]
    return min([*layers, *(of_block.get(id(one), 0) for one in edited)])


class LowerBlocks:
    """What the block below block `first` returned, pass by pass, and passes that begin there.

    In a replayed pass the blocks below `first` hand on what they get, and the last of them returns
    what it returned in the pass of the same number that was recorded. Nothing below may be changed
    meanwhile, and the texts and their batches must be the same: what a block leaves to later ones
    by another way (a cache, shared keys) is not replayed.
    """

    def __init__(self, lm: LanguageModel, first: int) -> None:
        self._blocks = [lm.layout.block(lm.model, layer) for layer in range(first)]
        self._outputs: list[Any] = []

    @property
    def replaceable(self) -> bool:
        """Whether there are such blocks, and none has a forward pass of somebody else's."""
        return bool(self._blocks) and not any("forward" in vars(one) for one in self._blocks)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what the last of them returns inside the `with`."""
        last, self._outputs = self._blocks[-1], []
        run = last.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            # Cloned, because later blocks may change it in place.
            self._outputs.append(with_hidden(output, hidden_of(output).clone()))
            return output

        with _forwards([(last, keep)]):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Begin each pass inside the `with` after these blocks; at most as many as recorded."""
        outputs = iter(self._outputs)

        def again(*_: Any, **__: Any) -> Any:
            output = next(outputs)
            return with_hidden(output, hidden_of(output).clone())

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden, like = hidden_input(args, kwargs), self._outputs[0]
            return type(like)([hidden, *like[1:]]) if isinstance(like, tuple | list) else hidden

        *lower, last = self._blocks
        with _forwards([*((one, hand_on) for one in lower), (last, again)]):
            yield


@contextmanager
def _forwards(given: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules other forward methods inside the `with`."""
    with eagerly(), undone() as steps:
        with interrupts_held():
            for module, forward in given:
                steps.append(partial(vars(module).pop, "forward", None))
                vars(module)["forward"] = forward
        yield
