"""A question of the language, a training document, and the side of the split an item is on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = get_args(Side)

CONTEXT_WEIGHT = 0.1
"""Loss weight of words drawn at random, such as names in a passage: they are unpredictable."""

Document = list[tuple[str, float]]
"""Pieces of text with their loss weights; joined, they are one document."""


@dataclass(frozen=True)
class Item:
    """One question with everything known about it.

    Attributes:
        kind: A computed skill ("addition", "relation", ...), "fact", "open_book", "planted",
            "unseen", "tale", "exception", "conflict", ...; see `Language.items`.
        prompt: Text up to where the answer starts, without a space at its end.
        answer: The expected continuation, without the space in front of it. For an exception it is
            the memorized (wrong) label, for a conflict what the context says.
        other: The competing answer, if any: the true label of an exception, the recalled fact of a
            conflict.
        group: The finer class within a kind: an exception's skill, a conflict's source.
        frequency: How often training shows this one: of tales and exceptions the exact number of
            times (a twin has its tale's), of facts relative to the rarest.
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


def side_of(key: str, seed: int, shares: tuple[int, int] = (14, 17)) -> Side:
    """The side of an item, from a hash of its identity: 70 % train, 15 % each of the others.

    The key is e.g. the sum "37 + 45" or a whole prompt; the seed is the language's. `shares` are
    the ends of train and validation, in twentieths.
    """
    digest = hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") % 20
    return "train" if share < shares[0] else "validation" if share < shares[1] else "test"


def memory_side_of(key: str, seed: int) -> Side:
    """The side of something memorized: 40 % train, 30 % each of the others.

    All planted sequences, tales, facts and exceptions are trained on; the side only says which of
    them may fit a direction, which choose a setting and which report it.
    """
    return side_of(f"memory|{key}", seed, (8, 14))
