"""Texts longer than a model's positions: named before any work where the positions are learned."""

import logging

import pytest
import torch
import transformers
from tiny import VOCABULARY, build, fresh_model, tiny_config, tiny_tokenizer

import kfac
import lirefs
from lirefs.errors import BatchError, CaptureError, SettingError, TaskError
from lirefs.model.batching import check_length, position_limit
from lirefs.questions import Question, Questions
from lirefs.tasks import FilledBlank, greedy, score_continuations, token_nlls

LIMIT = 24
LONG = "x" * LIMIT  # and the token before it

SMALL = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
LEARNED = {
    "gpt2": lambda: tiny_config("gpt2", n_positions=LIMIT),
    "opt": lambda: tiny_config("opt", max_position_embeddings=LIMIT),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=LIMIT,
    ),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**SMALL),
    "gptj": lambda: transformers.GPTJConfig(**SMALL, rotary_dim=8),  # a fixed table of angles
    "codegen": lambda: transformers.CodeGenConfig(**SMALL, rotary_dim=8),
}


@pytest.fixture(scope="module", params=LEARNED)
def learned(request):
    return lirefs.wrap(build(LEARNED[request.param]()), tiny_tokenizer(), name=request.param)


@pytest.fixture(scope="module")
def gpt2():
    return lirefs.wrap(build(LEARNED["gpt2"]()), tiny_tokenizer())


def test_the_limit_is_where_the_model_fails(learned):
    assert position_limit(learned.model) == LIMIT
    fits, breaks = torch.full((1, LIMIT), 5), torch.full((1, LIMIT + 1), 5)
    learned.model(input_ids=fits)
    check_length(learned.model, LIMIT, "a text")
    with pytest.raises((IndexError, RuntimeError)):
        learned.model(input_ids=breaks)
    with pytest.raises(SettingError, match="a text needs 25 positions, and the model has 24"):
        check_length(learned.model, LIMIT + 1, "a text")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"max_position_embeddings": LIMIT}),
        (
            "llama",
            {"max_position_embeddings": VOCABULARY},
        ),  # word embeddings are not a table of positions
        ("gpt_neox", {"max_position_embeddings": LIMIT}),
        ("falcon", {"max_position_embeddings": LIMIT}),
        ("bloom", {}),
    ],
)
def test_computed_positions_only_warn_and_only_once(family, settings, caplog):
    model = fresh_model(family, **settings)
    length = settings.get("max_position_embeddings", 200) + 1
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            check_length(model, length, "text 'a'")
    assert len(caplog.records) == bool(settings)
    if settings:
        assert f"text 'a' needs {length} positions, more than the {length - 1}" in caplog.text
        assert "learned" not in caplog.text
    model(input_ids=torch.full((1, length), 5))


def task_of(kind, text):
    return {
        "answer": lambda: lirefs.ShortAnswer("t", [("ok", "x", "y"), ("bad", text, "y")]),
        "choice": lambda: lirefs.MultipleChoice("t", [("bad", text, [" yes", " n"], 0)]),
        "blank": lambda: FilledBlank("t", [("bad", ["x", text], " yes", 0)]),
        "perplexity": lambda: lirefs.Perplexity("t", [("bad", text)]),
        "recitation": lambda: lirefs.Recitation("t", [("bad", [5] * len(text), [6])]),
        "stress": lambda: lirefs.StressTest("t", [("bad", [5] * len(text), [6])], shifts=2),
    }[kind]()


KINDS = ("answer", "choice", "blank", "perplexity", "recitation", "stress")


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_checked_before_a_comparison_begins(learned, kind, monkeypatch):
    first = lirefs.Perplexity("first", ["some text"])
    task = task_of(kind, LONG + "x")
    with pytest.raises(TaskError, match=r"t: item 'bad' needs \d\d positions, and .* has 24"):
        task.run(learned, lambda n: None)
    monkeypatch.setattr(lirefs.Perplexity, "run", None)  # no work is done before
    with pytest.raises(TaskError, match=r"t: item 'bad' needs \d\d positions, and .* has 24"):
        lirefs.compare(learned, {}, [first, task], progress=False)


@pytest.mark.parametrize(
    ("kind", "room"),
    [("answer", 8), ("choice", 4), ("blank", 4), ("perplexity", 0), ("recitation", 0)],
)
def test_what_just_fits_runs(learned, kind, room):
    task = task_of(kind, "x" * (LIMIT - room - (kind == "perplexity")))
    assert task.run(learned, lambda n: None)
    with pytest.raises(TaskError, match="needs 25 positions"):
        task_of(kind, "x" * (LIMIT - room - (kind == "perplexity") + 1)).encoded(learned)


def test_capture_generate_and_fit(gpt2):
    with pytest.raises(CaptureError, match="prompt 1 needs 25 positions, and the model has 24"):
        lirefs.capture(gpt2, ["x", LONG], progress=False)
    with pytest.raises(CaptureError, match="prompt 0 needs 30"):
        lirefs.capture(gpt2, [[5] * 30], progress=False)
    assert gpt2.generate(LONG[:-10], 10, eos_token_id=[])
    with pytest.raises(SettingError, match="prompt 1 needs 25 positions"):
        gpt2.generate(["x", LONG[:-10]], 11)
    items = [
        Question(f"{label} {i}", label, f"{label}-{i}", side=side, prompt_format="{question}")
        for label in ("memory", "reasoning")
        for i, side in enumerate(("train", "train", "validation", "test"))
    ]
    items[-1] = Question(LONG, "reasoning", "the last", side="test", prompt_format="{question}")
    read = []
    handle = gpt2.model.register_forward_pre_hook(lambda *given: read.append(given))
    with pytest.raises(CaptureError, match="question 'the last' needs 25 positions"):
        lirefs.fit(gpt2, Questions(items), progress=False)
    handle.remove()
    assert not read


def test_direct_calls_of_the_engine(gpt2):
    long = [5] * LIMIT
    with pytest.raises(TaskError, match="item 1 needs 26"):
        greedy(gpt2, [[5], long], 3)
    with pytest.raises(TaskError, match="item 0 needs 25"):
        token_nlls(gpt2, [[*long, 5]])
    with pytest.raises(TaskError, match="item 0 needs 26"):
        score_continuations(gpt2, [(long, [[5], [5, 6, 7]])])
    assert score_continuations(gpt2, [(long, [[5]])])  # the last token is only scored
    with pytest.raises(TaskError, match="nDCG: text 'item-1' needs 25"):
        lirefs.ndcg_task(gpt2, ["x", LONG])


def test_curvature(gpt2):
    with pytest.raises(BatchError, match="text 1 needs 25 positions"):
        kfac.collect(gpt2, ["x", LONG], layers=[0], progress=False)
    batch = {"input_ids": torch.full((2, 30), 5)}
    for run in (
        lambda: kfac.collect(gpt2.model, [batch], layers=[0], progress=False),
        lambda: kfac.teacher_forced_matches(gpt2.model, [batch]),
    ):
        with pytest.raises(BatchError, match="batch 0 needs 30 positions"):
            run()
    # Padding on the right needs no positions.
    batch["attention_mask"] = (torch.arange(30) < LIMIT).long().expand(2, -1)
    batch["position_ids"] = torch.arange(30).clamp(max=LIMIT - 1).expand(2, -1)
    assert len(kfac.teacher_forced_matches(gpt2.model, [batch])) == 2
