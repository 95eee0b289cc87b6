"""Steering at inference: operators, strengths, scopes and gates."""

from lirefs.steering.gate import Gate
from lirefs.steering.hook_chain import chain_hook_at
from lirefs.steering.operators import OPERATORS, Operator
from lirefs.steering.scope import Scope
from lirefs.steering.shown_tokens import ShownTokens
from lirefs.steering.steer import Steer
from lirefs.steering.strength import Schedule

__all__ = [
    "OPERATORS",
    "Gate",
    "Operator",
    "Schedule",
    "Scope",
    "ShownTokens",
    "Steer",
    "chain_hook_at",
]
