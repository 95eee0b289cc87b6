"""lm-evaluation-harness in both directions, against its own HFLM on the same data."""

import importlib.util
import json
import string
import sys
from collections import Counter

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import lirefs
from lirefs import Direction, MultipleChoice, Recitation, prompt_lengths, wrap
from lirefs.errors import TaskError
from lirefs.harness import lm_evaluation_export
from lirefs.harness.engine import greedy

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed: pip install 'lm-eval>=0.4.13'",
)

MULTIPLE_CHOICE = """
task: fruits
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
num_fewshot: {shots}
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Say {{{{question}}}}:"
doc_to_target: "{{{{options[answer]}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 12}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - name: letter
    filter: [{{function: regex, regex_pattern: "([A-Z])"}}, {{function: take_first}}]
"""
FRUITS = ["apple", "fig", "plum", "orange", "pear"]


def rows(count=11):
    return [
        {
            "question": f"{FRUITS[i % 5]} " * (1 + i % 3) + str(i),
            "options": [FRUITS[i % 5], FRUITS[(i + 1) % 5], "an " + FRUITS[(i + 2) % 5]],
            "answer": i % 3,
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(quick_lm_eval, tmp_path, monkeypatch):
    """Two tasks with local data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows())))
    (tmp_path / "fruits.yaml").write_text(MULTIPLE_CHOICE.format(data=data, shots=2))
    until = json.dumps([character * 2 for character in "ab"] + ["e", "Q"])
    (tmp_path / "words.yaml").write_text(GENERATION.format(data=data, until=until))
    return tmp_path


def language_model(family="llama", bos=True):
    model = fresh_model(family, **({"max_position_embeddings": 256} if family == "llama" else {}))
    return wrap(model, tiny_tokenizer(bos=bos))


def hflm(lm, batch_size=3):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def evaluated(model, folder, task, **settings):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder))
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings
    )


def direction():
    return Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)), 1)


def test_a_missing_lm_eval_is_named(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TaskError, match="pip install 'lm-eval"):
        lirefs.lm_eval_model(lm)
    with pytest.raises(TaskError, match="pip install 'lm-eval"):
        lirefs.lm_eval_tasks(["arc_easy"])


@needs_lm_eval
@pytest.mark.parametrize(("family", "bos"), [("llama", True), ("gpt2", False), ("gemma2", True)])
def test_log_likelihoods_are_those_of_hflm(family, bos):
    lm = language_model(family, bos)
    long = string.printable[:95] * 3
    pairs = [
        ("a question?", " yes"),
        ("a question?", " no"),
        ("a question?", "!"),
        ("trailing spaces  ", "move"),
        ("", "no context"),
        ("", "<s>or its first token" if bos else "none at all"),
        ("<s>has the first token already", " x"),
        (long, " truncated"),
        (long, " x"),
    ]
    pairs += [("b", one) for one in string.ascii_lowercase]  # one of them is the greedy one
    requests = [request("loglikelihood", *pair) for pair in pairs]
    ours = lirefs.lm_eval_model(lm, batch_tokens=200).loglikelihood(requests, disable_tqdm=True)
    theirs = hflm(lm).loglikelihood(requests, disable_tqdm=True)
    for (value, greedily), (expected, expected_greedily) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedily == expected_greedily
    texts = ["short", "x", long * 2, "<s>begun"]
    rolling = [request("loglikelihood_rolling", text) for text in texts]
    ours = lirefs.lm_eval_model(lm).loglikelihood_rolling(rolling, disable_tqdm=True)
    theirs = hflm(lm).loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-6)


@needs_lm_eval
def test_greedy_flags_say_what_the_model_would_write():
    lm = language_model()
    prompts = [f"some words {one}" for one in string.ascii_letters]
    outputs = [lm.tokenizer.decode(one) for one in greedy(lm, lm.encode(prompts), 3)]
    prompt, said = next(one for one in zip(prompts, outputs) if len(one[1]) == 3)  # printable
    pairs = [(prompt, said), (prompt, said[:-1] + "#"), (prompt, "#" + said)]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    found = lirefs.lm_eval_model(lm).loglikelihood(requests, disable_tqdm=True)
    assert [greedily for _, greedily in found] == [True, False, False]


@needs_lm_eval
@pytest.mark.parametrize(("family", "bos"), [("llama", True), ("gpt2", False)])
def test_generation_is_that_of_hflm(family, bos):
    lm = language_model(family, bos)
    contexts = ["a", "something else", "why not", string.printable[:95] * 3, "z " * 9]
    free = lirefs.lm_eval_model(lm).generate_until(
        [request("generate_until", one, {"until": [], "max_gen_toks": 20}) for one in contexts],
        disable_tqdm=True,
    )
    common = [one for one, _ in Counter("".join(free)).most_common(2)]
    settings = [
        {"until": [], "max_gen_toks": 20},
        {"until": common, "max_gen_toks": 30, "temperature": 0.0},
        {"until": free[0][2:5], "max_new_tokens": 20, "do_sample": False, "temperature": 0.7},
        {"until": [free[1][4:6], "never this"]},
    ]
    # HFLM's default length does not fit into these models.
    requests = [
        request("generate_until", context, {"max_gen_toks": 25, **one})
        for one in settings
        for context in contexts
    ]
    ours = lirefs.lm_eval_model(lm, batch_tokens=150).generate_until(requests, disable_tqdm=True)
    assert ours == hflm(lm).generate_until(requests, disable_tqdm=True)
    assert len({len(text) for text in ours}) > 3
    begun = [request("generate_until", "<s>begun", {"until": [], "max_gen_toks": 9})]
    ours = lirefs.lm_eval_model(lm).generate_until(begun, disable_tqdm=True)
    assert ours == hflm(lm).generate_until(begun, disable_tqdm=True)


@needs_lm_eval
def test_end_tokens_of_the_generation_config_end_a_text():
    lm = language_model()
    said = greedy(lm, lm.encode(["x"]), 8)[0]
    lm.model.generation_config.eos_token_id = [1, said[3]]
    requests = [request("generate_until", "x", {"until": [], "max_gen_toks": 8})]
    ours = lirefs.lm_eval_model(lm).generate_until(requests, disable_tqdm=True)
    assert ours == hflm(lm).generate_until(requests, disable_tqdm=True)
    assert ours == [lm.tokenizer.decode(said[: said.index(said[3]) + 1], skip_special_tokens=True)]


@needs_lm_eval
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.5},
        {"temperature": 0.5},
        {"num_beams": 2},
        {"max_gen_toks": 10_000},
        {"max_gen_toks": 0},
    ],
)
def test_what_is_not_greedy_is_refused(settings):
    model = lirefs.lm_eval_model(language_model())
    with pytest.raises(TaskError, match=r"greedy|no room"):
        model.generate_until([request("generate_until", "x", {"until": ["."], **settings})])


@needs_lm_eval
def test_a_request_without_tokens_is_refused():
    model = lirefs.lm_eval_model(language_model())
    with pytest.raises(TaskError, match="needs one at least"):
        model.loglikelihood([request("loglikelihood", "x", "")], disable_tqdm=True)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@needs_lm_eval
@pytest.mark.parametrize("task", ["fruits", "words"])
@pytest.mark.parametrize("chat", [False, True])
def test_evaluations_agree_with_hflm_item_by_item(task, chat, folder):
    lm = language_model()
    lm.tokenizer.chat_template = TEMPLATE
    settings = {"apply_chat_template": chat}
    if chat:
        settings["system_instruction"] = "Be brief."
    steer = direction().steer("add", 2.0)
    ours = evaluated(lirefs.lm_eval_model(lm, steer), folder, task, **settings)
    with steer.apply(lm.model):
        theirs = evaluated(hflm(lm), folder, task, **settings)
    assert ours["results"][task] == pytest.approx(theirs["results"][task], abs=1e-9)
    assert ours["config"]["intervention"] == steer.describe()
    for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
        assert one["arguments"] == other["arguments"]
        if task == "words":
            assert one["filtered_resps"] == other["filtered_resps"]
        else:
            values = [value for value, _ in one["filtered_resps"]]
            expected = [value for value, _ in other["filtered_resps"]]
            assert values == pytest.approx(expected, abs=1e-4)
            assert one["acc"] == other["acc"]
            assert one["acc_norm"] == other["acc_norm"]


@needs_lm_eval
@pytest.mark.parametrize("scope", ["prompt", "generated", "last_prompt_token"])
def test_scopes_know_the_context_of_both_kinds_of_request(scope):
    lm = language_model()
    steer = direction().steer("add", 3.0, scope=scope)
    model = lirefs.lm_eval_model(lm, steer)
    contexts = ["x", "something else", "why not"]
    texts = model.generate_until(
        [request("generate_until", one, {"until": [], "max_gen_toks": 6}) for one in contexts],
        disable_tqdm=True,
    )
    pairs = [(context, option) for context in contexts for option in ("yes", "you", "perhaps")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], True)

    def logits(ids, prompt):
        with torch.no_grad(), steer.apply(lm.model), prompt_lengths(prompt):
            return lm.model(torch.tensor([ids]), use_cache=False).logits[0]

    for context, text in zip(contexts, texts):
        prompt = lm.encode([context])[0]
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(logits(ids, len(prompt))[-1].argmax()))
        expected = lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert text == expected.split("</s>")[0]
    for (context, option), (value, _) in zip(pairs, found):
        prompt, ids = lm.encode([context, context + option])
        logprobs = torch.log_softmax(logits(ids[:-1], len(prompt)), -1)
        targets = torch.tensor(ids[len(prompt) :])
        expected = logprobs[len(prompt) - 1 :].gather(1, targets[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-4)


@needs_lm_eval
def test_the_intervention_is_there_during_a_call_alone(monkeypatch):
    lm = language_model()
    model = lirefs.lm_eval_model(lm, direction().steer("add", 3.0))
    block = lm.layout.block(lm.model, 1)

    def hooks():
        return len(block._forward_hooks) + len(block._forward_pre_hooks)

    def fail(*arguments, **settings):
        assert hooks() == 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lirefs.harness.lm_evaluation_engine.greedy", fail)
    monkeypatch.setattr("lirefs.harness.lm_evaluation_engine.score_continuations", fail)
    with pytest.raises(RuntimeError, match="memory"):
        model.generate_until([request("generate_until", "x", {"until": [], "max_gen_toks": 2})])
    with pytest.raises(RuntimeError, match="memory"):
        model.loglikelihood([request("loglikelihood", "x", "y")], disable_tqdm=True)
    assert hooks() == 0


@needs_lm_eval
def test_multiple_choice_agrees_with_lm_eval_item_by_item(folder):
    (folder / "fruits.yaml").write_text(MULTIPLE_CHOICE.format(data=folder / "rows.jsonl", shots=0))
    lm = language_model()
    items = [
        (str(i), f"Q: {row['question']}\nA:", [" " + one for one in row["options"]], row["answer"])
        for i, row in enumerate(rows())
    ]
    ours = MultipleChoice("fruits", items).run(lm, lambda n: None)
    theirs = evaluated(hflm(lm), folder, "fruits")["samples"]["fruits"]
    assert [one.scores["accuracy"] for one in ours] == [one["acc"] for one in theirs]
    assert len({one["acc"] for one in theirs}) == 2


@needs_lm_eval
def test_tasks_of_lm_eval_score_as_in_lm_eval(folder):
    lm = language_model()
    fruits, words = lirefs.lm_eval_tasks(["fruits", "words"], include_path=folder)
    assert (fruits.name, fruits.metric, fruits.group) == ("fruits", "acc", "lm-eval")
    assert fruits.chance == pytest.approx(1 / 3)
    assert (words.metric, words.chance, len(words)) == ("exact_match", 0, 11)
    done = []
    for task in (fruits, words):
        theirs = evaluated(hflm(lm), folder, task.name)["samples"][task.name]
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
def test_a_part_of_a_task_keeps_prompts_and_scores(folder):
    lm = language_model()
    (task,) = lirefs.lm_eval_tasks(["fruits"], include_path=folder)
    whole = task.run(lm, lambda n: None)
    part = task.subset([7, 2]).run(lm, lambda n: None)
    assert part == [whole[7], whole[2]]
    (few,) = lirefs.lm_eval_tasks(["fruits"], include_path=folder, limit=3)
    assert few.run(lm, lambda n: None) == whole[:3]
    assert len({one.prompt.split("Q:")[1] for one in whole}) > 1  # examples are drawn


@needs_lm_eval
def test_options_may_be_contexts_of_one_continuation(folder):
    text = MULTIPLE_CHOICE.format(data=folder / "rows.jsonl", shots=0).replace("acc_norm", "acc")
    text = text.replace('doc_to_text: "Q: {{question}}\\nA:"', "doc_to_text: answer")
    text = text.replace("doc_to_target: answer", 'doc_to_target: "is ripe"')
    (folder / "fruits.yaml").write_text(text.replace("[{metric: acc}, ", "["))
    lm = language_model()
    (task,) = lirefs.lm_eval_tasks(["fruits"], include_path=folder)
    found = task.run(lm, lambda n: None)
    theirs = evaluated(hflm(lm), folder, "fruits")["samples"]["fruits"]
    assert [one.scores["acc"] for one in found] == [one["acc"] for one in theirs]
    assert [float(one.expected == one.output) for one in found] == [one["acc"] for one in theirs]
    assert [one.expected for one in found] == [row["options"][row["answer"]] for row in rows()]


@needs_lm_eval
def test_unreadable_answers_are_counted(folder):
    text = (folder / "words.yaml").read_text().replace('"([A-Z])"', '"(impossible)"')
    text = text.replace("  - {name: first, filter: [{function: take_first}]}\n", "")
    (folder / "words.yaml").write_text(text)
    (task,) = lirefs.lm_eval_tasks(["words"], include_path=folder, limit=3)
    found = task.run(language_model(), lambda n: None)
    assert [one.parsed for one in found] == [False] * 3


@needs_lm_eval
def test_tasks_of_lm_eval_are_compared(folder):
    lm = language_model()
    tasks = lirefs.lm_eval_tasks(["fruits"], include_path=folder)
    steer = direction().steer("add", 4.0)
    found = lirefs.compare(lm, {"steered": steer}, tasks, resamples=50, progress=False)
    with steer.apply(lm.model):
        expected = evaluated(hflm(lm), folder, "fruits")["results"]["fruits"]["acc,none"]
    assert found.cell("steered", "fruits").value.value == pytest.approx(expected)


@needs_lm_eval
def test_tasks_that_cannot_be_compared_are_named(folder):
    with pytest.raises(TaskError, match=r"no task no_such_task.*lm_eval ls tasks"):
        lirefs.lm_eval_tasks(["no_such_task"], include_path=folder)
    with pytest.raises(TaskError, match="one string"):
        lirefs.lm_eval_tasks("fruits", include_path=folder)
    with pytest.raises(TaskError, match="at least 1"):
        lirefs.lm_eval_tasks(["fruits"], include_path=folder, limit=0)
    text = (folder / "words.yaml").read_text()
    (folder / "words.yaml").write_text(text.replace("rows.jsonl", "no.jsonl"))
    with pytest.raises(TaskError, match="could not load words"):
        lirefs.lm_eval_tasks(["words"], include_path=folder)
    text = "\n".join(line for line in text.splitlines() if "generation_kwargs" not in line)
    text = text[: text.index("metric_list")].replace("generate_until", "loglikelihood_rolling")
    (folder / "words.yaml").write_text(text + "metric_list: [{metric: word_perplexity}]")
    with pytest.raises(TaskError, match="none of its metrics is higher for better: word_perpl"):
        lirefs.lm_eval_tasks(["words"], include_path=folder)


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
    assert "lirefs" not in lm_evaluation_export._UTILS
