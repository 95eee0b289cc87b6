"""A question of the language, a training document, and the split that an item belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")

CONTEXT_WEIGHT = 0.1
"""Loss weight of words drawn at random, such as names in a passage: they cannot be foreseen."""

Document = list[tuple[str, float]]
"""Pieces of text with their loss weights; joined, they are one document."""


@dataclass(frozen=True)
class Item:
    """One question with everything known about it.

    Attributes:
        kind: What is asked: a computed skill ("addition", "relation", ...), "fact", "open_book",
            "planted", "unseen", "exception" or "conflict".
        prompt: Text up to where the answer starts, without a space at its end.
        answer: The expected continuation, without the space in front of it. For an exception it is
            the memorized (wrong) label, for a conflict what the context says.
        other: The competing answer where there is one: the true label of an exception, the recalled
            fact of a conflict.
        group: The finer class within a kind: an exception's skill, a conflict's source.
        frequency: For facts, how often training shows this one relative to the rarest.
    """

    kind: str
    prompt: str
    answer: str
    other: str | None = None
    group: str | None = None
    frequency: int | None = None

    @property
    def text(self) -> str:
        """Prompt and answer joined, as the model sees them in training."""
        return f"{self.prompt} {self.answer}"


def split_of(key: str, seed: int) -> Side:
    """The split of an item, from a hash of what identifies it: 70 % train, 15 % each of the others.

    Args:
        key: The item's identity, e.g. the sum "37 + 45" or a whole prompt.
        seed: Seed of the language: another language splits differently.
    """
    share = _share(key, seed)
    return "train" if share < 14 else "validation" if share < 17 else "test"


def memory_split_of(key: str, seed: int) -> Side:
    """The split of something memorized: 40 % train, 30 % each of the others.

    All planted sequences, facts and exceptions are trained on; the split only says which of them
    may fit a direction, which choose a setting and which report it.
    """
    share = _share(f"memory|{key}", seed)
    return "train" if share < 8 else "validation" if share < 14 else "test"


def _share(key: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 20
