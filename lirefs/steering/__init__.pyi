from . import scope
from .gate import Gate
from .hook_chain import chain_hook_at
from .operator_names import OPERATORS
from .operators import Operator
from .scope import Scope
from .shown_tokens import ShownTokens
from .steer import Steer
from .strength import Schedule

__all__ = [
    "OPERATORS",
    "Gate",
    "Operator",
    "Schedule",
    "Scope",
    "ShownTokens",
    "Steer",
    "chain_hook_at",
    "scope",
]
