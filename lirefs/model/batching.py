"""Batches of similar length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_tokens(
    lengths: Sequence[int], budget: int, enough: int | None = None
) -> list[list[int]]:
    """Group items so that each padded batch holds at most `budget` tokens.

    Args:
        lengths: Number of tokens of each item.
        budget: Largest number of tokens in a batch, padding included; a longer item gets a batch
            of its own.
        enough: Tokens that make a batch worth running: once it holds them, an item shorter than
            three quarters of its longest starts the next batch. None: batches are filled.

    Returns:
        Item indices, longest items first, so that a batch too large for memory fails at once.
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
