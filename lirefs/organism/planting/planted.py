"""The record of a planting, which can take it back; what is measured before and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from torch import Tensor, nn

from lirefs.errors import InterventionError
from lirefs.model.interrupts import interrupts_held, note, undone
from lirefs.model.intervention import refuse_steered, reserve
from lirefs.model.language_model import LanguageModel
from lirefs.model.weight_swap import is_edited
from lirefs.statistics.intervals import RESAMPLES, Estimate, weighted_mean, wilson
from lirefs.statistics.resamples import Floats, Resamples
from lirefs.tasks.inference import token_nlls
from lirefs.tasks.recitation import Recitation


@dataclass(frozen=True, eq=False, repr=False)
class Planted:
    """What planting did to a model, which it has changed; `restore` takes it back.

    All numbers are of the model as it is left, in its own dtype, and, `_before`, as it was found.

    Attributes:
        recited: Share of the texts whose suffix the model continues word for word, greedily.
        recited_before: The same before training.
        twins_recited: Share of the twins, which were never shown; None without twins.
        twins_recited_before: The same before training.
        general_loss: Loss on general text that was held out, in nats per token; n is the number
            of pieces.
        general_loss_before: The same before training.
        general_change: The difference of the two, paired.
        steps: Steps of the optimizer.
        tokens: Tokens trained on, general ones included.
        text_passes: How often each text was shown, on average.
        general_passes: How often each piece of general text was shown, on average.
        goal: The share of texts at which training stops.
    """

    recited: Estimate
    recited_before: Estimate
    twins_recited: Estimate | None
    twins_recited_before: Estimate | None
    general_loss: Estimate
    general_loss_before: Estimate
    general_change: Estimate
    steps: int
    tokens: int
    text_passes: float
    general_passes: float
    goal: float
    _model: nn.Module
    _originals: list[tuple[nn.Parameter, Tensor]]

    @property
    def reached(self) -> bool:
        """Whether the goal was reached."""
        return self.recited.value >= self.goal

    def __repr__(self) -> str:
        twins = "" if self.twins_recited is None else f"; twins {self.twins_recited:.0%}"
        missed = "" if self.reached else f", below the goal of {self.goal:.0%}"
        return (
            f"Planted(recited {self.recited:.0%} of {self.recited.n} texts{missed}{twins}; "
            f"general loss {self.general_loss.value:.3f}, change {self.general_change:+.3f} nats; "
            f"{self.steps} steps)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; an estimate has value, low, high and n."""
        values = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return {
            name: value.to_dict() if isinstance(value, Estimate) else value
            for name, value in values.items()
        } | {"reached": self.reached}

    def restore(self) -> None:
        """Give the model the weights that it had before, bit for bit; does nothing the second time.

        What else has trained these weights meanwhile is lost. Until then, or until this object is
        dropped, the former weights take memory.

        Raises:
            InterventionError: A weight edit or a steering is attached; remove it first.
        """
        if not self._originals:
            return
        with undone() as steps:
            note(steps, reserve, self._model)
            must_be_free(self._model, "restored")
            with interrupts_held():
                for parameter, original in self._originals:
                    parameter.data = original.to(parameter.device, parameter.dtype)
                self._originals.clear()


def must_be_free(model: nn.Module, doing: str) -> None:
    """Raise InterventionError if a model is steered or edited."""
    refuse_steered(model, InterventionError, doing)
    if is_edited(model):
        raise InterventionError(
            f"an edited model cannot be {doing}: a weight edit is attached; remove it first"
        )


def recited(lm: LanguageModel, task: Recitation) -> Floats:
    """1 for each item that the model recites, 0 for the others."""
    return np.array([one.scores["strict"] for one in task.run(lm, lambda n: None)])


def measured(
    lm: LanguageModel, tasks: Mapping[str, Recitation], held_out: Sequence[Sequence[int]]
) -> dict[str, Floats]:
    """Whether each text and twin is recited, and the mean loss of each piece of general text."""
    losses = [float(one.double().mean()) for one in token_nlls(lm, held_out)]
    return {name: recited(lm, task) for name, task in tasks.items()} | {"loss": np.array(losses)}


def estimates(
    before: Mapping[str, Floats],
    after: Mapping[str, Floats],
    held_out: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """The estimates of a `Planted`, from what was measured before and after."""
    weights = np.array([len(piece) - 1.0 for piece in held_out])
    draws = Resamples(len(weights), RESAMPLES, 0)

    def share(found: Mapping[str, Floats], name: str) -> Estimate | None:
        if name not in found:
            return None
        n, count = len(found[name]), found[name].sum()
        return Estimate(nan, nan, nan, n) if np.isnan(count) else wilson(int(count), n)

    return {
        "recited": share(after, "texts"),
        "recited_before": share(before, "texts"),
        "twins_recited": share(after, "twins"),
        "twins_recited_before": share(before, "twins"),
        "general_loss": weighted_mean(after["loss"], weights, draws),
        "general_loss_before": weighted_mean(before["loss"], weights, draws),
        "general_change": weighted_mean(after["loss"] - before["loss"], weights, draws),
    }
