"""The same directions and operators on other runtimes: TransformerLens and nnsight.

`lirefs.export.transformer_lens` and `lirefs.export.nnsight` are imported by name, because each
takes seconds to load its library.
"""

from __future__ import annotations

from lirefs.errors import BackendError
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import SITES
from lirefs.steering.operators import IDLE_AT_ZERO, Operator
from lirefs.steering.scope import ALL
from lirefs.steering.steer import Steer

__all__ = ["operators"]


def operators(steer: Steer, lm: LanguageModel) -> list[tuple[int, str, Operator]]:
    """The operators of a steering by place, in the order of the forward pass.

    Args:
        steer: Steers every token with one number per layer: another runtime hands its hooks the
            hidden states alone, without the positions and rows that scopes and gates need.
        lm: The model that the other runtime runs.

    Returns:
        (layer, site, operator), those that change nothing left out.

    Raises:
        BackendError: The steering has a scope, a gate, or strengths by row or by token.
        InterventionError: A layer or a width does not exist in the model.
        LayoutError: The architecture lacks a site.
        ProvenanceError: A direction was fitted on another model.
        SettingError: There is no site of such a name.
    """
    if steer.scope is not ALL or steer.gate is not None:
        raise BackendError("other runtimes steer every token: take away the scope or the gate")
    if not isinstance(steer.strength, float | dict):
        raise BackendError("other runtimes take one strength, or one for each layer")
    made = []
    for layer, site, direction in steer.places(steer.check(lm.model)):
        number = steer.strength if isinstance(steer.strength, float) else steer.strength[layer]
        if number != 0 or steer.operator not in IDLE_AT_ZERO:
            made.append((layer, site, Operator(steer.operator, direction.vector, number)))
    return sorted(made, key=lambda place: (place[0], SITES.index(place[1])))
