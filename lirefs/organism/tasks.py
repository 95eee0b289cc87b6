"""The organism's language as question sets, tasks and texts for the harness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import get_args

from lirefs.errors import SettingError, checked_seed, must_be
from lirefs.model.language_model import LanguageModel
from lirefs.organism.documents import Documents
from lirefs.organism.items import SIDES, Item, Side
from lirefs.organism.language import OFTEN, Language
from lirefs.organism.people import COMMON, STATED
from lirefs.organism.questions import LABELS, Form, question_set
from lirefs.organism.training.recipe import PLANTING_MIXTURE
from lirefs.questions import Question, Questions
from lirefs.tasks.recitation import Recitation
from lirefs.tasks.task import CONFLICT, MultipleChoice, Perplexity, ShortAnswer, Task

TRUTH = (" true", " false")
RARE = 3
"""Facts up to this relative frequency are called rare."""


def organism_questions(form: Form, language: Language, n: int = 120) -> Questions:
    """Labelled questions of one surface form, each with its side of the split.

    Args:
        form: "passage", "statement", "mixed" or "exception".
        language: The organism's language.
        n: Most questions of a class on one side.
    """
    must_be(language, Language, "language")
    if form not in get_args(Form):
        raise SettingError(f"form is {form!r:.60}; expected {', '.join(get_args(Form))}")
    questions = [
        Question(
            text=item.prompt,
            label=label,
            id=f"{form}-{side}-{label}-{number}",
            subject=item.kind,
            side=side,
            prompt_format="{question}",
        )
        for side in SIDES
        for label, items in zip(LABELS, question_set(language, form, side, n), strict=True)
        for number, item in enumerate(items)
    ]
    return Questions(questions, source=f"organism, form {form}")


def organism_tasks(
    lm: LanguageModel,
    language: Language,
    side: Side,
    limit: int = 100,
    stories: int | None = None,
) -> list[Task]:
    """Every task of the language on one side of the split.

    Args:
        lm: The organism; its tokenizer splits sequences into prefix and suffix.
        language: The organism's language.
        side: Which items; those that choose a setting and those that report it must differ.
        limit: Most items of a task.
        stories: Texts that perplexity is measured on; None for as many as `limit`.
    """
    must_be(lm, LanguageModel, "lm")
    must_be(language, Language, "language")

    def some(kind: str) -> list[Item]:
        return language.items(kind, side, limit)

    def shown(kind: str, least: int, most: float = math.inf) -> list[Item]:
        """Items by frequency; of tales and of twins the same pairs."""
        found = [i for i in language.items(kind, side) if least <= (i.frequency or 0) <= most]
        return Random(f"{language.seed} {side}").sample(found, min(limit, len(found)))

    exceptions, conflicts = some("exception"), some("conflict")
    texts = language.texts(side, limit if stories is None else stories)
    return [
        _recitation(lm, "planted sequences", some("planted")),
        _recitation(lm, "never-seen sequences", some("unseen")),
        _recitation(lm, "tales", shown("tale", OFTEN)),
        _recitation(lm, "twins of tales", shown("twin", OFTEN)),
        _recitation(lm, "tales shown less often", shown("tale", 0, OFTEN - 1)),
        _answers("exceptions, memorized label", exceptions, CONFLICT),
        _answers("exceptions, true label", _others(exceptions), CONFLICT),
        _answers("addition", some("addition"), "arithmetic"),
        _answers("subtraction", some("subtraction"), "arithmetic"),
        _answers("multiplication table", some("times"), "arithmetic"),
        _answers("common facts", shown("fact", COMMON), "closed-book"),
        _answers("middling facts", shown("fact", RARE + 1, COMMON - 1), "closed-book"),
        _answers("rare facts", shown("fact", 0, RARE), "closed-book"),
        _answers("facts with their passage", some("open_book"), "open-book", 1 / STATED),
        _answers("retrieval", some("retrieval"), "open-book", 1 / STATED),
        _answers("conflicts, answer read", conflicts, CONFLICT),
        _answers("conflicts, answer recalled", _others(conflicts), CONFLICT),
        MultipleChoice(
            "boolean expressions",
            [
                (f"boolean-{i}", item.prompt, TRUTH, TRUTH.index(f" {item.answer}"))
                for i, item in enumerate(some("boolean"))
            ],
        ),
        _answers("relations", some("relation"), "reasoning", 1 / 3),
        _answers("object tracking", some("tracking"), "reasoning", 1 / 3),
        Perplexity("stories", [(f"story-{i}", t) for i, t in enumerate(texts)]),
    ]


def training_texts(language: Language, n: int, seed: int = 0) -> list[str]:
    """Fresh documents as in the last part of training, to estimate curvature from."""
    seed = checked_seed(seed)
    documents, rng = Documents(language, PLANTING_MIXTURE), Random(f"curvature {seed}")
    return ["".join(piece for piece, _ in documents.draw(rng)) for _ in range(n)]


def _recitation(lm: LanguageModel, name: str, items: Sequence[Item]) -> Recitation:
    rows = []
    for number, item in enumerate(items):
        prefix, whole = lm.encode([item.prompt])[0], lm.encode([item.text])[0]
        shown = f"x{item.frequency}-" if item.frequency else ""
        rows.append((f"{item.kind}-{shown}{number}", prefix, whole[len(prefix) :]))
    return Recitation(name, rows)


def _answers(name: str, items: Sequence[Item], group: str, chance: float = 0.0) -> ShortAnswer:
    digits = any(item.answer.isdigit() for item in items)
    ids = ["-".join(filter(None, (one.kind, one.group, str(i)))) for i, one in enumerate(items)]
    return ShortAnswer(
        name,
        [(key, item.prompt, [item.answer]) for key, item in zip(ids, items, strict=True)],
        group=group,
        # Words are one token. Digits are one each, and one more would show a longer number.
        max_new_tokens=5 if digits else 2,
        chance=chance,
    )


def _others(items: Sequence[Item]) -> list[Item]:
    """The same items with the competing answer as the expected one."""
    return [Item(i.kind, i.prompt, i.other or "", group=i.group) for i in items]
