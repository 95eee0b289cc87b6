"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from lirefs.model.language_model import LanguageModel
from lirefs.questions import Question
from lirefs.tasks.papers.build import SKILLS, skill_tasks
from lirefs.tasks.suite import default_tasks, memory_measures
from lirefs.tasks.task import Task


class Suite(StrEnum):
    """What to measure beside the default tasks' recited passages and perplexity."""

    MEMORIZATION = "memorization"
    """Recited passages, windows and quotes; the position stress test; perplexity and nDCG@10."""
    SKILLS = "skills"
    """The K-FAC paper's tasks in their groups, and the sets of the LiReF paper."""
    PAPERS = "papers"
    """Both, and the default tasks."""


def suite_tasks(
    lm: LanguageModel,
    suite: Suite | str,
    questions: Sequence[Question] | None = None,
    *,
    fitted_on: Sequence[Question] = (),
    memorized: str | Path | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Task], dict[str, str]]:
    """Tasks of a suite.

    Args:
        lm: The model, with nothing applied to it: the lists of nDCG are frozen here.
        suite: Which.
        questions: Labelled questions of the default tasks.
        fitted_on: Questions that a direction was fitted or chosen on; no skill asks them.
        memorized: Memorized texts, see `recitation_task`.
        data: Folder of local JSON Lines, see `lirefs.tasks.papers.build`; what is not there is asked
            for on the hub.
        limit: At most this many items per task, and half as many texts.
        seed: Draws few-shot examples and generated items.

    Returns:
        The tasks, and why others were left out.

    Raises:
        ValueError: If there is no such suite.
    """
    suite = Suite(suite)
    basis = default_tasks(lm, questions, memorized, limit)
    kept = [task for task in basis if task.group in ("memorization", "language")]

    def belongs(name: str) -> bool:
        if suite is Suite.PAPERS:  # what is generated is among the default tasks already
            return not name.startswith("generated_")
        return (SKILLS[name].group == "memorization") == (suite is Suite.MEMORIZATION)

    wanted = [name for name in SKILLS if belongs(name)]
    skills, left_out = skill_tasks(lm, data, wanted, limit=limit, seed=seed)
    skills = [_without(task, fitted_on, left_out) for task in skills]
    skills = [task for task in skills if task.name not in left_out]
    tasks = [*(basis if suite is Suite.PAPERS else kept), *skills]
    if suite is not Suite.SKILLS:
        tasks += memory_measures(lm, tasks)
    return tasks, left_out


def _without(task: Task, asked: Sequence[Question], left_out: dict[str, str]) -> Task:
    """A task without the items that ask one of some questions; noted if none is left."""
    texts = [one.text for one in asked]
    prompts = [" ".join(one for one in item[1:] if isinstance(one, str)) for item in task.items]
    # Answered examples, which all prompts begin with, may be known: a question ends after them.
    shown = next((n for n, some in enumerate(zip(*prompts, strict=False)) if len({*some}) > 1), 0)
    kept = [
        row
        for row, prompt in enumerate(prompts)
        if not any(text in prompt and prompt.rfind(text) + len(text) > shown for text in texts)
    ]
    if not kept:
        left_out[task.name] = "the direction was fitted on its questions"
        return task
    return task if len(kept) == len(task) else task.subset(kept)
