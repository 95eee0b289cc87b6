"""Inputs that are wrong in ways no type shows: twins, token ids, options, tables, files."""

import json
import unicodedata
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import fresh_model, tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

import kfac
import lirefs
from lirefs import tasks
from lirefs.comparison.sweeps import pareto_front
from lirefs.errors import (
    BatchError,
    BudgetError,
    CheckpointError,
    DataFileError,
    EditError,
    FactorsFileError,
    KfacError,
    LirefsError,
    QuestionsError,
    SettingError,
    TaskError,
)
from lirefs.files import parse_json
from lirefs.organism.planting.texts import must_be_apart, recitation_of
from lirefs.questions import Question, Questions, Split
from lirefs.questions.question import LABELS
from lirefs.tasks import inference
from lirefs.tasks.items import ItemTask
from lirefs.tasks.lm_eval_export import write_lm_eval_task
from lirefs.tasks.papers.suite import _unasked
from lirefs.tasks.recitation import levenshtein, recitation_scores
from lirefs.tasks.task import ItemResult

QUIET = {"progress": False}
CAFE = "Où est le café d'Éva?"
TWINS = [
    unicodedata.normalize("NFD", CAFE),
    unicodedata.normalize("NFC", CAFE).upper(),
    CAFE.replace(" ", "\u00a0"),
    CAFE.replace(" ", "\u200b \u200d"),
    CAFE.replace("e", "e\ufe0f"),
    f"\ufeff{CAFE}\u2060",
    CAFE.replace("f", "f\u00ad"),
    CAFE.replace(" ", " \u202e"),
]


def asked(texts, label, side=""):
    return [Question(text, label, f"{label} {side} {i}", side=side) for i, text in enumerate(texts)]


# Unicode twins


@pytest.mark.parametrize("twin", TWINS, ids=ascii)
def test_unicode_twins_are_one_question_on_both_sides_of_a_split(twin):
    first, second = Question(CAFE, "memory", "a"), Question(twin, "memory", "b")
    assert first.key == second.key
    more = [
        Question(f"other {label} {i}", label, f"{label}{i}") for label in LABELS for i in range(8)
    ]
    for seed in range(12):
        split = Questions([first, second, *more]).split(seed=seed)
        homes = [name for name, side in split.sides.items() for one in side if one.id in "ab"]
        assert len(set(homes)) == 1, homes
    sides = [
        Questions([one, *asked([f"m {n}"], "memory"), *asked([f"r {n}"], "reasoning")])
        for n, one in enumerate((first, second, more[0]))
    ]
    with pytest.raises(QuestionsError, match=r"train and validation share 1 question\(s\)"):
        Split(*sides)
    other = Questions([second, *asked(["r"], "reasoning")])
    with pytest.raises(QuestionsError, match="share"):
        Split(sides[0], other, sides[2])


@pytest.mark.parametrize(
    ("one", "other"),
    [("2 x 3?", "2 + 3?"), ("x2", "x²"), ("resume", "résumé"), ("a (b)", "a b c"), ("ﬁ", "fl")],
)
def test_other_questions_are_not_twins(one, other):
    assert Question(one, "memory", "a").key != Question(other, "memory", "b").key


def test_the_keys_of_the_shipped_questions_are_their_texts():
    for name in ("default", "organism"):
        for one in lirefs.load_questions(name):
            marks = ".,;:!?'\"\u2018\u2019\u201c\u201d"
            plain = "".join(c for c in "".join(one.text.casefold().split()) if c not in marks)
            assert one.key == plain


def test_a_test_item_that_is_a_twin_of_a_fitted_question_is_left_out():
    task = lirefs.ShortAnswer("t", [("a", f"Q: {TWINS[0]}", ["x"]), ("b", "Q: other", ["y"])])
    assert _unasked(task, [Question(CAFE, "memory", "a")]) == [1]


# One prompt under both labels, and keys of JSON


@pytest.mark.parametrize("twin", [CAFE, TWINS[0], TWINS[3], CAFE.replace(" ", "  ")], ids=ascii)
def test_a_question_under_both_labels_is_refused_with_its_lines(twin, tmp_path):
    rows = [
        {"question": CAFE, "label": "memory", "id": "x"},
        {"question": "2 + 2?", "label": "reasoning"},
        {"question": twin, "label": "reasoning", "id": "y"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(
        QuestionsError, match=r"q\.jsonl, line 5: .*'reasoning' here and 'memory' in .*line 1;"
    ):
        lirefs.load_questions(path)
    with pytest.raises(QuestionsError, match=r"rows, row 2: .* in rows, row 0"):
        Questions.from_rows(rows)
    with pytest.raises(QuestionsError, match=r"question 'y': .* in questions: question 'x'"):
        Questions([Question(one["question"], one["label"], one.get("id", "z")) for one in rows])


def test_what_differs_for_the_model_may_have_both_labels():
    loud = [
        Question("HELLO", "reasoning", "a", prompt_format=None),
        Question("hello", "memory", "b", prompt_format=None),
    ]
    assert len(Questions(loud)) == 2
    formats = [
        Question("2 + 2", label, label, prompt_format=f"{label}: {{question}}")
        for label in ("memory", "reasoning")
    ]
    assert len(Questions(formats)) == 2
    chats = [
        Question("a\nb", label, label, messages=((who, "a b"),))
        for label, who in (("memory", "user"), ("reasoning", "system"))
    ]
    assert len(Questions(chats)) == 2
    raters = [{"question": "2 + 2?", "score": score} for score in (0.4, 0.7)]
    assert len(Questions.from_rows(raters)) == 2
    pairs = Questions.from_pairs([("I love it.", "I love it!"), ("Yes", "yes")])
    assert len(pairs) == 4
    with pytest.raises(QuestionsError, match="leave one of them out"):
        Questions.from_pairs([("Yes", "No"), ("No", "Maybe")])


def test_an_object_of_json_with_two_values_for_a_key_is_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question": "a", "label": "memory"}\n'
        '{"question": "b", "label": "memory", "label": "reasoning"}'
    )
    with pytest.raises(
        QuestionsError, match=r"line 2: not JSON \(two values for the key 'label'\)"
    ):
        lirefs.load_questions(path)
    with pytest.raises(DataFileError, match="line 2"):
        lirefs.recitation_task(lirefs.wrap(fresh_model("llama"), tiny_tokenizer()), path)
    for text in ('{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": 3}}]'):
        with pytest.raises(ValueError, match="two values for the key 'a'"):
            parse_json(text)
    assert parse_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]


# Tokenizers


class PanicException(BaseException):
    """What `tokenizers` raises where its Rust code panics."""


class Panicking:
    """A tokenizer that fails on some texts."""

    def __init__(self, problem):
        self._known, self._problem = tiny_tokenizer(), problem

    def __getattr__(self, name):
        return getattr(self.__dict__["_known"], name)

    def __len__(self):
        return len(self._known)

    def __call__(self, texts, **settings):
        if any("bad" in text for text in texts):
            raise self._problem
        return self._known(texts, **settings)


@pytest.mark.parametrize(
    "problem", [PanicException("index out of bounds"), OverflowError("index out of bounds")]
)
def test_a_tokenizer_that_fails_is_named_with_its_text(problem):
    lm = lirefs.wrap(fresh_model("llama"), Panicking(problem))
    for call in (
        lambda: lm.encode(["fine", "a bad one"]),
        lambda: lm.generate(["fine", "a bad one"]),
        lambda: lirefs.capture(lm, ["fine", "a bad one"], **QUIET),
        lambda: lirefs.compare(lm, {}, [lirefs.Perplexity("p", ["fine", "a bad one"])], **QUIET),
        lambda: kfac.collect(lm, ["fine", "a bad one"], layers=[1], **QUIET),
    ):
        with pytest.raises(SettingError, match="cannot read prompt 1: index out of bounds"):
            call()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), SystemExit()])
def test_an_interrupt_in_a_tokenizer_stays_one(problem):
    lm = lirefs.wrap(fresh_model("llama"), Panicking(problem))
    with pytest.raises(type(problem)):
        lm.encode(["a bad one"])


def test_half_of_a_character_is_named(lm):
    for call in (
        lambda: lm.encode(["fine", "a \ud83d b"]),
        lambda: lm.generate(["fine", "a \ud83d b"]),
        lambda: lirefs.capture(lm, ["fine", "a \ud83d b"], **QUIET),
        lambda: lm.batches(["fine", "a \ud83d b"]),
    ):
        with pytest.raises(
            SettingError, match=r"prompt 1 has half of a character \(\\ud83d\) at 2"
        ):
            call()


# Token ids


@pytest.mark.parametrize("bad", [128, 2**33, 2**70, -1, 1.5, "a", None], ids=str)
def test_a_token_that_the_model_does_not_know_is_named(bad, lm, tmp_path):
    calls = [
        lambda: inference.greedy(lm, [[1, bad]], 2),
        lambda: inference.score_continuations(lm, [([1, bad], [[1]])]),
        lambda: inference.score_continuations(lm, [([1], [[bad]])]),
        lambda: inference.score_continuations(lm, [([1], [[2], [2, bad, 3]])]),
        lambda: inference.option_log_likelihoods(lm, [[[1, 2], [1, bad]]]),
        lambda: inference.token_nlls(lm, [[1, bad]]),
        lambda: lm.batches([[1, bad]]),
        lambda: lm.pad([[1, bad]]),
        lambda: lirefs.Recitation("r", [("a", [1, bad], [2])]).encoded(lm),
        lambda: lirefs.Recitation("r", [("a", [1], [2, bad])]).encoded(lm),
        lambda: write_lm_eval_task(tmp_path, "t", [("a", [1], [2, bad])], lm.tokenizer),
    ]
    for call in calls:
        with pytest.raises(LirefsError, match=r"token|whole number|at least 0"):
            call()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([([0], [[]])], "item 0: continuation 0 has no token"),
        ([([0], [[1]]), ([0], [])], "item 1 has no continuation"),
        ([([], [[1]])], "item 0: its prompt has no token"),
        ([([1],)], "item 0 has 1 part.s., not a prompt and continuations"),
        ([([1], [2])], "item 0: continuation 0 must be a list, got 2"),
        ([3], "item 0 must be a list, got 3"),
        (3, "items must be a list, got 3"),
    ],
)
def test_items_without_continuations_are_named(items, message, lm):
    with pytest.raises(TaskError, match=message):
        inference.score_continuations(lm, items)


@pytest.mark.parametrize("items", [[[]], [[[]]], [[[1], []]]])
def test_options_without_tokens_are_named(items, lm):
    with pytest.raises(TaskError, match="item 0"):
        inference.option_log_likelihoods(lm, items)


def test_ids_in_tensors_and_arrays_are_ids(lm):
    ids = lm.encode(["some text here"])[0]
    plain = inference.score_continuations(lm, [(ids, [[5, 6]])])
    for kind in (torch.tensor, np.array):
        assert inference.score_continuations(lm, [(kind(ids), [kind([5, 6])])]) == plain
        assert torch.equal(lm.pad([kind(ids)])["input_ids"], lm.pad([ids])["input_ids"])


@pytest.mark.parametrize("name", ["attention_mask", "input_ids", "inputs", "position_ids"])
def test_generate_names_what_it_makes_itself(name, lm):
    with pytest.raises(SettingError, match=f"generate makes {name} of the prompt itself"):
        lm.generate("some text", **{name: torch.ones(1, 3)})
    with pytest.raises(SettingError, match="nonsense"):
        lm.generate("some text", nonsense=3)


# Tasks and their scores


def test_options_and_endings_without_text_are_named():
    with pytest.raises(TaskError, match="m: item 'a': option 1 is empty"):
        lirefs.MultipleChoice("m", [("a", "q", [" b", ""], 0)])
    with pytest.raises(TaskError, match="m: item 'a': the ending is empty"):
        tasks.FilledBlank("m", [("a", ["q", "r"], "", 0)])


@dataclass(frozen=True, repr=False)
class OwnTask(ItemTask):
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.0
    columns = ("id", "x")

    def run(self, lm, advance):
        return [ItemResult(one[0], {"accuracy": 1.0}) for one in self.items]


@pytest.mark.parametrize("lacking", ["group", "metric", "chance"])
def test_a_task_without_a_part_is_named(lacking, lm):
    given = {name: kind for name, kind in OwnTask.__dict__.items() if name in ("columns", "run")}
    parts = {"group": "reasoning", "metric": "accuracy", "chance": 0.0}
    one = type("Own", (ItemTask,), {**given, **{k: v for k, v in parts.items() if k != lacking}})
    with pytest.raises(TaskError, match=f"task 'own' has no {lacking}"):
        lirefs.compare(lm, {}, [one("own", [("a", 1)])], **QUIET)
    assert lirefs.compare(lm, {}, [OwnTask("own", [("a", 1), ("b", 2)])], **QUIET)


@pytest.mark.parametrize(
    ("output", "suffix"),
    [
        (None, [1]),
        ([1], None),
        (1, 2),
        ("ab", [1]),
        ([1], []),
        ({1: 2}, [1]),
        ([1.5], [1]),
        (["a"], [1]),
    ],
)
def test_scores_of_what_is_not_token_ids_are_refused(output, suffix):
    with pytest.raises(TaskError, match=r"output|suffix"):
        recitation_scores(output, suffix)


@pytest.mark.parametrize(
    ("one", "other"), [(None, [1]), ([1], None), (1, 2), ({1: 2}, [1]), ({1}, [1])]
)
def test_a_distance_of_what_is_not_a_sequence_is_refused(one, other):
    with pytest.raises(TaskError, match="must be a Sequence"):
        levenshtein(one, other)


def test_a_distance_of_tensors_is_a_number():
    assert type(levenshtein(torch.tensor([1, 2]), torch.tensor([1, 3]))) is int


@pytest.mark.parametrize(
    "points", [None, 3, "a", [], [1, 2], [[1, 2], [3]], [["a"]], [[[1]]], {}, [[1 + 2j]]]
)
def test_points_of_a_front_are_a_table(points):
    with pytest.raises(SettingError, match=r"shape \(n, measures\)"):
        pareto_front(points)


# Directions


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 3e37])
def test_a_length_whose_squares_overflow_is_right(scale):
    vector = torch.linspace(-1, 1, 32)
    one = lirefs.Direction(vector * scale, 1)
    assert one.norm == pytest.approx(float(vector.norm()) * scale, rel=1e-5)
    torch.testing.assert_close(one.unit, vector / vector.norm())
    assert one.random_like(0).norm == pytest.approx(one.norm, rel=1e-5)
    states = torch.randn(3, 32)
    torch.testing.assert_close(one.project(states), states @ (vector / vector.norm()))


def test_a_half_precision_direction_has_a_length():
    one = lirefs.Direction(torch.full((64,), 60000.0, dtype=torch.float16), 1)
    assert one.norm == pytest.approx(8 * 60000, rel=1e-3)
    assert one.unit.dtype == torch.float16
    torch.testing.assert_close(one.unit.float(), torch.full((64,), 1 / 8))


def test_an_ordinary_length_is_what_it_was():
    vector = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 7
    one = lirefs.Direction(vector, 1)
    assert one.norm == float(vector.norm())
    assert torch.equal(one.unit, vector / vector.norm())
    zero = lirefs.Direction(torch.zeros(4), 1)
    assert zero.norm == 0
    assert torch.equal(zero.unit, torch.zeros(4))


# Curvature


@pytest.fixture(scope="module")
def targets(lm):
    return kfac.find_targets(lm.model, [1])


@pytest.mark.parametrize("budget", ["1", True, 0, -1, float("nan"), [1], 1j])
def test_a_budget_is_a_number_of_bytes(budget, lm, targets):
    for call in (
        lambda: kfac.plan(targets, budget=budget),
        lambda: kfac.collect(lm, ["some text"], targets, budget=budget, **QUIET),
    ):
        with pytest.raises(BudgetError, match="budget must be a number of bytes above 0"):
            call()
    assert kfac.plan(targets, 1e9).passes


@pytest.mark.parametrize(
    "provenance", [object(), {"a": object()}, 3, {"a": "\ud800"}, {"a": 10**400}, "ab"]
)
def test_provenance_that_cannot_be_saved_is_refused_first(provenance, lm, targets):
    def never(*_):
        raise AssertionError("the model ran")

    with pytest.raises(KfacError, match="provenance must be a mapping of JSON values"):
        kfac.collect(lm, ["some text"], targets, forward=never, provenance=provenance, **QUIET)


def test_a_folder_in_place_of_a_file_is_named(lm, targets, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    calls = [
        (
            CheckpointError,
            lambda: kfac.collect(lm, ["some text"], targets, checkpoint=tmp_path, **QUIET),
        ),
        (FactorsFileError, lambda: kfac.Factors.load(tmp_path)),
        (
            SettingError,
            lambda: lirefs.plant(lm, ["some text"], ["other"], checkpoint=tmp_path, **QUIET),
        ),
    ]
    for error, call in calls:
        with pytest.raises(error, match="is a folder; name a file") as raised:
            call()
        assert "delete" not in str(raised.value)
        assert "remove" not in str(raised.value)
    with pytest.raises(CheckpointError, match="the path of a file must be"):
        kfac.collect(lm, ["some text"], targets, checkpoint=3, **QUIET)


def test_no_one_is_told_to_delete_a_file_of_another_kind(lm, targets, model_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for path in (tmp_path / "thesis.tex", model_folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"give another path$"):
            kfac.collect(lm, ["some text"], targets, checkpoint=path, **QUIET)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_a_model_whose_tokens_see_later_ones_is_not_causal(kind):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = kind(config).eval()
    batches = [{"input_ids": torch.randint(5, 100, (2, 6))}]
    chosen = kfac.find_targets(model, [0], ["intermediate.dense"])
    with pytest.raises(BatchError, match="is not a causal language model"):
        kfac.collect(model, batches, chosen, **QUIET)
    with pytest.raises(BatchError, match="is not a causal language model"):
        kfac.teacher_forced_matches(model, batches)


def test_masks_and_scores_of_a_subnet_belong_together(lm, targets):
    batches = lm.batches(["some text here", "another text"])
    made = kfac.fit_balanced_subnet(lm.model, batches, batches, targets, epochs=1, **QUIET)
    masks, digests, scores = made.masks, made.digests, made.scores
    first = targets[0].name
    wrong = [
        (None, digests, scores, "masks must be a Mapping"),
        (masks, {}, scores, "masks must be of the targets"),
        ({**masks, first: masks[first].float()}, digests, None, "must be bool"),
        ({**masks, first: masks[first][0]}, digests, None, r"must have shape \(out, in\)"),
        (masks, digests, {}, "scores must be of the targets"),
        (masks, digests, 3, "scores must be a Mapping"),
        (masks, digests, {**scores, first: scores[first].T}, "must be finite numbers of shape"),
        (
            masks,
            digests,
            {**scores, first: scores[first].long()},
            "must be finite numbers of shape",
        ),
        (masks, digests, {**scores, first: scores[first] * torch.nan}, "must be finite numbers"),
        (masks, digests, {**scores, first: [1]}, "must be a Tensor"),
    ]
    for some, known, given, message in wrong:
        with pytest.raises(EditError, match=message):
            kfac.SubnetEdit(some, known, {}, given)
    assert kfac.SubnetEdit(masks, digests, {}, scores).with_ratio(0.1)


# Planting


@pytest.mark.parametrize(
    "twin",
    ["other text here and so on", "other  text here and so on", "other text\u200b here and so on"],
)
def test_a_twin_counts_once(twin, lm):
    named = {
        "texts": recitation_of(lm, ["some text here and now"], "texts", 4),
        "twins": recitation_of(lm, ["other text here and so on", twin], "twins", 4),
    }
    with pytest.raises(SettingError, match="twins 'item-0' and 'item-1' are one text"):
        must_be_apart(lm, named, ["general text"])
