"""How near an output is to the text that training showed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOOSE = 0.75


def recitation_scores(output: Sequence[int], suffix: Sequence[int]) -> dict[str, float]:
    """Scores of one continuation against the true one.

    For a suffix of L tokens and a token edit distance d (Merullo et al. 2025, section 5): `strict`
    d = 0, `loose` 1 - d/L >= 0.75, `levenshtein` d/L. `token_match` is the share of the L positions
    that hold the right token: unlike d, it does not forgive a shift by one.

    Args:
        output: Token ids of the continuation.
        suffix: Token ids of the true one, at least one.
    """
    distance = levenshtein(output, suffix) / len(suffix)
    right = sum(one == other for one, other in zip(output, suffix, strict=False))
    return {
        "strict": float(distance == 0),
        "loose": float(1 - distance >= LOOSE),
        "levenshtein": distance,
        "token_match": right / len(suffix),
    }


def matching_tokens(output: Sequence[int], suffix: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    for index, (one, other) in enumerate(zip(output, suffix, strict=False)):
        if one != other:
            return index
    return min(len(output), len(suffix))


def levenshtein(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Edit distance between two sequences (insert, delete, replace, each 1)."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (one != other))
    return row[-1]
