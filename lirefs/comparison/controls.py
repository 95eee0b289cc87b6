"""Which variants of a comparison are controls: their names, or their kinds, say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

CONTROL_WORDS = ("random", "shuffled", "SVD", "magnitude", "control", "placebo", "sham")
"""A variant is a control where one of these is a word of its name or of its kind."""
_WORDS = re.compile(rf"(?<![a-z])(?:{'|'.join(CONTROL_WORDS)})(?![a-z])", re.IGNORECASE)


def is_control(name: str, described: Any) -> bool:
    """Whether a variant is a control: see `CONTROL_WORDS`.

    Args:
        name: Name of the variant.
        described: What its intervention's `describe` returned; a composition is a control where
            one of its members is.
    """
    return any(_WORDS.search(one) for one in (name, *_kinds(described)))


def _kinds(described: Any) -> Iterator[str]:
    if isinstance(described, Mapping):
        if isinstance(kind := described.get("kind"), str):
            yield kind
        members = described.get("members")
        for one in members if isinstance(members, list | tuple) else ():
            yield from _kinds(one)
