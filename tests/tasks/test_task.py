import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scored import run
from skill_rows import rows_of, write

from lirefs import MultipleChoice, Perplexity, Recitation, ShortAnswer, recitation_task
from lirefs.comparison.journal import task_digest
from lirefs.errors import TaskError
from lirefs.tasks import default_suite, synthetic
from lirefs.tasks.answers import judge
from lirefs.tasks.inference import greedy, token_nlls
from lirefs.tasks.items import ItemTask
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.task import FilledBlank


def test_recitation_scores_what_the_model_really_says(lm):
    prefix = lm.encode(["some prefix"])[0]
    said = greedy(lm, [prefix], 8)[0]
    wrong = [(token + 1) % 100 for token in said]
    nearly = [*said[:7], wrong[7]]
    task = Recitation(
        "r", [("yes", prefix, said), ("no", prefix, wrong), ("nearly", prefix, nearly)]
    )
    yes, no, almost = run(task, lm)
    assert yes.scores == {"strict": 1.0, "loose": 1.0, "levenshtein": 0.0, "token_match": 1.0}
    assert no.scores["strict"] == no.scores["loose"] == 0.0
    assert almost.scores["strict"] == 0.0
    assert almost.scores["levenshtein"] == 1 / 8


def test_recitation_of_several_lengths_keeps_the_order(lm):
    prefix = lm.encode(["some prefix"])[0]
    said = greedy(lm, [prefix], 6)[0]
    task = Recitation("r", [("6", prefix, said), ("2", prefix, said[:2]), ("4", prefix, said[:4])])
    results = run(task, lm)
    assert [one.id for one in results] == ["6", "2", "4"]
    assert all(one.scores["strict"] == 1 for one in results)


def test_perplexity_weighs_tokens_not_texts(lm):
    texts = [("short", "ab"), ("long", "a much longer text than the first")]
    results = run(Perplexity("p", texts), lm)
    nlls = token_nlls(lm, lm.encode([text for _, text in texts]))
    for result, nll in zip(results, nlls):
        assert result.weight == len(nll)
        assert result.scores["nll"] == pytest.approx(float(nll.sum()), rel=1e-5)


def test_multiple_choice_takes_the_likelier_option(lm):
    said = lm.tokenizer.decode(greedy(lm, lm.encode(["prompt"]), 1)[0])
    other = "x" if said != "x" else "y"
    results = run(MultipleChoice("m", [("a", "prompt", [said, other], 0)]), lm)
    assert results[0].scores["accuracy"] == 1
    assert results[0].output == said.strip()


def test_short_answer_counts_the_unparsable():
    assert judge("Paris, of course", ["Paris"], "text") == (True, True)
    assert judge("the Netherlands", ["Netherlands"], "text") == (True, True)
    assert judge("Parisian", ["Paris"], "text") == (True, False)
    assert judge("...", ["Paris"], "text") == (False, False)
    assert judge("Paris", ["The The", "?"], "text") == (True, False)  # aliases without words
    assert judge("It is 1,234.", ["1234"], "number") == (True, True)
    assert judge("\u22125", ["-5"], "number") == (True, True)
    assert judge("12", ["1"], "number") == (True, False)
    assert judge("no idea", ["1"], "number") == (False, False)


def test_short_answer_runs(lm):
    results = run(ShortAnswer("s", [("a", "prompt", ["zzz"]), ("b", "other", ["z"])]), lm)
    assert [one.id for one in results] == ["a", "b"]


def test_named_errors(lm, tmp_path):
    for make in (Recitation, Perplexity, MultipleChoice, ShortAnswer):
        with pytest.raises(TaskError, match="no items"):
            make("empty", [])
    with pytest.raises(TaskError, match="no option 2"):
        MultipleChoice("m", [("a", "p", ["x", "y"], 2)])
    for kind in ("number", "worked"):
        assert ShortAnswer("s", [("a", "p", ["1,000", "-7"])], kind=kind)
        with pytest.raises(TaskError, match=r"'a' expects .*, which are not all numbers"):
            ShortAnswer("s", [("a", "p", ["7", "seven"])], kind=kind)
    with pytest.raises(TaskError, match="empty prefix"):
        Recitation("r", [("a", [], [1])])
    with pytest.raises(TaskError, match="fewer than two tokens"):
        Perplexity("p", [("a", "")]).run(lm, lambda n: None)
    for row in ({"nothing": 1}, {"text": "ab"}, {"prefix_ids": [1], "suffix_ids": []}):
        path = tmp_path / "m.jsonl"
        path.write_text(json.dumps(row))
        with pytest.raises(TaskError, match="line 1"):
            recitation_task(lm, path)


def test_recitation_files_in_three_forms(lm, tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz"
    ids = lm.encode([text])[0]
    rows = [
        {"text": text},
        {"prefix": text[:-12], "suffix": text[-12:]},
        {"prefix_ids": ids[:-12], "suffix_ids": ids[-12:]},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    items = recitation_task(lm, path).items
    assert {(tuple(prefix), tuple(suffix)) for _, prefix, suffix in items} == {
        (tuple(ids[:-12]), tuple(ids[-12:]))
    }


def test_generated_items_are_right_and_distinct():
    for item, prompt, (answer,) in synthetic.addition_items(80):
        assert eval(item) == int(answer)
        assert prompt.count("?") == 6
    booleans = synthetic.boolean_items(80)
    for _, prompt, options, answer in booleans:
        expression = prompt.splitlines()[-1].removesuffix(" is")
        assert str(eval(expression)) == options[answer].strip()
    assert sum(answer for *_, answer in booleans) == 40
    assert len({prompt for _, prompt, *_ in booleans}) == 80


def test_shipped_facts_are_complete():
    for frequency in ("common", "rare"):
        closed = default_suite.fact_items(frequency, with_passage=False)
        opened = default_suite.fact_items(frequency, with_passage=True)
        assert len(closed) == len(opened) >= 60
        for (_, _, answers), (_, prompt, _) in zip(closed, opened):
            passage = prompt.rsplit("Passage:", 1)[1].rsplit("Q:", 1)[0]
            assert any(answer in passage for answer in answers)


def test_calibration_texts_are_in_no_task(lm):
    calibration = set(default_suite.calibration_texts())
    for split in ("validation", "test"):
        assert not calibration & {text for _, text in default_suite.heldout_texts(split)}
    validation = {item for item, _ in default_suite.heldout_texts("validation")}
    test = {item for item, _ in default_suite.heldout_texts("test")}
    assert not validation & test
    assert len(validation) >= 100
    assert len(test) >= 60


def test_chance_is_the_mean_over_items():
    items = [("a", "p", [" x", " y"], 0), ("b", "p", [" x", " y", " z", " w"], 3)]
    assert MultipleChoice("m", items).chance == pytest.approx((1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize("make", [synthetic.tracking_items, synthetic.elimination_items])
def test_generated_choices_are_distinct_and_no_place_of_the_answer_is_favoured(make):
    items = make(80)
    assert items == make(80)
    assert len({prompt for _, prompt, _, _ in items}) == 80
    n_options = len(items[0][2])
    places = [answer for _, _, _, answer in items]
    assert all(places.count(place) > 80 / n_options / 2 for place in range(n_options))
    for _, prompt, options, answer in items:
        last = prompt.split("\n")[-1]
        assert all(option.strip() in last for option in options)
        if make is synthetic.tracking_items:
            assert last.rsplit(" to ", 1)[1].startswith(options[answer].strip())
        else:  # the only colour that nobody has yet
            held = [o for o in options if f"has the{o} hat" in last]
            assert options[answer] not in held
            assert len(held) == 2


def test_a_blank_is_scored_by_the_text_after_it_alone(lm):
    items = [
        ("1", ("some shots. Ann", "some shots. Evelyn"), " was glad.", 0),
        ("2", ("some shots. Bo", "some shots. Christopher"), "!", 1),
    ]
    counted = []
    results = FilledBlank("blanks", items).run(lm, counted.append)
    assert sum(counted) == 2
    for result, (_, contexts, ending, answer) in zip(results, items):
        values = []
        for context in contexts:
            ids = torch.tensor(lm.encode([context + ending]))
            start = len(lm.encode([context])[0])
            with torch.no_grad():
                logits = lm.model(ids).logits[0].double().log_softmax(-1)
            steps = range(start, ids.shape[1])
            values.append(sum(float(logits[step - 1, ids[0, step]]) for step in steps))
        chosen = values.index(max(values))
        assert result.output == contexts[chosen]
        assert result.scores == {"accuracy": float(chosen == answer)}
        assert result.expected == contexts[answer]


def test_worked_answers_end_at_their_line_and_count_what_is_unparsable(lm, monkeypatch):
    said = ["5 + 6 = 11. The answer is 11.\nThe answer is 12.", "I think 11.", ""]

    def greedy(lm, prompts, max_new_tokens, *, stop, advance):
        assert max_new_tokens == 40
        assert stop(lm.tokenizer.eos_token_id)
        assert not stop(lm.encode(["a"], add_special_tokens=False)[0][0])
        advance(len(prompts))
        return [[50 + i] for i in range(len(prompts))]

    monkeypatch.setattr("lirefs.tasks.inference.greedy", greedy)
    monkeypatch.setattr(type(lm.tokenizer), "decode", lambda self, ids, **_: said[ids[0] - 50])
    monkeypatch.setattr(
        type(lm), "encode", lambda self, prompts, **_: [[ord(one[0]) - 29] for one in prompts]
    )
    said += [""] * 200
    items = [(str(i), "prompt", ["11"]) for i in range(3)]
    results = ShortAnswer("worked", items, kind="worked", max_new_tokens=40).run(lm, lambda n: None)
    assert [one.scores["accuracy"] for one in results] == [1, 0, 0]
    assert [one.parsed for one in results] == [True, False, False]
    assert results[0].output == "5 + 6 = 11. The answer is 11."


def test_skills_run(lm, tmp_path):
    """One of each kind, with prompts short enough for the tiny model."""
    for file in ("relations", "winogrande", "bbh_boolean_expressions"):
        write(tmp_path, file, [r | {"object": "x"} for r in rows_of(file)])
    names = ["relations", "winogrande", "boolean_expressions", "simple_math", "boar_etruscan"]
    for task in skill_tasks(lm, tmp_path, names, limit=2)[0]:
        results = task.run(lm, lambda n: None)
        assert [one.id for one in results] == [item[0] for item in task.items]
        assert all(one.scores["accuracy"] in (0, 1) for one in results)
        alone = [replace(task, items=[item]).run(lm, lambda n: None)[0] for item in task.items]
        assert results == alone  # an item is scored from itself alone


@pytest.mark.parametrize("kind", ["text", "number", "words", "worked"])
def test_an_answer_given_as_a_string_is_one_answer(lm, kind):
    task = ShortAnswer("sums", [("a", "x", ["58", "59"]), ("b", "y", "58")], kind=kind)
    assert task.items[1] == ("b", "y", ["58"])
    assert [one.expected for one in task.run(lm, lambda n: None)] == ["58 | 59", "58"]
    assert judge("58 or so", "58", "words") == judge("58 or so", ["58"], "words")


ROWS = [
    (Perplexity, {"id": "a", "text": "some text"}, ("a", "some text")),
    (Perplexity, "some text", ("item-0", "some text")),
    (Perplexity, ["a", "some text"], ("a", "some text")),
    (ShortAnswer, {"id": 7, "prompt": "p", "answer": "x"}, ("7", "p", ["x"])),
    (ShortAnswer, {"prompt": "p", "answers": ["x", "y"]}, ("item-0", "p", ["x", "y"])),
    (
        MultipleChoice,
        {"answer": np.int64(1), "options": ["x", "y"], "prompt": "p", "id": "a"},
        ("a", "p", ["x", "y"], 1),
    ),
    (
        FilledBlank,
        {"id": "a", "contexts": ["x", "y"], "ending": " z", "answer": 0},
        ("a", ["x", "y"], " z", 0),
    ),
    (Recitation, {"id": "a", "prefix_ids": [5], "suffix_ids": [6]}, ("a", [5], [6])),
]


@pytest.mark.parametrize(("kind", "row", "item"), ROWS)
def test_rows_of_a_file_are_items(lm, kind, row, item):
    task, usual = kind("t", [row]), kind("t", [item])
    assert task.items == [item]
    assert task.run(lm, lambda n: None) == usual.run(lm, lambda n: None)
    assert task_digest("", lm, task) == task_digest("", lm, usual)


@pytest.mark.parametrize(
    ("kind", "items", "says"),
    [
        (Perplexity, "a text", "t: items must be a list, got one string"),
        (Perplexity, {"a": "text"}, "t: items must be a list, got a dict"),
        (
            Perplexity,
            [("a", "x y"), 3],
            "t: item 1 must be a tuple or a mapping of id, text, got 3",
        ),
        (Perplexity, [("a", None)], "t: text 'a' must be a str, got None"),
        (Perplexity, [{"text": "a", "txet": "b"}], "unknown key.* txet; expected id, text"),
        (ShortAnswer, [("a", "x")], r"item 0 has 2 value.*; expected id, prompt, answers"),
        (ShortAnswer, [{"prompt": "x"}], "item 0 lacks answers; expected id, prompt, answers"),
        (ShortAnswer, [("a", "x", [])], "item 'a' has no accepted answer"),
        (ShortAnswer, [("a", "x", [58])], r"item 'a': answers\[0\] must be a str, got 58"),
        (ShortAnswer, [("a", 3, ["b"])], "item 'a': prompt must be a str, got 3"),
        (MultipleChoice, [("a", "x", " true", 0)], "item 'a': options must be a list, got one str"),
        (MultipleChoice, [("a", "x", ["b"], "b")], "item 'a': answer, .* whole number, got 'b'"),
        (MultipleChoice, [("a", "x", ["b"], -1)], "item 'a' has no option -1"),
        (MultipleChoice, [None], "item 0 must be a tuple"),
        (FilledBlank, [("a", ("x",), " z", 0)], "item 'a' has 1 contexts; expected two"),
        (FilledBlank, [("a", ("x", "y"), " z", 2)], "item 'a' has no option 2"),
        (FilledBlank, [("a", "xy", " z", 0)], "item 'a': contexts must be a list"),
        (Recitation, [("a", "text", [5])], "item 'a': prefix_ids must be a list"),
        (Recitation, [("a", [5], [0.5])], "item 'a': an id of suffix_ids must be a whole number"),
        (ShortAnswer, [("a", "x", "y"), ("a", "z", "y")], "2 items have the id 'a'"),
        (Perplexity, [("a", "x y"), {"id": "a", "text": "z"}], "2 items have the id 'a'"),
        (Recitation, [("a", [5], [6])] * 3, "3 items have the id 'a'"),
    ],
)
def test_malformed_items_are_named(kind, items, says):
    with pytest.raises(TaskError, match=says):
        kind("t", items)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "exact"}, "kind is 'exact'; expected text, words, number, worked"),
        ({"kind": None}, "kind is None"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be a whole number, got '8'"),
    ],
)
def test_settings_are_checked_when_the_task_is_made(settings, says):
    with pytest.raises(TaskError, match=says):
        ShortAnswer("t", [("a", "x", "y")], **settings)
    with pytest.raises(TaskError, match="max_tokens must be at least 2"):
        Perplexity("t", ["x y"], max_tokens=1)


def test_a_task_of_a_kind_of_its_own_keeps_its_items(lm):
    @dataclass(frozen=True)
    class Own(ItemTask):
        group: str = "reasoning"

    items = [{"anything": 1}, {"anything": 2}]
    assert Own("own", items).items is items
    assert len(Own("own", items).subset([1])) == 1
    assert Own("own", items).encoded(lm) is None
