"""The default tasks: items that the project ships or generates from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lirefs.files import read_jsonl
from lirefs.harness.memorization import recitation_task
from lirefs.harness.tasks import MultipleChoice, Perplexity, ShortAnswer, Task
from lirefs.models import LanguageModel
from lirefs.questions import Question, load_questions

DATA = Path(str(resources.files("lirefs"))) / "data"


def default_tasks(
    lm: LanguageModel,
    questions: Sequence[Question] | None = None,
    memorized: str | Path | None = None,
    limit: int | None = None,
) -> list[Task]:
    """Tasks of all six groups.

    Args:
        lm: The model; its tokenizer cuts the memorized texts.
        questions: Labelled questions with options, for the two multiple-choice tasks; give the
            test side of a split. None for that side of the project's own set.
        memorized: JSON Lines of memorized texts, see `recitation_task`; None for the project's
            own passages.
        limit: At most this many items per task, and half as many texts.

    Raises:
        TaskError: If a file lacks a field.
        DataFileError: If a file cannot be read.
    """
    chosen = list(load_questions().split().test if questions is None else questions)
    with_options = [one for one in chosen if one.options and one.answer_index is not None]
    tasks: list[Task] = [
        recitation_task(lm, DATA / "passages.jsonl" if memorized is None else memorized, limit),
        ShortAnswer(
            "two-digit addition",
            addition_items(80)[:limit],
            group="arithmetic",
            kind="number",
        ),
    ]
    for frequency in ("common", "rare"):
        for book in ("closed", "open"):
            name = f"{frequency} facts, {book} book"
            items = fact_items(frequency, with_passage=book == "open")[:limit]
            tasks.append(ShortAnswer(name, items, group=f"{book}-book", max_new_tokens=8))
    for label, group in (("memory", "closed-book"), ("reasoning", "reasoning")):
        choices = [choice_item(one) for one in with_options if one.label == label][:limit]
        if choices:
            tasks.append(MultipleChoice(f"{label} questions", choices, group=group))
    tasks.append(MultipleChoice("boolean expressions", boolean_items(80)[:limit]))
    tasks.append(MultipleChoice("object tracking", tracking_items(80)[:limit]))
    tasks.append(MultipleChoice("elimination", elimination_items(80)[:limit]))
    tasks.append(Perplexity("held-out texts", heldout_texts("test")[: limit and limit // 2]))
    return tasks


def fact_items(frequency: str, with_passage: bool) -> list[tuple[str, str, list[str]]]:
    """Questions on common or rare facts, four answered examples before each.

    Args:
        frequency: `common` or `rare`.
        with_passage: Put a passage that holds the answer before each question (open book).
    """
    rows = [row for _, row in read_jsonl(DATA / "facts.jsonl")]

    def ask(row: dict[str, Any]) -> str:
        passage = f"Passage: {row['passage']}\n" if with_passage else ""
        return f"{passage}Q: {row['question']}\nA:"

    examples = [row for row in rows if row["frequency"] == "example"]
    shots = "".join(f"{ask(row)} {row['answers'][0]}\n\n" for row in examples)
    return [
        (str(row["id"]), shots + ask(row), list(row["answers"]))
        for row in rows
        if row["frequency"] == frequency
    ]


def addition_items(n: int, seed: int = 0) -> list[tuple[str, str, list[str]]]:
    """Sums of two two-digit numbers, five answered examples before each."""
    generator = random.Random(f"addition {seed}")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    chosen = generator.sample(pairs, n + 5)
    shots = "".join(f"What is {a} + {b}? Answer: {a + b}\n" for a, b in chosen[:5])
    return [
        (f"{a} + {b}", f"{shots}What is {a} + {b}? Answer:", [str(a + b)]) for a, b in chosen[5:]
    ]


def boolean_items(n: int, seed: int = 0) -> list[tuple[str, str, list[str], int]]:
    """Boolean expressions of depth two or three, four answered examples before each."""
    generator = random.Random(f"boolean {seed}")

    def expression(depth: int) -> tuple[str, bool]:
        if depth == 0:
            value = generator.random() < 0.5
            return str(value), value
        left, x = expression(depth - 1)
        if generator.random() < 0.25:
            return f"not ( {left} )", not x
        right, y = expression(generator.randrange(depth))
        word = generator.choice(("and", "or"))
        return f"( {left} ) {word} ( {right} )", (x and y) if word == "and" else (x or y)

    def draw() -> tuple[str, bool]:
        text, value = expression(generator.choice((2, 3)))
        return text.replace("( True )", "True").replace("( False )", "False") + " is", value

    wanted = [True, False, False, True] + [bool(i % 2) for i in range(n)]
    drawn: list[tuple[str, bool]] = []
    seen: set[str] = set()
    while len(drawn) < len(wanted):
        text, value = draw()
        if text not in seen and value == wanted[len(drawn)]:  # as many true as false ones
            seen.add(text)
            drawn.append((text, value))
    shots = "".join(f"{text} {value}\n" for text, value in drawn[:4])
    return [
        (f"boolean-{index}", shots + text, [" True", " False"], 0 if value else 1)
        for index, (text, value) in enumerate(drawn[4:])
    ]


_NAMES = ("Tom", "Ann", "Bob", "Eve", "Max", "Sue", "Dan", "Kim", "Leo", "Mia")
_OBJECTS = ("book", "key", "ball", "cup", "hat")
_COLOURS = ("red", "blue", "green", "yellow")


def tracking_items(n: int, seed: int = 0) -> list[tuple[str, str, list[str], int]]:
    """Who holds an object after three hand-overs, four answered examples before each."""
    generator = random.Random(f"tracking {seed}")

    def draw() -> tuple[str, list[str], str]:
        a, b, c, d = generator.sample(_NAMES, 4)
        thing = generator.choice(_OBJECTS)
        steps = " ".join(f"{x} gives the {thing} to {y}." for x, y in ((a, b), (b, c), (c, d)))
        return f"{steps} The {thing} is now with", [a, b, c, d], d

    return _few_shot_choices("tracking", n, generator, draw)


def elimination_items(n: int, seed: int = 0) -> list[tuple[str, str, list[str], int]]:
    """The one colour that is left for the third person, four answered examples before each."""
    generator = random.Random(f"elimination {seed}")

    def draw() -> tuple[str, list[str], str]:
        a, b, c = generator.sample(_NAMES, 3)
        x, y, z = generator.sample(_COLOURS, 3)
        text = f"{a}, {b} and {c} have a {x}, a {y} and a {z} hat."
        return f"{text} {a} has the {x} hat. {b} has the {y} hat. {c} has the", [x, y, z], z

    return _few_shot_choices("elimination", n, generator, draw)


def _few_shot_choices(
    name: str,
    n: int,
    generator: random.Random,
    draw: Callable[[], tuple[str, list[str], str]],
    shots: int = 4,
) -> list[tuple[str, str, list[str], int]]:
    """Distinct drawn items (text, options, answer) after the same answered examples."""
    drawn: dict[str, tuple[list[str], str]] = {}
    while len(drawn) < n + shots:
        text, options, answer = draw()
        generator.shuffle(options)  # the place of an option must not tell the answer
        drawn.setdefault(text, (options, answer))
    rows = list(drawn.items())
    examples = "".join(f"{text} {answer}\n" for text, (_, answer) in rows[:shots])
    return [
        (
            f"{name}-{index}",
            examples + text,
            [f" {one}" for one in options],
            options.index(answer),
        )
        for index, (text, (options, answer)) in enumerate(rows[shots:])
    ]


def choice_item(question: Question) -> tuple[str, str, list[str], int]:
    """A labelled question as a multiple-choice item; the options are not shown."""
    options = [f" {option}" for option in question.options]
    return question.id, f"Q: {question.text}\nA:", options, question.answer_index or 0


def heldout_texts(split: str) -> list[tuple[str, str]]:
    """Texts on which perplexity is measured: the `validation` or the `test` part."""
    rows = [row for _, row in read_jsonl(DATA / "texts_heldout.jsonl")]
    return [(str(row["id"]), str(row["text"])) for row in rows if row["split"] == split]


def calibration_texts() -> list[str]:
    """Texts from which curvature is estimated; none of them is in any task."""
    return [str(row["text"]) for _, row in read_jsonl(DATA / "texts_calibration.jsonl")]
