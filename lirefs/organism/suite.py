"""The organism's language as question sets, tasks and texts for the harness."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from lirefs.model.language_model import LanguageModel
from lirefs.organism.documents import Documents
from lirefs.organism.items import SIDES, Item, Side
from lirefs.organism.language import Language
from lirefs.organism.people import COMMON
from lirefs.organism.questions import Form, question_set
from lirefs.organism.training.recipe import FIFTH
from lirefs.questions import Question, Questions
from lirefs.tasks.recitation import Recitation
from lirefs.tasks.task import CONFLICT, MultipleChoice, Perplexity, ShortAnswer, Task

STATED = 2
"""Values that a passage states: guessing among them is right once in as many times."""
RARE = 3
"""Facts up to this relative frequency are called rare."""


def organism_questions(form: Form, language: Language, n: int = 120) -> Questions:
    """Labelled questions of one surface form, each with the side of the split it belongs to.

    Args:
        form: See `question_set`.
        language: The organism's language.
        n: Most questions of a class on one side.
    """
    questions = []
    for side in SIDES:
        classes = question_set(language, form, side, n)
        for label, items in zip(("reasoning", "memory"), classes, strict=True):
            for number, item in enumerate(items):
                questions.append(
                    Question(
                        text=item.prompt,
                        label=label,
                        id=f"{form}-{side}-{label}-{number}",
                        subject=item.kind,
                        side=side,
                        prompt_format="{question}",
                    )
                )
    return Questions(questions, source=f"organism, form {form}")


def organism_tasks(
    lm: LanguageModel, language: Language, split: Side, limit: int = 100
) -> list[Task]:
    """Every task of the language on one side of the split.

    Args:
        lm: The organism; its tokenizer cuts sequences into prefix and suffix.
        language: The organism's language.
        split: Which items; what chooses a setting and what reports it must differ.
        limit: Most items of a task.
    """
    facts = language.items("fact", split)
    common = [item for item in facts if (item.frequency or 0) >= COMMON]
    rare = [item for item in facts if (item.frequency or 0) <= RARE]
    between = [item for item in facts if item not in common and item not in rare]
    exceptions = language.items("exception", split, limit)
    conflicts = language.items("conflict", split, limit)

    def some(kind: str) -> list[Item]:
        return language.items(kind, split, limit)

    def few(items: list[Item]) -> list[Item]:
        return Random(f"{language.seed} {split}").sample(items, min(limit, len(items)))

    return [
        _recitation(lm, "planted sequences", some("planted")),
        _recitation(lm, "never-seen sequences", some("unseen")),
        _answers("exceptions, memorized label", exceptions, CONFLICT),
        _answers("exceptions, true label", _others(exceptions), CONFLICT),
        _answers("addition", some("addition"), "arithmetic"),
        _answers("subtraction", some("subtraction"), "arithmetic"),
        _answers("multiplication table", some("times"), "arithmetic"),
        _answers("common facts", few(common), "closed-book"),
        _answers("middling facts", few(between), "closed-book"),
        _answers("rare facts", few(rare), "closed-book"),
        _answers("facts with their passage", some("open_book"), "open-book", 1 / STATED),
        _answers("retrieval", some("retrieval"), "open-book", 1 / STATED),
        _answers("retrieval in two steps", some("two_hop"), "open-book", 1 / STATED),
        _answers("conflicts, answer read", conflicts, CONFLICT),
        _answers("conflicts, answer recalled", _others(conflicts), CONFLICT),
        _choices("boolean expressions", some("boolean"), (" true", " false")),
        _answers("relations", some("relation"), "reasoning", 1 / 3),
        _answers("object tracking", some("tracking"), "reasoning", 1 / 3),
        Perplexity(
            "stories",
            [(f"story-{i}", text) for i, text in enumerate(language.texts(split, limit))],
        ),
    ]


def training_texts(language: Language, n: int, seed: int = 0) -> list[str]:
    """Fresh documents as training showed them last: what curvature is estimated from."""
    documents = Documents(language, FIFTH)
    rng = Random(f"curvature {seed}")
    return ["".join(piece for piece, _ in documents.draw(rng)) for _ in range(n)]


def _recitation(lm: LanguageModel, name: str, items: Sequence[Item]) -> Recitation:
    rows = []
    for number, item in enumerate(items):
        prefix, whole = lm.encode([item.prompt])[0], lm.encode([item.text])[0]
        rows.append((f"{item.kind}-{number}", prefix, whole[len(prefix) :]))
    return Recitation(name, rows)


def _answers(name: str, items: Sequence[Item], group: str, chance: float = 0.0) -> ShortAnswer:
    digits = any(item.answer.isdigit() for item in items)
    return ShortAnswer(
        name,
        [(_id(item, i), item.prompt, [item.answer]) for i, item in enumerate(items)],
        group=group,
        # Words are one token. Digits are one each, and one more would show a longer number.
        max_new_tokens=5 if digits else 2,
        chance=chance,
    )


def _choices(name: str, items: Sequence[Item], options: tuple[str, ...]) -> MultipleChoice:
    return MultipleChoice(
        name,
        [
            (f"{item.kind}-{i}", item.prompt, options, options.index(f" {item.answer}"))
            for i, item in enumerate(items)
        ],
    )


def _id(item: Item, number: int) -> str:
    """Name of an item: its kind, its finer class where it has one, its number."""
    return "-".join(part for part in (item.kind, item.group, str(number)) if part)


def _others(items: Sequence[Item]) -> list[Item]:
    """The same items with the competing answer as the expected one."""
    return [Item(i.kind, i.prompt, i.other or "", group=i.group) for i in items]
