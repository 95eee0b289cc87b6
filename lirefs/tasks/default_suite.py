"""The default tasks, on items that the project ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lirefs.errors import TaskError, must_be, whole_number
from lirefs.files import read_jsonl
from lirefs.model.language_model import LanguageModel
from lirefs.questions import Question, load_questions
from lirefs.tasks import synthetic
from lirefs.tasks.ndcg import ndcg_task
from lirefs.tasks.recitation import Recitation, StressTest, recitation_task
from lirefs.tasks.shipped_data import DATA as DATA
from lirefs.tasks.synthetic import AnswerItem, ChoiceItem
from lirefs.tasks.task import MultipleChoice, Perplexity, ShortAnswer, Task
from lirefs.tasks.texts import Texts


def default_tasks(
    lm: LanguageModel,
    questions: Sequence[Question] | None = None,
    memorized: Texts | None = None,
    limit: int | None = None,
) -> list[Task]:
    """Twelve tasks, of all six groups; fewer if the questions have no options.

    Args:
        lm: The model; its tokenizer cuts the memorized texts.
        questions: Labelled questions with options, for the two multiple-choice tasks: the test
            side of a split. None for that side of the project's own set.
        memorized: Texts for `recitation_task`; None for the project's own passages.
        limit: At most this many items per task, and half as many texts.

    Raises:
        TaskError: A row of `memorized` lacks a field.
        DataFileError: `memorized` cannot be read.
    """
    must_be(lm, LanguageModel, "lm", TaskError)
    if limit is not None:
        whole_number(limit, "limit", least=1, error=TaskError)
    chosen = list(load_questions().split().test if questions is None else questions)
    with_options = [one for one in chosen if one.options and one.answer_index is not None]
    sums = synthetic.addition_items(80)[:limit]
    tasks: list[Task] = [
        recitation_task(lm, DATA / "passages.jsonl" if memorized is None else memorized, limit),
        ShortAnswer("two-digit addition", sums, "arithmetic", kind="number"),
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
    return [
        *tasks,
        MultipleChoice("boolean expressions", synthetic.boolean_items(80)[:limit]),
        MultipleChoice("object tracking", synthetic.tracking_items(80)[:limit]),
        MultipleChoice("elimination", synthetic.elimination_items(80)[:limit]),
        Perplexity("held-out texts", heldout_texts("test")[: limit and limit // 2]),
    ]


def fact_items(frequency: str, with_passage: bool) -> list[AnswerItem]:
    """Questions on `common` or `rare` facts, with four answered examples before each.

    Open-book: before each question stands a passage that holds its answer.
    """
    if frequency not in ("common", "rare"):
        raise TaskError(f"frequency is {frequency!r:.60}; expected 'common' or 'rare'")
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


def choice_item(question: Question) -> ChoiceItem:
    """A labelled question as a multiple-choice item; the options are not shown."""
    must_be(question, Question, "question", TaskError)
    options = [f" {option}" for option in question.options]
    return question.id, f"Q: {question.text}\nA:", options, question.answer_index or 0


def heldout_texts(split: str) -> list[tuple[str, str]]:
    """Texts on which perplexity is measured: the `validation` or the `test` part."""
    if split not in ("validation", "test"):
        raise TaskError(f"split is {split!r:.60}; expected 'validation' or 'test'")
    rows = read_jsonl(DATA / "texts_heldout.jsonl")
    return [(str(row["id"]), str(row["text"])) for _, row in rows if row["split"] == split]


def calibration_texts() -> list[str]:
    """Texts to estimate curvature from: 140 of about 200 tokens, in English, in no task."""
    return [str(row["text"]) for _, row in read_jsonl(DATA / "texts_calibration.jsonl")]


def memory_measures(lm: LanguageModel, tasks: Sequence[Task]) -> list[Task]:
    """The stress test on the first recitation task's items, and nDCG on the perplexity's texts."""
    recited = next(task for task in tasks if isinstance(task, Recitation))
    texts = next(task for task in tasks if isinstance(task, Perplexity))
    return [
        StressTest(f"{recited.name}, stress test", recited.items),
        ndcg_task(lm, texts.items, name=f"{texts.name}, top 10"),
    ]
