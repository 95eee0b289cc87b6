"""Batches of similar length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_tokens(
    lengths: Sequence[int], budget: int, enough: int | None = None
) -> list[list[int]]:
    """Item indices by padded batch of at most `budget` tokens (a longer item gets its own batch).

    The longest come first, so that a batch too large for memory fails at once. In a batch with
    `enough` tokens, an item shorter than 3/4 of its longest starts the next one.
    """
    batches: list[list[int]] = []
    size = width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wasteful = enough is not None and size >= enough and 4 * lengths[index] < 3 * width
        if not batches or size + width > budget or wasteful:
            batches.append([])
            size, width = 0, max(lengths[index], 1)
        batches[-1].append(index)
        size += width
    return batches


def equal_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Item indices by batch of at most `budget` tokens, all of one length; the longest first."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    return [
        [rows[index] for index in batch]
        for length, rows in sorted(by_length.items(), reverse=True)
        for batch in batches_by_tokens([length] * len(rows), budget)
    ]
