import re

import pytest
from skill_rows import write

from lirefs import load_questions
from lirefs.questions import Question
from lirefs.tasks.ndcg import RankAgreement
from lirefs.tasks.papers.suite import suite_tasks
from lirefs.tasks.recitation import StressTest
from lirefs.tasks.settings import Suite


@pytest.mark.parametrize("suite", list(Suite))
def test_suites_have_what_their_names_say(suite, lm, folder, asked_of_the_hub):
    tasks, left_out = suite_tasks(lm, suite, load_questions().split().test, data=folder, limit=4)
    groups = {task.group for task in tasks}
    names = [task.name for task in tasks]
    assert left_out == {}
    assert len(set(names)) == len(names)
    assert {"memorization", "language"} <= groups
    assert ("reasoning" in groups) == (suite is not Suite.MEMORIZATION)
    assert ("quotes" in names) == (suite is not Suite.SKILLS)
    measures = [type(task) for task in tasks if isinstance(task, StressTest | RankAgreement)]
    assert len(measures) == (0 if suite is Suite.SKILLS else 2)
    assert ("two-digit addition" in names) == (suite is Suite.PAPERS)


def test_no_skill_asks_what_a_direction_was_fitted_on(lm, tmp_path, asked_of_the_hub):
    rows = [
        {
            "question": f"What is {label} number {i}?",
            "options": ["a", "b", "c", "d"],
            "answer_index": i % 4,
            "label": label,
        }
        for label in ("memory", "reasoning")
        for i in range(20)
    ]
    write(tmp_path, "mmlu_reasoning_memory", rows)
    asked = [Question(text=row["question"], label=row["label"], id=row["question"]) for row in rows]
    whole, _ = suite_tasks(lm, "skills", data=tmp_path)
    some, _ = suite_tasks(lm, "skills", data=tmp_path, fitted_on=asked[:18])
    none, left_out = suite_tasks(lm, "skills", data=tmp_path, fitted_on=asked[:20])
    sizes = [
        {task.name: len(task) for task in tasks if task.name.startswith("mmlu")}
        for tasks in (whole, some, none)
    ]
    assert sizes[0]["mmlu_memory"] > sizes[1]["mmlu_memory"] > 0
    assert "mmlu_memory" not in sizes[2]
    assert left_out["mmlu_memory"] == "the direction was fitted on its questions"
    assert sizes[0]["mmlu_reasoning"] == sizes[2]["mmlu_reasoning"]
    for task in some:
        if task.name == "mmlu_memory":
            numbers = [re.findall(r"memory number (\d+)", item[1])[-1] for item in task.items]
            assert set(numbers) <= {"18", "19"}
