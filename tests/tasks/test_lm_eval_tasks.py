"""Tasks of lm-evaluation-harness in our comparisons, and our recitation as a task of it."""

import pytest
from lm_eval_local import (
    MULTIPLE_CHOICE,
    direction,
    evaluated,
    hflm,
    language_model,
    needs_lm_eval,
    rows,
)

import lirefs
from lirefs import MultipleChoice, Recitation
from lirefs.errors import TaskError
from lirefs.tasks import lm_eval_export
from lirefs.tasks.inference import greedy


@needs_lm_eval
def test_multiple_choice_agrees_with_lm_eval_item_by_item(lm_eval_folder):
    (lm_eval_folder / "fruits.yaml").write_text(
        MULTIPLE_CHOICE.format(data=lm_eval_folder / "rows.jsonl", shots=0)
    )
    lm = language_model()
    items = [
        (str(i), f"Q: {row['question']}\nA:", [" " + one for one in row["options"]], row["answer"])
        for i, row in enumerate(rows())
    ]
    ours = MultipleChoice("fruits", items).run(lm, lambda n: None)
    theirs = evaluated(hflm(lm), lm_eval_folder, "fruits")["samples"]["fruits"]
    assert [one.scores["accuracy"] for one in ours] == [one["acc"] for one in theirs]
    assert len({one["acc"] for one in theirs}) == 2


@needs_lm_eval
def test_tasks_of_lm_eval_score_as_in_lm_eval(lm_eval_folder):
    lm = language_model()
    fruits, words = lirefs.lm_eval_tasks(["fruits", "words"], include_path=lm_eval_folder)
    assert (fruits.name, fruits.metric, fruits.group) == ("fruits", "acc", "lm-eval")
    assert fruits.chance == pytest.approx(1 / 3)
    assert (words.metric, words.chance, len(words)) == ("exact_match", 0, 11)
    done = []
    for task in (fruits, words):
        theirs = evaluated(hflm(lm), lm_eval_folder, task.name)["samples"][task.name]
        first = [one for one in theirs if one["filter"] in ("none", "first")]
        found = task.run(lm, done.append)
        assert [one.id for one in found] == [str(one["doc_id"]) for one in first]
        assert [one.scores[task.metric] for one in found] == [one[task.metric] for one in first]
        assert [one.prompt for one in found] == [one["arguments"][0][0] for one in first]
    assert sum(done) == 22
    one = fruits.run(lm, done.append)[4]
    values = [value for value, _ in first_responses(fruits, 4, lm)]
    assert one.output == rows()[4]["options"][values.index(max(values))]
    assert one.expected == rows()[4]["options"][rows()[4]["answer"]]
    letters = [one for one in theirs if one["filter"] == "letter"]
    assert [one.scores["exact_match,letter"] for one in found] == [
        one["exact_match"] for one in letters
    ]


def first_responses(task, row, lm):
    return lirefs.lm_eval_model(lm).loglikelihood(list(task.items[row]), disable_tqdm=True)


@needs_lm_eval
def test_a_part_of_a_task_keeps_prompts_and_scores(lm_eval_folder):
    lm = language_model()
    (task,) = lirefs.lm_eval_tasks(["fruits"], include_path=lm_eval_folder)
    whole = task.run(lm, lambda n: None)
    part = task.subset([7, 2]).run(lm, lambda n: None)
    assert part == [whole[7], whole[2]]
    (few,) = lirefs.lm_eval_tasks(["fruits"], include_path=lm_eval_folder, limit=3)
    assert few.run(lm, lambda n: None) == whole[:3]
    assert len({one.prompt.split("Q:")[1] for one in whole}) > 1  # examples are drawn


@needs_lm_eval
def test_options_may_be_contexts_of_one_continuation(lm_eval_folder):
    text = MULTIPLE_CHOICE.format(data=lm_eval_folder / "rows.jsonl", shots=0).replace(
        "acc_norm", "acc"
    )
    text = text.replace('doc_to_text: "Q: {{question}}\\nA:"', "doc_to_text: answer")
    text = text.replace("doc_to_target: answer", 'doc_to_target: "is ripe"')
    (lm_eval_folder / "fruits.yaml").write_text(text.replace("[{metric: acc}, ", "["))
    lm = language_model()
    (task,) = lirefs.lm_eval_tasks(["fruits"], include_path=lm_eval_folder)
    found = task.run(lm, lambda n: None)
    theirs = evaluated(hflm(lm), lm_eval_folder, "fruits")["samples"]["fruits"]
    assert [one.scores["acc"] for one in found] == [one["acc"] for one in theirs]
    assert [float(one.expected == one.output) for one in found] == [one["acc"] for one in theirs]
    assert [one.expected for one in found] == [row["options"][row["answer"]] for row in rows()]


@needs_lm_eval
def test_unreadable_answers_are_counted(lm_eval_folder):
    text = (lm_eval_folder / "words.yaml").read_text().replace('"([A-Z])"', '"(impossible)"')
    text = text.replace("  - {name: first, filter: [{function: take_first}]}\n", "")
    (lm_eval_folder / "words.yaml").write_text(text)
    (task,) = lirefs.lm_eval_tasks(["words"], include_path=lm_eval_folder, limit=3)
    found = task.run(language_model(), lambda n: None)
    assert [one.parsed for one in found] == [False] * 3


@needs_lm_eval
def test_tasks_of_lm_eval_are_compared(lm_eval_folder):
    lm = language_model()
    tasks = lirefs.lm_eval_tasks(["fruits"], include_path=lm_eval_folder)
    steer = lirefs.Steer(direction(), "add", 4.0)
    found = lirefs.compare(lm, {"steered": steer}, tasks, resamples=50, progress=False)
    with steer.apply(lm.model):
        expected = evaluated(hflm(lm), lm_eval_folder, "fruits")["results"]["fruits"]["acc,none"]
    assert found.cell("steered", "fruits").value.value == pytest.approx(expected)


@needs_lm_eval
def test_tasks_that_cannot_be_compared_are_named(lm_eval_folder):
    with pytest.raises(TaskError, match=r"no task no_such_task.*lm_eval ls tasks"):
        lirefs.lm_eval_tasks(["no_such_task"], include_path=lm_eval_folder)
    with pytest.raises(TaskError, match="one string"):
        lirefs.lm_eval_tasks("fruits", include_path=lm_eval_folder)
    with pytest.raises(TaskError, match="at least 1"):
        lirefs.lm_eval_tasks(["fruits"], include_path=lm_eval_folder, limit=0)
    text = (lm_eval_folder / "words.yaml").read_text()
    (lm_eval_folder / "words.yaml").write_text(text.replace("rows.jsonl", "no.jsonl"))
    with pytest.raises(TaskError, match="could not load words"):
        lirefs.lm_eval_tasks(["words"], include_path=lm_eval_folder)
    text = "\n".join(line for line in text.splitlines() if "generation_kwargs" not in line)
    text = text[: text.index("metric_list")].replace("generate_until", "loglikelihood_rolling")
    (lm_eval_folder / "words.yaml").write_text(text + "metric_list: [{metric: word_perplexity}]")
    with pytest.raises(TaskError, match="none of its metrics is higher for better: word_perpl"):
        lirefs.lm_eval_tasks(["words"], include_path=lm_eval_folder)


def recitation_items(lm):
    """Items recited in part: suffixes that the model writes, changed in none to all places."""
    prompts = [f"{a}{b}" for a in "The quick brown fox" for b in "abcdefgh"]
    outputs = greedy(lm, lm.encode(prompts), 8)
    items = []
    for index, (prefix, output) in enumerate(zip(lm.encode(prompts), outputs)):
        if all(token >= 3 and token < 98 for token in output):  # printable
            suffix = [98 - token if j < index % 4 else token for j, token in enumerate(output)]
            suffix = [max(3, token) for token in suffix][: 5 + index % 4]
            items.append((f"item-{index}", prefix, suffix))
    return items


@needs_lm_eval
def test_recitation_agrees_with_lm_eval_item_by_item(quick_lm_eval, tmp_path):
    lm = language_model()
    items = recitation_items(lm)
    assert len(items) >= 8
    special = [("special", [*items[0][1], 2, 5], [7, 8])]  # <pad> inside: not in the text
    left_out = lirefs.write_lm_eval_task(tmp_path, "recite", [*items, *special], lm.tokenizer)
    assert left_out == 1
    ours = Recitation("recite", items).run(lm, lambda n: None)
    for model in (lirefs.lm_eval_model(lm), hflm(lm)):
        theirs = evaluated(model, tmp_path, "recite")["samples"]["recite"]
        assert [one["doc"]["id"] for one in theirs] == [one.id for one in ours]
        for metric in ("strict", "loose", "levenshtein"):
            assert [one[metric] for one in theirs] == [one.scores[metric] for one in ours]
    assert len({one.scores["levenshtein"] for one in ours}) > 2
    (task,) = lirefs.lm_eval_tasks(["recite"], include_path=tmp_path)
    assert task.metric == "strict"


def test_recitation_that_cannot_be_written_is_named(lm, tmp_path):
    with pytest.raises(TaskError, match="cannot name a task"):
        lirefs.write_lm_eval_task(tmp_path, "no/name", [], lm.tokenizer)
    with pytest.raises(TaskError, match="none of 1 items"):
        lirefs.write_lm_eval_task(tmp_path, "x", [("a", [0, 2], [2])], lm.tokenizer)
    assert not list(tmp_path.iterdir())


def test_the_written_scores_need_nothing_of_this_package():
    template = lm_eval_export.UTILS.read_text("utf-8")
    assert "def process_results" in template
    assert "lirefs" not in template
