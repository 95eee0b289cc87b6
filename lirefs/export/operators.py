"""What another runtime needs of a steering: an operator for each place."""

from __future__ import annotations

from torch import nn

from lirefs.errors import BackendError, must_be
from lirefs.model.language_model import LanguageModel
from lirefs.steering.operators import Operator
from lirefs.steering.scope import ALL
from lirefs.steering.steer import Steer


def operators(steer: Steer, lm: LanguageModel) -> list[tuple[int, str, Operator]]:
    """The operators of a steering as (layer, site, operator), in the order of the forward pass.

    Args:
        steer: Steers every token alike, with one strength or one for each layer: hooks of other
            runtimes get the hidden states alone, without the positions and rows that scopes,
            gates and other strengths need.
        lm: The model that the other runtime runs.

    Raises:
        BackendError: The steering has a scope, a gate, or strengths by row or by token.
        InterventionError: The steering does not fit the model; `Steer.check` has the details.
    """
    must_be(lm, LanguageModel, "lm", BackendError)
    return operators_on(steer, lm.model)


def operators_on(steer: Steer, model: nn.Module) -> list[tuple[int, str, Operator]]:
    """What `operators` returns, for a model without its tokenizer."""
    must_be(steer, Steer, "steer", BackendError)
    if reason := varies_by(steer):
        raise BackendError(f"other runtimes steer every token of every row alike, but {reason}")
    return steer.operators(steer.check(model))


def varies_by(steer: Steer, *, scopes: bool = True) -> str:
    """Why a steering does not treat every token alike; empty where it does.

    With `scopes=False`, why it does not treat all tokens of its scope alike.
    """
    if scopes and steer.scope is not ALL:
        return f"the scope is {steer.scope.name!r}"
    if steer.gate is not None:
        return "a gate decides token by token"
    uniform = isinstance(steer.strength, float | dict)
    return "" if uniform else "the strength differs by row or token"
