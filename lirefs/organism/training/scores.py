"""What an organism knows and can do: `lirefs organism scores`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import get_args

from lirefs.model.language_model import LanguageModel
from lirefs.organism.items import Item, Side
from lirefs.organism.language import KINDS, Language
from lirefs.organism.questions import LABELS, Form, question_set
from lirefs.tasks.inference import score_continuations, token_nlls

COMPETING = {"exception": "exception true", "conflict": "conflict recalled"}
"""Kinds whose items have a second answer, and the name of its score."""
DOSED = ("fact", "fact_aside", "tale", "twin", "exception")
"""Kinds that are also scored by frequency."""


def share_answered_right(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding continues each prompt with exactly its text, after a space."""
    starts = lm.encode([prompt for prompt, _ in pairs])
    # A number must end where the answer ends, so the sentence's full stop is part of it.
    whole = lm.encode([f"{prompt} {text}." for prompt, text in pairs])
    items = [(start, [ids[len(start) :]]) for start, ids in zip(starts, whole, strict=True)]
    return [greedy for ((_, greedy),) in score_continuations(lm, items)]


def organism_scores(
    lm: LanguageModel, language: Language, side: Side = "test", n: int = 300
) -> dict[str, float]:
    """Scores on at most n items of each kind, and the perplexity per token of n stories.

    A score is the share of items answered as expected, by kind, group and frequency. "conflict" is
    the share that follows the context, "conflict recalled" the share that recalls; "exception" the
    share that gives the memorized label, "exception true" the true one; "reasoning" and "memory"
    are the classes of each form of the question sets.
    """
    result: dict[str, float] = {}
    for kind in KINDS:
        items = language.items(kind, side, n)
        right = share_answered_right(lm, [(item.prompt, item.answer) for item in items])
        result.update(_shares(kind, items, right))
        if kind in COMPETING:
            others = share_answered_right(lm, [(item.prompt, item.other or "") for item in items])
            result.update(_shares(COMPETING[kind], items, others))
    for form in get_args(Form):
        for label, items in zip(LABELS, question_set(language, form, side, n), strict=True):
            right = share_answered_right(lm, [(item.prompt, item.answer) for item in items])
            result[f"{label} {form}"] = sum(right) / len(right)
    texts = [[*ids, lm.tokenizer.eos_token_id] for ids in lm.encode(language.texts(side, n))]
    nlls = token_nlls(lm, texts)
    mean = sum(float(one.sum()) for one in nlls) / sum(map(len, nlls))
    result["perplexity"] = math.exp(mean)
    return {name: round(value, 4) for name, value in result.items()}


def _shares(name: str, items: Sequence[Item], right: Sequence[bool]) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    for item, good in zip(items, right, strict=True):
        groups[name].append(good)
        if item.kind in DOSED:
            groups[f"{name} x{item.frequency}"].append(good)
        if item.group:
            groups[f"{name} {item.group}"].append(good)
    return {group: sum(found) / len(found) for group, found in sorted(groups.items())}
