"""Count how often a block of a model really runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lirefs import LanguageModel


@contextmanager
def counted(lm: LanguageModel, layer: int) -> Iterator[list[int]]:
    """The tokens of each pass through a block, found without a hook or a method on it."""
    block = lm.layout.block(lm.model, layer)
    forward, tokens = type(block).forward, list[int]()

    def run(self: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if self is block:
            tokens.append(hidden.shape[-2])
        return forward(self, hidden, *args, **kwargs)

    with mock.patch.object(type(block), "forward", run):
        yield tokens
