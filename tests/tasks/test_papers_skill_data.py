import re

import datasets
import pytest
from huggingface_hub import constants
from skill_rows import N, bbh, letters, rows_of, write

from lirefs.errors import DataFileError, SettingError, TaskError
from lirefs.tasks.papers import skill_data
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.catalogue import SKILLS
from lirefs.tasks.task import FilledBlank

pytestmark = pytest.mark.usefixtures("asked_of_the_hub")


def test_what_has_no_data_is_left_out_with_its_reason(lm, tmp_path, asked_of_the_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    write(tmp_path, "popqa")
    tasks, left_out = skill_tasks(lm, tmp_path, limit=2)
    generated = [name for name, skill in SKILLS.items() if skill.generate]
    assert {task.name for task in tasks} == {"popqa", *generated}
    assert set(left_out) == set(SKILLS) - {"popqa", *generated}
    assert asked_of_the_hub == [("openai/gsm8k", "main", "test")]  # no wait for the next ones
    assert "no gsm8k.jsonl in" in left_out["gsm8k"]
    assert "Couldn't reach 'openai/gsm8k'" in left_out["gsm8k"]
    assert "cannot be reached" in left_out["boolq"]
    assert "no dataset on the hub replaces it" in left_out["relations"]
    assert "needs rows with a 'label'" in left_out["mmlu_reasoning"]
    assert "no data folder given" in skill_tasks(lm, None)[1]["quotes"]
    for name in ("quotes", "boolq", "mmlu_memory"):
        tasks, left_out = skill_tasks(lm, tmp_path, [name])
        assert tasks == []
        assert re.search("no .*jsonl", left_out[name])


def test_offline_by_choice_each_set_is_looked_for_in_the_cache(lm, asked_of_the_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    skill_tasks(lm, None)
    assert {name for name, *_ in asked_of_the_hub} == {s.hub.id for s in SKILLS.values() if s.hub}


@pytest.mark.parametrize(
    "problem", [ValueError("unknown split"), RuntimeError("scripts\nmore"), KeyError("x")]
)
def test_any_failure_of_a_download_is_a_reason(lm, monkeypatch, problem):
    def load_dataset(*_, **__):
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    _, left_out = skill_tasks(lm, None)
    assert type(problem).__name__ in left_out["boolq"]
    assert "\n" not in left_out["boolq"]


HUB = {
    "openai/gsm8k": {"question": "q {i}", "answer": "#### 3"},
    "apple/GSM-Symbolic": {"question": "q {i}", "answer": "#### 3", "original_id": 1},
    "juletxara/mgsm": {"question": "q {i}", "answer": None, "answer_number": 7},
    "SaylorTwift/bbh": {},
    "TIGER-Lab/MMLU-Pro": {
        "question": "q {i}",
        "options": list("abcdefghij"),
        "answer_index": 3,
        "category": "math",
    },
    "akariasai/PopQA": {
        "question": "q {i}",
        "possible_answers": '["x", "y"]',
        "prop": "place of birth",
    },
    "mandarjoshi/trivia_qa": {
        "question": "q {i}",
        "answer": {"value": "York", "aliases": ["York", "City of York"]},
        "entity_pages": {"wiki_context": ["Nothing here.", "It is York."]},
    },
    "ceval/ceval-exam": {"question": "q {i}", **dict(zip("ABCD", "wxyz")), "answer": "C"},
    "google/boolq": {"question": "q {i}", "passage": "p", "answer": True},
    "allenai/openbookqa": {
        "question_stem": "q {i}",
        "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
        "fact1": "f",
    },
    "allenai/winogrande": {
        "sentence": "q {i} _ ends",
        "option1": "u",
        "option2": "v",
        "answer": "2",
    },
}


def hub_rows(name, config, split, n=20):
    pattern = HUB[name]
    if name == "SaylorTwift/bbh":
        return [{k: v for k, v in bbh(f"bbh_{config}", i).items() if k != "task"} for i in range(n)]
    return [
        {k: v.format(i=f"{split} {i}") if isinstance(v, str) else v for k, v in pattern.items()}
        for i in range(n)
    ]


def test_sets_of_the_hub(lm, monkeypatch):
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(hub_rows(name, config, split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks, left_out = skill_tasks(lm, None)
    local_only = {name for name, skill in SKILLS.items() if not skill.hub and not skill.generate}
    assert set(left_out) == local_only
    made = {task.name: task for task in tasks}
    assert set(made) == set(SKILLS) - local_only
    for name, config, split in calls:
        assert config is None or name not in ("google/boolq", "akariasai/PopQA"), config
        assert split in ("train", "validation", "test", "val", "dev")

    assert len(made["mgsm"]) == 8 * 20  # every row of every language
    assert {item.split("/")[0] for item, *_ in made["mgsm"].items} == set(
        SKILLS["mgsm"].hub.configs
    )
    assert made["mgsm"].items[0][2] == ["7"]
    assert len(made["ceval_h"]) == 11 * 20
    item, prompt, _, right = made["ceval_h"].items[0]
    assert item.split("/")[0] in SKILLS["ceval_h"].hub.configs
    assert right == 2
    assert "q dev" in prompt.split("\n\n")[0]
    assert "q val" in prompt.split("\n\n")[-1]
    item, prompt, answers = made["popqa"].items[0]
    assert item.startswith("place_of_birth/")
    assert answers == ["x", "y"]
    for name in ("boolq", "winogrande", "openbookqa", "mmlu_pro_math"):
        assert len(made[name]) == 20, name  # examples are of another split
    assert "q train" in made["boolq"].items[0][1].split("\n\n")[0]
    assert made["openbookqa_fact"].items[0][3] == 1
    assert made["triviaqa"].items[0][2] == ["York", "City of York"]
    assert "Passage: It is York.\nQ: q validation" in made["triviaqa_open"].items[0][1]
    assert ("mandarjoshi/trivia_qa", "rc.wikipedia", "validation") in calls


def test_a_set_of_the_hub_with_other_fields_is_a_reason(lm, monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"other": 1}])
    )
    assert "akariasai/PopQA: KeyError" in skill_tasks(lm, None, ["popqa"])[1]["popqa"]


def test_a_malformed_row_of_the_hub_leaves_the_skill_out(lm, monkeypatch):
    rows = [{"sentence": "no blank", "option1": "u", "option2": "v", "answer": "1"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    reason = skill_tasks(lm, None)[1]["winogrande"]
    assert "allenai/winogrande on the hub, row 1: 'sentence' must hold one _" in reason


def test_aliases_without_a_word_are_no_answers(lm, tmp_path):
    rows = rows_of("triviaqa")
    rows[0]["answers"] = ["The The", "?", "Matt Johnson"]
    rows[1]["answers"] = ["A"]
    write(tmp_path, "triviaqa", rows)
    (task,), _ = skill_tasks(lm, tmp_path, ["triviaqa"])
    assert len(task) == N - 1 - SKILLS["triviaqa"].shots
    assert all(
        answers in (["Matt Johnson"], [f"thing{i}"])
        for i, answers in ((int(item) - 1, answers) for item, _, answers in task.items)
    )


def test_local_files_win_over_the_hub(lm, folder, asked_of_the_hub):
    skill_tasks(lm, folder, ["gsm8k", "boolq"])
    assert asked_of_the_hub == []


def test_rows_without_the_needed_part_leave_the_skill_out(lm, tmp_path):
    write(tmp_path, "triviaqa", [{"question": f"q {i}", "answers": ["x"]} for i in range(N)])
    write(tmp_path, "openbookqa", [letters(i, 4) for i in range(N)])
    tasks, left_out = skill_tasks(lm, tmp_path)
    made = {task.name for task in tasks}
    assert {"triviaqa", "openbookqa"} <= made
    for name in ("triviaqa_open", "openbookqa_fact"):
        assert "no row has the fields that the skill asks about" in left_out[name]


@pytest.mark.parametrize(
    ("skill", "change", "message"),
    [
        ("gsm8k", {"answer": "some"}, "'answer' is 'some'; expected a number"),
        ("gsm8k", {"question": 5}, "no 'question' text"),
        ("popqa", {"answers": []}, "no list of texts 'answers'"),
        ("popqa", {"answers": [1]}, "'answers' holds something that is not a text"),
        ("relations", {"prompt": "no place"}, "must hold {} once"),
        ("relations", {"object": "The"}, "has no word to compare"),
        ("boolq", {"answer": "yes"}, "expected true or false"),
        ("openbookqa", {"answer_index": 9}, "'answer_index' is 9 for 4 options"),
        ("openbookqa", {"answer_index": True}, "'answer_index' is True"),
        ("mmlu_pro", {"options": ["x"] * 11, "answer_index": 1}, "11 options; at most 10"),
        ("mmlu_memory", {"label": "both"}, "'label' is 'both'"),
        ("winogrande", {"sentence": "no blank"}, "must hold one _"),
        ("winogrande", {"answer": 3}, "must be 1 or 2"),
        ("winogrande", {"sentence": "ends in _"}, "nothing after its _"),
        ("web_of_lies", {"target": "Maybe"}, "expected one of Yes, No"),
        ("logical_deduction_three_objects", {"target": "(D)"}, r"one of \(A\), \(B\), \(C\)"),
    ],
)
def test_malformed_rows_are_named(lm, tmp_path, skill, change, message):
    rows = rows_of(SKILLS[skill].file)
    rows[3] |= change
    write(tmp_path, SKILLS[skill].file, rows)
    with pytest.raises(TaskError, match=rf"row 4: .*{message}"):
        skill_tasks(lm, tmp_path)


def test_other_errors(lm, tmp_path):
    with pytest.raises(TaskError, match="no skill 'gsm9k'; there are memorized_windows, quotes"):
        skill_tasks(lm, tmp_path, ["gsm9k"])
    with pytest.raises(SettingError, match="limit must be at least 1, got 0"):
        skill_tasks(lm, tmp_path, limit=0)
    with pytest.raises(DataFileError, match="no such folder"):
        skill_tasks(lm, tmp_path / "absent")
    write(tmp_path, "popqa", rows_of("popqa")[:3])
    with pytest.raises(TaskError, match="3 rows are too few for skill 'popqa'"):
        skill_tasks(lm, tmp_path)
    write(tmp_path, "popqa").write_text("{")
    with pytest.raises(DataFileError, match="line 1: not JSON"):
        skill_tasks(lm, tmp_path)
    with pytest.raises(TaskError, match="no items"):
        FilledBlank("empty", [])


def test_passages_hold_the_answer():
    page = " ".join(f"word{i}" for i in range(1000)) + " Old York " + "tail " * 500
    passage = skill_data.passage_around(page, ["nowhere", "old york"])
    assert "Old York" in passage
    assert 500 < len(passage) <= skill_data.PASSAGE_CHARACTERS
    assert set(passage.split()) <= set(page.split())  # no half words
    assert skill_data.passage_around(passage, ["Old York"]) == passage
    assert skill_data.passage_around("He went to Yorkshire.", ["York"]) == ""
    assert skill_data.passage_around("York is here.", ["York"]) == "York is here."
    assert skill_data.passage_around("a  b\nYork", ["York"]) == "a b York"
    assert skill_data.passage_around("anything", [" "]) == ""
