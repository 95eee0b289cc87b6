"""The names of the operators: the command line shows them without loading torch."""

from __future__ import annotations

OPERATORS = ("add", "ablate", "amplify", "clamp", "norm_preserving_add", "ablate_then_add")

# At strength 0 these change nothing; the others still set or remove the component along v.
IDLE_AT_ZERO = ("add", "amplify", "norm_preserving_add")
