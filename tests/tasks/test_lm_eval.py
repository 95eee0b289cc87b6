"""Our models in lm-evaluation-harness, against its own HFLM on the same data."""

import string
import sys
from collections import Counter

import pytest
import torch
from lm_eval_local import direction, evaluated, hflm, language_model, needs_lm_eval
from passes import counted

import lirefs
from lirefs import prompt_lengths
from lirefs.errors import TaskError
from lirefs.tasks.inference import greedy


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


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
    with counted(lm, 0) as together:
        ours = lirefs.lm_eval_model(lm).loglikelihood_rolling(rolling, disable_tqdm=True)
    with counted(lm, 0) as alone:  # a quarter of one token is one, and not as many as fit
        one = lirefs.lm_eval_model(lm, batch_tokens=1)
        assert one.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(ours)
    assert len(alone) > len(together)
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
    with pytest.raises(TaskError, match="it needs at least 1 of each"):
        model.loglikelihood([request("loglikelihood", "x", "")], disable_tqdm=True)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@needs_lm_eval
@pytest.mark.parametrize("task", ["fruits", "words"])
@pytest.mark.parametrize("chat", [False, True])
def test_evaluations_agree_with_hflm_item_by_item(task, chat, lm_eval_folder):
    lm = language_model()
    lm.tokenizer.chat_template = TEMPLATE
    settings = {"apply_chat_template": chat}
    if chat:
        settings["system_instruction"] = "Be brief."
    steer = lirefs.Steer(direction(), "add", 2.0)
    ours = evaluated(lirefs.lm_eval_model(lm, steer), lm_eval_folder, task, **settings)
    with steer.apply(lm.model):
        theirs = evaluated(hflm(lm), lm_eval_folder, task, **settings)
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
    steer = lirefs.Steer(direction(), "add", 3.0, scope=scope)
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
    model = lirefs.lm_eval_model(lm, lirefs.Steer(direction(), "add", 3.0))
    block = lm.layout.block(lm.model, 1)

    def hooks():
        return len(block._forward_hooks) + len(block._forward_pre_hooks)

    def fail(*arguments, **settings):
        assert hooks() == 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lirefs.tasks.lm_eval_model.greedy", fail)
    monkeypatch.setattr("lirefs.tasks.lm_eval_model.score_continuations", fail)
    with pytest.raises(RuntimeError, match="memory"):
        model.generate_until([request("generate_until", "x", {"until": [], "max_gen_toks": 2})])
    with pytest.raises(RuntimeError, match="memory"):
        model.loglikelihood([request("loglikelihood", "x", "y")], disable_tqdm=True)
    assert hooks() == 0
