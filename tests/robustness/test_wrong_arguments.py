"""Wrong arguments at every public entry: one sentence of a named error, before anything changes."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
import lirefs.main_job
from lirefs import errors
from lirefs.errors import LirefsError
from lirefs.questions import Question, Questions

TEXTS = ["some text here", "another text"]
QUIET = {"progress": False}


class World:
    """What a user has at hand: made once, and never changed."""

    def __init__(self, folder):
        self.lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
        self.questions = Questions(
            [
                Question(f"{label} {i} text", label, f"{label}-{i}")
                for label in ("memory", "reasoning")
                for i in range(8)
            ]
        )
        self.split = self.questions.split()
        self.probe = lirefs.fit(self.lm, self.split, shuffles=2, **QUIET)
        self.direction = self.probe.best
        self.vector = torch.ones(32)
        self.steer = lirefs.Steer(self.direction, "add")
        self.factors = kfac.collect(self.lm, TEXTS, layers=[1], **QUIET)
        self.edit = kfac.CurvatureEdit(self.factors, keep=0.8)
        self.batches = self.lm.batches(TEXTS)
        self.targets = kfac.find_targets(self.lm.model, [1])
        self.states = lirefs.capture(self.lm, TEXTS, **QUIET)
        self.task = lirefs.Perplexity("p", ["some text"])
        self.comparison = lirefs.compare(
            self.lm, {"s": self.steer}, [self.task], resamples=10, **QUIET
        )
        self.folder = folder
        self.missing = folder / "no" / "such"
        self.empty = folder / "empty"
        self.empty.write_text("")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("wrong"))


# What is called with the world, the error, and words that its message must have.
CALLS = [
    # models
    (
        lambda w: lirefs.load(None),
        "ModelNotFoundError",
        "name of a model must be a str or PathLike",
    ),
    (lambda w: lirefs.load(w.lm), "ModelNotFoundError", "got a LanguageModel"),
    (lambda w: lirefs.load(w.missing), "ModelNotFoundError", "no such model"),
    (lambda w: lirefs.load("organism", device="gpu"), "SettingError", "device 'gpu': cannot be"),
    (lambda w: lirefs.load("organism", device=3.5), "SettingError", "device 3.5: cannot be used"),
    (lambda w: lirefs.wrap("organism", None), "SettingError", "load it first"),
    (lambda w: lirefs.wrap(w.lm, w.lm.tokenizer), "SettingError", "give lm.model"),
    (lambda w: lirefs.wrap(w.lm.model, None), "SettingError", "tokenizer must be a tokenizer"),
    (lambda w: lirefs.wrap(w.lm.model, w.lm.model), "SettingError", "got a LlamaForCausalLM"),
    (lambda w: w.lm.encode("text"), "SettingError", "got one string: use ['text']"),
    (lambda w: w.lm.encode(None), "SettingError", "prompts must be a list, got None"),
    (lambda w: w.lm.encode({"a": "b"}), "SettingError", "prompts must be a list, got a dict"),
    (lambda w: w.lm.batches(3), "SettingError", "texts must be a list, got 3"),
    (lambda w: w.lm.batches(TEXTS, "8"), "SettingError", "batch_tokens must be a whole number"),
    (lambda w: w.lm.pad(3), "SettingError", "ids must be a list"),
    (lambda w: w.lm.generate("a", 0), "SettingError", "max_new_tokens must be at least 1, got 0"),
    (lambda w: w.lm.generate("a", "3"), "SettingError", "must be a whole number, got '3'"),
    (lambda w: w.lm.generate(None), "SettingError", "prompt must be a list, got None"),
    (lambda w: w.lm.generate([3]), "SettingError", "prompt[0] must be a str, got 3"),
    # questions
    (lambda w: Questions(["a"]), "QuestionsError", "questions[0] must be a Question, got 'a'"),
    (lambda w: Questions("a"), "QuestionsError", "questions must be a list"),
    (lambda w: Questions([Question("a", "?", "1")]), "QuestionsError", "label '?'"),
    (lambda w: lirefs.load_questions(None), "QuestionsError", "got None"),
    (lambda w: lirefs.load_questions(w.missing), "QuestionsError", "no such file"),
    (lambda w: lirefs.load_questions(w.empty), "QuestionsError", "empty"),
    (lambda w: w.questions.split(seed="a"), "QuestionsError", "seed must be a whole number"),
    (lambda w: w.questions.split("0.5"), "QuestionsError", "train must be a float or int"),
    (lambda w: lirefs.Split(TEXTS, TEXTS, TEXTS), "QuestionsError", "train must be a Questions"),
    # directions
    (lambda w: lirefs.capture("organism", TEXTS), "CaptureError", "lirefs.load('organism')"),
    (lambda w: lirefs.capture(w.lm.model, TEXTS), "CaptureError", "give the lm itself"),
    (lambda w: lirefs.capture(w.lm, "text"), "CaptureError", "got one string: use ['text']"),
    (lambda w: lirefs.capture(w.lm, [3]), "CaptureError", "prompt 0 must be a list, got 3"),
    (
        lambda w: lirefs.capture(w.lm, TEXTS, sites="resid_pre"),
        "CaptureError",
        "sites must be a li",
    ),
    (lambda w: lirefs.capture(w.lm, TEXTS, layers="1"), "SettingError", "layers must be a list"),
    (lambda w: w.states[99], "MissingError", "no states at 99; there are layers 0 to 3"),
    (lambda w: lirefs.fit(w.lm.model, w.split), "SettingError", "give the lm itself"),
    (lambda w: lirefs.fit(w.lm, "default"), "SettingError", "load_questions('default')"),
    (lambda w: lirefs.fit(w.lm, TEXTS), "SettingError", "split must be a Split or Questions"),
    (lambda w: lirefs.fit(w.lm, w.split, "mean"), "SettingError", "estimator must be"),
    (lambda w: lirefs.fit(w.lm, w.split, shuffles=1.5), "SettingError", "shuffles must be a whole"),
    (lambda w: lirefs.fit(w.lm, w.split, grades=[1]), "SettingError", "grades must be a Mapping"),
    (lambda w: lirefs.fit_directions([], []), "CaptureError", "states must be an Activations"),
    (lambda w: lirefs.fit_directions(w.vector, [0]), "CaptureError", "lirefs.Activations(values"),
    (lambda w: w.probe.directions[99], "MissingError", "no direction at 99; there are layers 0 to"),
    (lambda w: lirefs.Directions([w.direction]), "DirectionError", "must be a Mapping"),
    (lambda w: lirefs.Directions({(0, "a"): 3}), "DirectionError", "must be a Direction, got 3"),
    (lambda w: lirefs.Directions.load(None), "DirectionsFileError", "got None"),
    (lambda w: lirefs.Directions.load(w.missing), "DirectionsFileError", "no such file"),
    (lambda w: lirefs.Directions.load(w.empty), "DirectionsFileError", "cannot be read"),
    (lambda w: lirefs.Direction([1.0], 1), "DirectionError", "must be a Tensor, got a list"),
    (lambda w: lirefs.Direction(torch.ones(2, 2), 1), "DirectionError", "one axis, (width,)"),
    (lambda w: lirefs.Direction(w.vector, "1"), "DirectionError", "layer of a direction must be"),
    (lambda w: w.direction.project_off(w.vector), "DirectionError", "lirefs.Direction(vector, "),
    (lambda w: w.probe.directions.save(None), "WriteError", "got None"),
    # steering
    (lambda w: lirefs.Steer(w.probe, "add"), "InterventionError", "give probe.best"),
    (
        lambda w: lirefs.Steer(w.vector, "add"),
        "InterventionError",
        "lirefs.Direction(vector, layer)",
    ),
    (lambda w: lirefs.Steer(None, "add"), "InterventionError", "got None"),
    (lambda w: lirefs.Steer("d.safetensors", "add"), "InterventionError", "Directions.load('d.saf"),
    (lambda w: lirefs.Steer(w.direction, None), "InterventionError", "operator None is not one of"),
    (
        lambda w: lirefs.Steer(w.direction, "add", sites="mlp_out"),
        "SettingError",
        "use ['mlp_out']",
    ),
    (lambda w: lirefs.Gate(w.probe), "InterventionError", "give probe.best"),
    (lambda w: lirefs.Gate(w.direction, "0"), "InterventionError", "threshold must be a float"),
    (lambda w: lirefs.Schedule(None), "InterventionError", "values must be a list, got None"),
    (lambda w: w.steer.attach(w.lm), "InterventionError", "give lm.model"),
    (lambda w: lirefs.compose(w.direction), "InterventionError", 'lirefs.Steer(direction, "add"'),
    (lambda w: lirefs.compose(w.factors), "InterventionError", "kfac.CurvatureEdit(factors"),
    (lambda w: lirefs.bake(w.steer, w.lm), "InterventionError", "give lm.model"),
    (lambda w: lirefs.scope.spans(w.lm.tokenizer, "ab", [[(0, 1)]]), "ScopeError", "use ['ab']"),
    (lambda w: lirefs.scope.mask(None), "ScopeError", "a mask must be a list, got None"),
    # tasks
    (lambda w: lirefs.mine(w.lm.model, TEXTS), "SettingError", "give the lm itself"),
    (lambda w: lirefs.mine(w.lm, "text"), "DataFileError", "text: no such file"),
    (lambda w: lirefs.mine(w.lm, [3]), "SettingError", "texts: item 0 must be a tuple"),
    (lambda w: lirefs.mine(w.lm, ["hello"], **QUIET), "SettingError", "none of the 1 texts has"),
    (lambda w: lirefs.mine(w.lm, TEXTS, "8"), "SettingError", "prefix_tokens must be a whole num"),
    (lambda w: lirefs.ndcg_task(w.lm.model, TEXTS), "TaskError", "give the lm itself"),
    (lambda w: lirefs.ndcg_task(w.lm, "text"), "TaskError", "nDCG must be a list, got one string"),
    (lambda w: lirefs.ndcg_task(w.lm, TEXTS, k="3"), "TaskError", "k must be a whole number"),
    (lambda w: lirefs.recitation_task(w.lm, None), "TaskError", "texts must be a list, got None"),
    (lambda w: lirefs.recitation_task(w.lm, w.empty), "DataFileError", "empty"),
    (lambda w: lirefs.recitation_task("organism", w.empty), "TaskError", "load it first"),
    (lambda w: lirefs.default_tasks(w.lm.model), "TaskError", "give the lm itself"),
    (lambda w: lirefs.tasks.heldout_texts("train"), "TaskError", "split is 'train'"),
    (lambda w: lirefs.tasks.fact_items("some", True), "TaskError", "frequency is 'some'"),
    (lambda w: lirefs.tasks.choice_item("a"), "TaskError", "question must be a Question"),
    (lambda w: lirefs.tasks.judge("5", 5, "number"), "TaskError", "answers must be a list, got 5"),
    (lambda w: lirefs.tasks.judge("5", "5", "exact"), "TaskError", "kind is 'exact'"),
    (lambda w: lirefs.tasks.greedy(w.lm.model, [[5]], 2), "TaskError", "give the lm itself"),
    (lambda w: lirefs.tasks.greedy(w.lm, [[5]], None), "TaskError", "max_new_tokens must be"),
    (lambda w: lirefs.lm_eval_model(w.lm.model), "TaskError", "give the lm itself"),
    (lambda w: lirefs.lm_eval_model(w.lm, w.probe), "TaskError", "Steer(probe.best"),
    (lambda w: lirefs.lm_eval_tasks(None), "TaskError", "names must be a list"),
    (
        lambda w: lirefs.write_lm_eval_task(w.folder, "name", ["a"], w.lm.tokenizer),
        "TaskError",
        "name: item 0 must be a tuple",
    ),
    # comparisons
    (lambda w: lirefs.compare(w.lm.model, {}, [w.task]), "SettingError", "give the lm itself"),
    (lambda w: lirefs.compare("organism", {}, [w.task]), "SettingError", "lirefs.load('organism')"),
    (lambda w: lirefs.compare(w.lm, [w.steer], [w.task]), "SettingError", '{"steered": steer}'),
    (lambda w: lirefs.compare(w.lm, w.steer, [w.task]), "SettingError", '{"steered": steer}'),
    (
        lambda w: lirefs.compare(w.lm, None, [w.task]),
        "SettingError",
        "interventions must be a Mapp",
    ),
    (lambda w: lirefs.compare(w.lm, {"s": None}, [w.task]), "InterventionError", "['s'] must be"),
    (
        lambda w: lirefs.compare(w.lm, {"d": w.direction}, [w.task]),
        "InterventionError",
        "Steer(dir",
    ),
    (lambda w: lirefs.compare(w.lm, {"d": w.probe}, [w.task]), "InterventionError", "probe.best"),
    (
        lambda w: lirefs.compare(w.lm, {3: w.steer}, [w.task]),
        "SettingError",
        "must be a str, got 3",
    ),
    (lambda w: lirefs.compare(w.lm, {}, w.task), "TaskError", "tasks must be a list, got a Perpl"),
    (lambda w: lirefs.compare(w.lm, {}, [TEXTS]), "TaskError", "tasks[0] must be a task, got a li"),
    (lambda w: lirefs.compare(w.lm, {}, [w.task], resamples="9"), "SettingError", "resamples must"),
    (lambda w: lirefs.write_report("c", w.folder), "SettingError", "lirefs.load_comparison('c')"),
    (lambda w: lirefs.write_report(w.comparison, None), "SettingError", "folder must be a str"),
    (lambda w: lirefs.load_comparison(None), "ResultsFileError", "got None"),
    (lambda w: lirefs.load_comparison(w.missing), "ResultsFileError", "cannot be read"),
    (lambda w: lirefs.load_comparison(w.empty), "ResultsFileError", "not the JSON"),
    (lambda w: lirefs.load_comparison(w.folder), "ResultsFileError", "unfinished; continue it"),
    (
        lambda w: w.comparison.cell("t", "p"),
        "MissingError",
        "no variant 't'; there are unchanged, s",
    ),
    (lambda w: w.comparison.score("s", "q"), "MissingError", "no task 'q'; there are p"),
    (lambda w: lirefs.comparison.flips("c", "p", "s"), "TaskError", "must be a Comparison"),
    (lambda w: lirefs.main_job.run(w.lm.model), "SettingError", "got a LlamaForCausalLM"),
    # curvature
    (lambda w: kfac.collect(w.lm, TEXTS, layers=1), "TargetError", "layers must be a list, got 1"),
    (lambda w: kfac.collect(w.lm, TEXTS, layers="1"), "TargetError", "use ['1']"),
    (lambda w: kfac.collect(w.lm, TEXTS, layers=["1"]), "TargetError", "a whole number, got '1'"),
    (lambda w: kfac.collect("organism", TEXTS), "BatchError", "load it first"),
    (lambda w: kfac.collect(w.lm, None), "BatchError", "batches must be an Iterable, got None"),
    (lambda w: kfac.collect(w.lm, w.folder), "BatchError", "batches must be an Iterable"),
    (lambda w: kfac.collect(w.lm, TEXTS, ["a"]), "TargetError", "targets[0] must be a Target"),
    (lambda w: kfac.correct(w.lm, TEXTS, "f"), "KfacError", "kfac.Factors.load('f')"),
    (lambda w: kfac.find_targets(w.lm), "TargetError", "give lm.model"),
    (lambda w: kfac.find_targets(w.lm.model, 1), "TargetError", "layers must be a list"),
    (lambda w: kfac.named_targets(w.lm.model, "lm_head"), "TargetError", "use ['lm_head']"),
    (lambda w: kfac.plan("a"), "TargetError", "targets must be a list"),
    (lambda w: kfac.merge(w.factors), "KfacError", "parts must be a list, got a Factors"),
    (lambda w: kfac.merge([w.factors, None]), "KfacError", "parts[1] must be a Factors, got None"),
    (lambda w: kfac.merge([w.factors, w.factors]), "KfacError", "given twice"),
    (lambda w: kfac.merge([w.factors] * 2, [1, 2]), "KfacError", "given twice"),
    (lambda w: kfac.subtract(w.factors, None), "KfacError", "factors must be a Factors, got None"),
    (lambda w: kfac.flat_shares(w.lm, w.batches, w.factors), "BatchError", "give lm.model"),
    (lambda w: kfac.flat_shares(w.lm.model, TEXTS, w.factors), "BatchError", "lm.batches(tex"),
    (lambda w: kfac.band_profile(w.lm.model, w.batches, None), "KfacError", "must be a Factors"),
    (lambda w: kfac.teacher_forced_matches(w.lm, w.batches), "BatchError", "give lm.model"),
    (
        lambda w: kfac.teacher_forced_matches(w.lm.model, None),
        "BatchError",
        "batches must be an Iterable",
    ),
    (lambda w: kfac.relearn(w.lm, {"a": None}, [], []), "BatchError", "give lm.model"),
    (
        lambda w: kfac.relearn(w.lm.model, {"a": w.steer}, w.batches, w.batches),
        "EditError",
        "arms['a'] must be a WeightEdit or None, got a Steer",
    ),
    (lambda w: kfac.CurvatureEdit("f", 0.8), "EditError", "kfac.Factors.load('f')"),
    (lambda w: kfac.SVDEdit("lm_head", 0.8), "TargetError", "use ['lm_head']"),
    (lambda w: kfac.Factors.load(None), "FactorsFileError", "got None"),
    (
        lambda w: kfac.Factors.load(w.missing),
        "FactorsFileError",
        "cannot be read as a factors file",
    ),
    (lambda w: kfac.Factors.load(w.empty), "FactorsFileError", "empty"),
    (lambda w: kfac.split_half(w.factors, None, "a"), "KfacError", "must be a Factors"),
    (lambda w: kfac.eigenbasis([1]), "SpectrumError", "matrix must be a Tensor"),
    (lambda w: kfac.weight_digest(None), "TargetError", "weight must be a Tensor"),
    (lambda w: w.edit.attach(w.lm), "InterventionError", "give lm.model"),
    # planting
    (lambda w: lirefs.plant(w.lm.model, TEXTS, TEXTS), "SettingError", "give the lm itself"),
    (lambda w: lirefs.plant(w.lm, "text", TEXTS), "DataFileError", "put texts in a list: [text]"),
    (
        lambda w: lirefs.plant(w.lm, TEXTS, TEXTS, suffix_tokens=40),
        "TaskError",
        "item 0: too short",
    ),
    (lambda w: lirefs.plant(w.lm, TEXTS, None, suffix_tokens=3), "SettingError", "general must be"),
    (lambda w: lirefs.plant(w.lm, TEXTS, TEXTS, suffix_tokens=3), "SettingError", "leave it out"),
]


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_wrong_arguments_are_named(world, call, error, words):
    before = world.lm.fingerprint
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules(world)]
    with pytest.raises(LirefsError) as found:
        call(world)
    message = str(found.value)
    assert isinstance(found.value, getattr(errors, error))
    assert words in message
    assert "\n" not in message
    assert len(message) < 400
    assert world.lm.fingerprint == before
    assert hooks == [
        len(one._forward_hooks) + len(one._forward_pre_hooks) for one in modules(world)
    ]


def modules(world):
    return world.lm.model.modules()


def test_a_missing_place_is_a_key_error_too(world):
    for missing in (lambda: world.probe.directions[99], lambda: world.states[0, "mlp_out"]):
        with pytest.raises(KeyError, match=r"layers 0 to 3 at resid_pre$"):
            missing()
    assert world.probe.directions.get(99) is None
    assert 99 not in world.probe.directions


def test_what_is_meant_is_taken(world, tmp_path):
    lm, split = world.lm, world.questions.split()
    fitted = [
        lirefs.fit(lm, given, shuffles=2, cache=cache, **QUIET)
        for given, cache in ((split, None), (world.questions, None), (split, str(tmp_path)))
    ]
    assert len({one.best.digest for one in fitted}) == 1
    assert lirefs.load_comparison(lirefs.write_report(world.comparison, str(tmp_path)).parent)
    mined = lirefs.mine(lm, ["some text " * 8, {"id": "b", "text": "other " * 9}], 8, 8, **QUIET)
    assert mined.counts["texts"] == 2
    assert lirefs.ndcg_task(lm, TEXTS).items[1][0] == "item-1"


def test_what_is_printed_is_short(world):
    shown = {
        "probe": "Probe(4 layers, best layer ",
        "direction": "Direction(layer ",
        "states": "Activations((2, 4, 1, 32); layers 0 to 3 at resid_pre",
        "comparison": "Comparison(unchanged, s; 1 task, 1 item\np (perplexity): unchanged ",
        "factors": "Factors(2 targets, ",
        "task": "Perplexity('p', 1 item(s))",
        "questions": "Questions(16 from 'questions')",
        "steer": "Steer(add 1 at layers ",
    }
    for name, words in shown.items():
        assert repr(getattr(world, name)).startswith(words)
        assert len(repr(getattr(world, name))) < 100
    assert repr(world.probe.directions) == "Directions(layers 0 to 3 at resid_pre; of tiny)"
