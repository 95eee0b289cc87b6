"""Memorized and ordinary texts, as the commands of `lirefs curvature` need them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lirefs
from lirefs.errors import SettingError

Passage = tuple[str, Sequence[int], Sequence[int]]
"""Id, prefix and suffix of a memorized text, the latter two as token ids."""


def texts_to_read(path: Path) -> list[str]:
    """Texts of a file or folder, none of them empty."""
    from lirefs.tasks.texts import plain_texts

    rows = plain_texts(path, "texts", SettingError)
    if empty := [name for name, text in rows if not text]:
        raise SettingError(f"{path}: the text {empty[0]!r} is empty")
    return [text for _, text in rows]


def labelled_batch(
    lm: lirefs.LanguageModel, prefix: Sequence[int], suffix: Sequence[int]
) -> dict[str, Any]:
    """A batch of one text, of which the suffix alone is counted."""
    batch: dict[str, Any] = dict(lm.pad([[*prefix, *suffix]], side="right"))
    labels = batch["input_ids"].clone()
    labels[:, : len(prefix)] = -100
    return batch | {"labels": labels}


def batches_cut_alike(
    lm: lirefs.LanguageModel, texts: Sequence[Sequence[int]], items: Sequence[Passage]
) -> list[dict[str, Any]]:
    """A batch for each text, cut and labelled like one of the items: steps of as many tokens."""
    batches = []
    for text, (_, prefix, suffix) in zip(texts, itertools.cycle(items), strict=False):
        start = min(len(prefix), len(text) - 1)
        batches.append(labelled_batch(lm, text[:start], text[start : start + len(suffix)]))
    return batches
