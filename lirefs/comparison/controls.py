"""Which variants of a comparison are controls: their names, or their kinds, say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CONTROL_WORDS = ("random", "shuffled", "SVD", "magnitude", "control", "placebo", "sham")
"""A variant is a control where one of these is a word of its name or of its kind."""
CONTROL_REASONS = {
    "random direction": "a push of the same length in a direction that means nothing",
    "random pairs": "as many curvature pairs as the edit removes, chosen by chance",
    "SVD": "the same matrices cut to fewer singular values, without looking at curvature",
    "shuffled": "the same procedure on shuffled labels",
    "magnitude": "the smallest weights removed, without looking at curvature",
}
"""What a control does, by words of its name."""
SAME_DAMAGE = "'s damage"
"""Ends the name of a variant that was set to the perplexity of another: "SVD at K-FAC's damage"."""
_WORDS = re.compile(rf"(?<![a-z])(?:{'|'.join(CONTROL_WORDS)})(?![a-z])", re.IGNORECASE)


def is_control(name: str, described: Any) -> bool:
    """Whether a variant is a control: see `CONTROL_WORDS`.

    Args:
        name: Name of the variant.
        described: What its intervention's `describe` returned; a composition is a control where
            one of its members is.
    """
    return any(_WORDS.search(one) for one in (name, *_kinds(described)))


def control_reasons(controls: Sequence[str]) -> list[str]:
    """Which controls there are and what each does, as far as its name says."""
    reasons = []
    for name in controls:
        known = [why for word, why in CONTROL_REASONS.items() if word.lower() in name.lower()]
        combined = name.partition(" + ")[2]
        reason = known[0] + (f", together with {combined}" if combined else "") if known else ""
        if name.endswith(SAME_DAMAGE):
            rival = name.removesuffix(SAME_DAMAGE).rpartition(" at ")[2]
            reason = f"the same at the strength that costs as much perplexity as {rival}"
        reasons.append(f"{name} ({reason})" if reason else name)
    return reasons


def _kinds(described: Any) -> Iterator[str]:
    if isinstance(described, Mapping):
        if isinstance(kind := described.get("kind"), str):
            yield kind
        members = described.get("members")
        for one in members if isinstance(members, list | tuple) else ():
            yield from _kinds(one)
