import json

import pytest

from lirefs import Question, Questions, Split, load_questions
from lirefs.errors import QuestionsError


def rows(n=20):
    return [
        {"question": f"{label} number {i}?", "label": label}
        for label in ("memory", "reasoning")
        for i in range(n)
    ]


def write(path, entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def test_builtin_set_is_balanced_and_answerable():
    questions = load_questions()
    for label in (0, 1):
        assert questions.labels.count(label) >= 200
    assert len({one.key for one in questions}) == len(questions)
    assert len({one.id for one in questions}) == len(questions)
    assert all(0 <= one.answer_index < len(one.options) for one in questions)


def test_prompt_is_the_format_of_the_paper():
    assert Question("Why?", "memory", "q").prompt == "Q: Why?\nA: "


def test_a_row_may_bring_its_prompt_format(tmp_path):
    first, second, *others = rows(2)
    first |= {"question": "Is {question} {0} a {word}?", "prompt_format": "{question} {x}\nSay {}:"}
    path = write(tmp_path / "q.jsonl", [first, second, *others])
    questions = load_questions(path)
    # Braces are text, in the question as in the format.
    assert questions[0].prompt == "Is {question} {0} a {word}? {x}\nSay {}:"
    assert questions.prompts[1:] == [f"Q: {row['question']}\nA: " for row in (second, *others)]


@pytest.mark.parametrize("wrong", ["Q:", "", "{question} {question}", "{Question}", 3, None, ["a"]])
def test_a_prompt_format_that_cannot_be_used(tmp_path, wrong):
    path = write(tmp_path / "q.jsonl", [rows(1)[0], {**rows(1)[1], "prompt_format": wrong}])
    with pytest.raises(QuestionsError, match=r"line 2: 'prompt_format' must .* \{question\} once"):
        load_questions(path)


def test_a_set_may_bring_its_split(tmp_path):
    sides = ["train", "validation", "test"]
    entries = [{**row, "split": sides[i % 3]} for i, row in enumerate(rows(6))]
    split = load_questions(write(tmp_path / "q.jsonl", entries)).split(train=2.0)  # not used
    for number, side in enumerate(split.sides.values()):
        assert [one.text for one in side] == [row["question"] for row in rows(6)[number::3]]
    del entries[4]["split"]
    with pytest.raises(QuestionsError, match="11 of 12 questions name their split"):
        load_questions(write(tmp_path / "q.jsonl", entries)).split()
    entries[4]["split"] = "dev"
    with pytest.raises(QuestionsError, match="line 5: 'split' is 'dev'; expected one of train"):
        load_questions(write(tmp_path / "q.jsonl", entries))


def test_split_is_stratified_disjoint_and_seeded(tmp_path):
    questions = load_questions(write(tmp_path / "q.jsonl", rows()))
    split = questions.split(seed=1)
    assert [len(side) for side in split.sides.values()] == [20, 10, 10]
    assert all(side.labels.count(1) == len(side) / 2 for side in split.sides.values())
    keys = [{one.key for one in side} for side in split.sides.values()]
    assert len(keys[0] | keys[1] | keys[2]) == sum(map(len, keys))
    again, other = questions.split(seed=1), questions.split(seed=2)
    assert [one.id for one in again.test] == [one.id for one in split.test]
    assert [one.id for one in other.test] != [one.id for one in split.test]


def test_duplicates_stay_on_one_side(tmp_path):
    entries = rows() + [{**row, "question": row["question"].upper() + "!"} for row in rows()]
    split = load_questions(write(tmp_path / "q.jsonl", entries)).split(seed=0)
    assert sum(len(side) for side in split.sides.values()) == 80


def test_split_refuses_shared_items():
    side = Questions([Question("a", "memory", "1"), Question("b", "reasoning", "2")])
    with pytest.raises(QuestionsError, match="share 2"):
        Split(side, side, side)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ('{"question": "a", "label": "memory"}\n{"question": ', "line 2"),
        ('\n{"question": "a"}', r"line 2: 'label' is missing"),
        ('{"question": "a", "label": "maths"}', r"'label' is 'maths'"),
        ('{"label": "memory"}', "no 'question'"),
        ('{"question": "a", "label": "memory"}', "one class only"),
        ("[1]", "line 1"),
        ('{"question": "a", "label": "memory", "options": "b"}', "'options'"),
        (
            '{"question": "a", "label": "memory", "options": ["b"], "answer_index": 1}',
            "'answer_index' is 1",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(QuestionsError, match=message):
        load_questions(path)


def test_missing_file_and_too_few_questions(tmp_path):
    with pytest.raises(QuestionsError, match="no such file"):
        load_questions(tmp_path / "absent.jsonl")
    questions = load_questions(write(tmp_path / "q.jsonl", rows(1)))
    with pytest.raises(QuestionsError, match="too few"):
        questions.split()
    with pytest.raises(QuestionsError, match="rest for test"):
        questions.split(train=0.8, validation=0.2)


def test_marks_of_prose_make_no_difference_but_signs_and_brackets_do():
    def key(text):
        return Question(text, "reasoning", "a").key

    assert key("Is it so?") == key("is it  so")
    assert key("“Who?”") == key("Who")
    assert key("1 + 23 =") != key("12 + 3 =")
    assert key("( a or b ) and c") != key("a or ( b and c )")
