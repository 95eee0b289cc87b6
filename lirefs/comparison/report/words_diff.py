"""Two answers word by word."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

SAME, BEFORE, AFTER = 0, 1, 2
"""Whether a part is in both texts, only in the first or only in the second."""
MOST_WORDS = 300
"""Longer texts are shown as wholly different: the time grows with the square of their words."""


def words_diff(before: str, after: str) -> list[tuple[int, str]]:
    """Parts of two texts with where they are: joined without `AFTER` they are `before`."""
    first, second = (re.findall(r"\s*\S+|\s+", one) for one in (before, after))
    if max(len(first), len(second)) > MOST_WORDS:
        return [(BEFORE, before), (AFTER, after)]
    parts: list[tuple[int, str]] = []
    for _, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        pieces = [(BEFORE, "".join(first[a:b])), (AFTER, "".join(second[c:d]))]
        if first[a:b] == second[c:d]:
            pieces = [(SAME, pieces[0][1])]
        parts += [piece for piece in pieces if piece[1]]
    return parts
