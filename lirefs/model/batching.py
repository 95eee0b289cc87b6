"""Batches of similar length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_tokens(
    lengths: Sequence[int], budget: int, enough: int | None = None
) -> list[list[int]]:
    """Group items so that each padded batch holds at most `budget` tokens.

    Args:
        lengths: Number of tokens of each item.
        budget: Largest number of tokens in a batch, padding included; an item longer than it
            gets a batch of its own.
        enough: Tokens with which a batch is worth running: once it holds them, an item of less
            than three quarters of its longest begins the next. None: batches are filled.

    Returns:
        Item indices, longest items first, so that a batch too large for memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    width = 0
    for index in order:
        held = len(batches[-1]) * width if batches else 0
        padded = enough is not None and held >= enough and 4 * lengths[index] < 3 * width
        if not batches or held + width > budget or padded:
            batches.append([])
            width = max(lengths[index], 1)
        batches[-1].append(index)
    return batches
