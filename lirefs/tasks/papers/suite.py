"""The suites of the command line: which tasks to measure beyond the default ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lirefs.files import read_jsonl
from lirefs.model.language_model import LanguageModel
from lirefs.questions import Question
from lirefs.questions.question import same_text
from lirefs.tasks.default_suite import default_tasks, memory_measures
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.catalogue import SKILLS
from lirefs.tasks.settings import Suite
from lirefs.tasks.task import Task
from lirefs.tasks.texts import Texts


def suite_tasks(
    lm: LanguageModel,
    suite: Suite | str,
    questions: Sequence[Question] | None = None,
    *,
    fitted_on: Sequence[Question] = (),
    memorized: Texts | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of a suite.

    Args:
        lm: The model, with nothing applied to it: the rankings of nDCG are frozen here.
        suite: Which suite.
        questions: See `default_tasks`.
        fitted_on: Questions that a direction was fitted or chosen on; no skill asks them.
        memorized: See `default_tasks`.
        data: Folder of JSON Lines files, see `skill_tasks`.
        limit: At most this many items per task, and half as many texts.
        seed: Seed of answered examples and generated items.

    Returns:
        The tasks, and for each task that was left out the reason.

    Raises:
        ValueError: No such suite.
    """
    suite = Suite(suite)
    tasks = default_tasks(lm, questions, memorized, limit)
    if suite is Suite.PAPERS:  # the default tasks have the generated items already
        wanted = [name for name in SKILLS if not name.startswith("generated_")]
    else:
        tasks = [task for task in tasks if task.group in ("memorization", "language")]
        recited = suite is Suite.MEMORIZATION
        wanted = [name for name in SKILLS if (SKILLS[name].group == "memorization") == recited]
    skills, left_out = skill_tasks(lm, data, wanted, limit=limit, seed=seed)
    for task in skills:
        if rows := _unasked(task, fitted_on):
            tasks.append(task.subset(rows))
        else:
            left_out[task.name] = "the direction was fitted on its questions"
    if suite is not Suite.SKILLS:
        tasks += memory_measures(lm, tasks)
    return tasks, left_out


def check_files(data: Path) -> None:
    """Raise DataFileError if a skill's file in a folder of data cannot be read."""
    for name in sorted({one.file for one in SKILLS.values()}):
        for file in data.glob(f"{name}.jsonl"):
            read_jsonl(file)


def _plain(text: str) -> str:
    """A text without case, however Unicode writes it and whatever its spaces."""
    return " ".join(same_text(text).casefold().split())


def _unasked(task: Task, asked: Sequence[Question]) -> list[int]:
    """Rows of the items that ask none of some questions."""
    texts = [_plain(one.text) for one in asked]
    prompts = [
        _plain(" ".join(one for one in item[1:] if isinstance(one, str))) for item in task.items
    ]
    # All prompts begin with the same answered examples, which may be among the questions: only a
    # question that ends after them is asked.
    shown = next((n for n, some in enumerate(zip(*prompts, strict=False)) if len({*some}) > 1), 0)
    return [
        row
        for row, prompt in enumerate(prompts)
        if not any(text in prompt and prompt.rfind(text) + len(text) > shown for text in texts)
    ]
