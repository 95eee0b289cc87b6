"""Questions from rows of any source: labels, scores, chats, contrast pairs."""

from types import SimpleNamespace

import datasets
import pandas as pd
import pytest

from lirefs import Question, Questions, Split, load_questions
from lirefs.errors import QuestionsError

HARM = ("harmful", "harmless")


def rows(n=12):
    return [
        {"question": f"{label} number {i}?", "label": label, "subject": "s", "id": f"{label}{i}"}
        for label in HARM
        for i in range(n)
    ]


def test_dicts_frames_and_datasets_give_the_same_questions():
    found = Questions.from_rows(rows(), labels=HARM)
    assert found.names == HARM
    assert found.labels == [1] * 12 + [0] * 12  # the first label is the one to point to
    for other in (pd.DataFrame(rows()), datasets.Dataset.from_list(rows())):
        assert list(Questions.from_rows(other, labels=HARM)) == list(found)


def test_values_that_a_table_lacks_are_left_out():
    given = [{**row, "prompt_format": "{question}!"} if i else row for i, row in enumerate(rows(1))]
    given[0] |= {"answer_index": 0, "options": ["a", "b"], "prompt_format": None}
    for table in (pd.DataFrame(given), datasets.Dataset.from_list(given)):
        first, second = Questions.from_rows(table, labels=HARM)
        assert first.prompt == "Q: harmful number 0?\nA: "
        assert second.prompt == "harmless number 0?!"
        assert (second.options, second.answer_index) == ((), None)


def test_class_labels_of_a_dataset_have_names():
    features = datasets.Features(
        {"question": datasets.Value("string"), "label": datasets.ClassLabel(names=list(HARM))}
    )
    table = datasets.Dataset.from_dict({"question": ["a", "b"], "label": [1, 0]}, features=features)
    found = Questions.from_rows(table, labels=HARM)
    assert [one.label for one in found] == ["harmless", "harmful"]
    assert table[0]["label"] == 1  # the caller's own is as it was


def test_labels_may_be_numbers():
    given = [{"question": "a", "label": 0}, {"question": "b", "label": 1}]
    assert Questions.from_rows(given, labels=(1, 0)).labels == [0, 1]
    assert Questions.from_rows(pd.DataFrame(given), labels=(1, 0)).labels == [0, 1]


def test_scores_give_labels_where_there_are_none():
    given = [{"question": str(i), "score": i / 4} for i in range(5)]
    found = Questions.from_rows(given, labels=HARM)
    assert found.labels == [0, 0, 0, 1, 1]
    assert [one.score for one in found] == [0, 0.25, 0.5, 0.75, 1]


def test_prompts_are_taken_verbatim():
    given = [{"question": " a \n", "label": "x"}, {"question": "{question} b", "label": "y"}]
    found = Questions.from_rows(given, labels=["x", "y"], prompt_format=None)
    assert found.prompts == [" a \n", "{question} b"]
    found = Questions.from_rows(given, labels=["x", "y"], prompt_format="Say: {question} ->")
    assert found.prompts == ["Say: a ->", "Say: {question} b ->"]


def test_a_file_takes_the_same_settings(tmp_path):
    path = tmp_path / "q.jsonl"
    pd.DataFrame(rows()).to_json(path, orient="records", lines=True)
    found = load_questions(path, labels=HARM, prompt_format=None)
    assert list(found) == list(Questions.from_rows(rows(), labels=HARM, prompt_format=None))


def test_text_and_label_may_have_names_of_their_own(tmp_path):
    given = [{"text": one["question"], "tone": one["label"], "id": one["id"], "subject": "s"}
             for one in rows()]  # fmt: skip
    names = {"question": "text", "label": "tone", "labels": HARM}
    expected = list(Questions.from_rows(rows(), labels=HARM))
    path = tmp_path / "q.jsonl"
    pd.DataFrame(given).to_json(path, orient="records", lines=True)
    for table in (given, pd.DataFrame(given), datasets.Dataset.from_list(given)):
        assert list(Questions.from_rows(table, **names)) == expected
    assert list(load_questions(path, **names)) == expected
    features = datasets.Features(
        {"text": datasets.Value("string"), "tone": datasets.ClassLabel(names=list(HARM))}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "tone": [1, 0]}, features=features)
    assert [one.label for one in Questions.from_rows(table, **names)] == ["harmless", "harmful"]


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        ({"text": "a", "tone": "x"}, {}, r"no 'question' text; the row has 'text', 'tone': .*"
         r"question="),
        ({"text": "a", "tone": "x"}, {"question": "text"},
         r"'label' is missing; the row has 'text', 'tone': .*label="),
        ({"question": "a"}, {"question": "txt"}, r"no 'txt' text; the row has 'question'"),
        ({"question": "", "label": "x"}, {}, r"no 'question' text$"),
        ({"question": "a", "label": "upbeat"}, {}, r"'label' is 'upbeat'; .*labels="),
        ({"question": "a", "label": "upbeat"}, {"question": 3}, r"question= must be a str"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_found_is_told_how_to_be_named(row, names, message):
    with pytest.raises(QuestionsError, match=message):
        Questions.from_rows([row], **names)


def test_messages_and_questions_as_chats():
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    given = [{"messages": talk, "label": "harmful"}, {"question": " Why? ", "label": "harmless"}]
    first, second = Questions.from_rows(given, labels=HARM, chat=True)
    assert first.messages == (("system", "Be kind."), ("user", "Hi"))
    assert first.text == "Be kind.\nHi"
    assert second.messages == (("user", "Why?"),)
    with pytest.raises(QuestionsError, match=r"'row-0' is a chat.*prompts_of\(lm"):
        _ = first.prompt
    shaped = Questions.from_rows(given, labels=HARM, chat=True, prompt_format="Say {question}")
    assert shaped[1].messages == (("user", "Say Why?"),)


@pytest.mark.parametrize(
    "pairs",
    [
        [("good 1", "bad 1"), ("good 2", "bad 2")],
        [["good 1", "bad 1"], SimpleNamespace(positive="good 2", negative="bad 2")],
        [SimpleNamespace(positive_str=f"good {i}", negative_str=f"bad {i}") for i in (1, 2)],
        [{"positive": f"good {i}", "negative": f"bad {i}"} for i in (1, 2)],
        pd.DataFrame([("good 1", "bad 1"), ("good 2", "bad 2")], columns=["positive", "negative"]),
        datasets.Dataset.from_dict(
            {"positive": ["good 1", "good 2"], "negative": ["bad 1", "bad 2"]}
        ),
    ],
    ids=["tuples", "repeng", "steering-vectors", "dicts", "frame", "dataset"],
)
def test_contrast_pairs(pairs):
    found = Questions.from_pairs(pairs)
    assert found.prompts == ["good 1", "bad 1", "good 2", "bad 2"]
    assert found.labels == [1, 0, 1, 0]
    assert found.names == ("positive", "negative")
    assert [one.pair for one in found] == ["0", "0", "1", "1"]
    assert len({one.id for one in found}) == 4


def test_pairs_stay_together_in_a_split():
    # Every fourth pair shares its negative text with the one before.
    pairs = [(f"good {i}", f"bad {i - (i % 4 == 3)}") for i in range(40)]
    split = Questions.from_pairs(pairs, labels=HARM).split(seed=0)
    assert sum(len(side) for side in split.sides.values()) == 80
    for side in split.sides.values():
        assert side.names == HARM
        assert side.labels.count(1) == side.labels.count(0) == len({one.pair for one in side})
    assert 16 <= split.train.labels.count(1) <= 24
    one = Questions([Question("a", "x", "1", pair="p"), Question("b", "y", "2")], labels=["x", "y"])
    two = Questions([Question("c", "y", "3", pair="p"), Question("d", "x", "4")], labels=["x", "y"])
    three = Questions([Question("e", "y", "5"), Question("f", "x", "6")], labels=["x", "y"])
    with pytest.raises(QuestionsError, match="train and validation share 1 pair"):
        Split(one, two, three)
    other = Questions([Question("e", "y", "5"), Question("f", "x", "6")], labels=["y", "x"])
    with pytest.raises(QuestionsError, match=r"train has the labels .*, test has"):
        Split(one, three, other)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (rows(), {}, r"rows, row 0: 'label' is 'harmful'; expected 'reasoning' or 'memory'"),
        (rows(), {"labels": "ab"}, "labels must be a list, got one string"),
        (rows(), {"labels": ("a", "a")}, "two different names"),
        (rows(), {"labels": ("a",)}, "two different names"),
        (rows()[:12], {"labels": HARM}, "one class only.*'harmful' and questions labelled"),
        (["text"], {}, r"rows\[0\] must be a Mapping"),
        (None, {}, "rows must be a list, got None"),
        ([], {}, "no questions in it"),
        (rows(), {"labels": HARM, "prompt_format": "Q:"}, r"\{question\} once"),
        (rows(), {"labels": HARM, "prompt_format": 3}, r"\{question\} once"),
        ([{"messages": "hi", "label": "memory"}], {}, "row 0: 'messages' must be a list"),
        ([{"messages": [], "label": "memory"}], {}, "'messages' is empty"),
        ([{"messages": [{"role": "user"}], "label": "memory"}], {}, "needs a 'role' and a 'cont"),
        (
            [{"messages": [{"role": "u", "content": "c"}], "question": "q", "label": "memory"}],
            {},
            "both 'question' and 'messages'",
        ),
        ([{"question": "a", "score": "high"}], {}, "'score' is not a finite number"),
    ],
)
def test_rows_that_cannot_be_used(given, settings, message):
    with pytest.raises(QuestionsError, match=message):
        Questions.from_rows(given, **settings)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "b"), ("c",)], "pairs, pair 1: must be .positive, negative., got a tuple"),
        (["ab"], r"pair 0: must be"),
        ([("a", " ")], "row 1: no 'question' text"),
        ([(1, "b")], "'messages' must be a list"),
        ("ab", "must be a list"),
    ],
)
def test_pairs_that_cannot_be_used(pairs, message):
    with pytest.raises(QuestionsError, match=message):
        Questions.from_pairs(pairs)
