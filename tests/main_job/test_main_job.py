import json
import math
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kfac
import lirefs
from lirefs import Perplexity, compare
from lirefs.comparison.comparison import Comparison, TaskInfo
from lirefs.errors import QuestionsError
from lirefs.main_job import grid, matching
from lirefs.main_job import organism as main_job
from lirefs.main_job import organism_report as main_job_report
from lirefs.main_job import settings as main_job_settings
from lirefs.main_job.findings import largest_changes
from lirefs.main_job.grid import Grid
from lirefs.organism.items import SIDES
from lirefs.organism.language import Language
from lirefs.organism.people import CITY, stranger
from lirefs.organism.tasks import organism_questions, organism_tasks, training_texts
from lirefs.organism.training.recipe import ModelShape
from lirefs.organism.training.train import make_model
from lirefs.organism.vocabulary import CITIES, build_tokenizer
from lirefs.questions import Questions
from lirefs.tasks.task import CONFLICT, ItemResult, ShortAnswer


@pytest.fixture(scope="module")
def lm():
    return lirefs.load("organism")


@pytest.fixture(scope="module")
def sides(lm):
    """Everything the tasks of a side ask, by side and task."""
    return {
        side: {
            task.name: {str(item[1]) for item in task.items}
            for task in organism_tasks(lm, Language(), side, limit=300)
        }
        for side in SIDES
    }


def test_no_item_that_reports_is_one_that_chooses_or_fits(sides):
    for task in sides["test"]:
        if task == "multiplication table":  # one table, all of it is trained on and asked
            continue
        assert sides["test"][task], task
        assert not sides["test"][task] & sides["validation"][task], task
        assert not sides["test"][task] & sides["train"][task], task


def test_settings_are_chosen_by_the_strict_score_of_decoding(lm):
    names = ("tales", "twins of tales", "planted sequences")
    tasks = [t for t in organism_tasks(lm, Language(), "validation", 12) if t.name in names]
    factors = kfac.collect(lm, training_texts(Language(), 30), layers=[0], progress=False)
    found = set()
    for keep in (1.0, 0.995, 0.9):
        with kfac.CurvatureEdit(factors, keep).apply(lm.model):
            for task, strict in zip(tasks, main_job_settings.strictly(tasks)):
                assert type(task) is not type(strict)
                before, after = (one.run(lm, lambda n: None) for one in (task, strict))
                assert [(i.id, i.scores["strict"]) for i in before] == [
                    (i.id, *i.scores.values()) for i in after
                ]
                found |= {i.scores["strict"] for i in after}
    assert found == {0.0, 1.0}


def test_calibration_texts_hold_no_other_item_than_training_does(sides):
    texts = training_texts(Language(), 400)
    assert len(texts) == 400
    assert texts == training_texts(Language(), 400)
    assert texts != training_texts(Language(), 400, seed=1)
    for task in ("boolean expressions", "relations", "retrieval", "stories"):
        for prompt in sides["test"][task]:
            assert not any(prompt in text for text in texts if len(prompt) > 40)


def test_conflicts_ask_about_people_of_their_side():
    language = Language()
    for side in SIDES:
        people = {fact.person for fact in language.facts_of(side)}
        for item in language.items("conflict", side, 50):
            assert any(person in item.prompt for person in people)
            others = {fact.person for fact in language.facts} - people
            assert not any(person in item.prompt for person in others)


def test_what_is_at_chance_is_marked(lm):
    language, rng = Language(), Random(0)
    asked = [CITY.question.format(stranger(rng, language.known)) for _ in range(60)]
    rows = [(str(i), prompt, [rng.choice(CITIES)]) for i, prompt in enumerate(asked)]
    guesses = ShortAnswer("guesses", rows, chance=1 / len(CITIES), max_new_tokens=2)
    tasks = [t for t in organism_tasks(lm, language, "test", 60) if t.name == "retrieval"]
    found = compare(lm, {}, [*tasks, guesses], resamples=10, progress=False)
    assert found.informative("retrieval")
    assert not found.informative("guesses")


def test_perplexity_sees_steering_of_the_prompt_alone(lm):
    texts = [("a", training_texts(Language(), 1)[0])]
    vector = torch.randn(256, generator=torch.Generator().manual_seed(0)) * 100
    steer = lirefs.Steer(lirefs.Direction(vector, 2), "add", 1.0, scope="last_prompt_token")
    found = compare(lm, {"x": steer}, [Perplexity("p", texts)], resamples=2, progress=False)
    assert abs(found.cell("x", "p").difference.value) > 1e-3


def test_tasks_with_two_answers_ask_the_same_items(lm):
    tasks = {task.name: task for task in organism_tasks(lm, Language(), "test", 30)}
    for pair in (
        ("exceptions, memorized label", "exceptions, true label"),
        ("conflicts, answer read", "conflicts, answer recalled"),
    ):
        one, other = (tasks[name] for name in pair)
        assert one.group == other.group == CONFLICT
        assert [item[1] for item in one.items] == [item[1] for item in other.items]
        assert all(a[2] != b[2] for a, b in zip(one.items, other.items))


def test_questions_come_with_their_split_whatever_the_seed():
    questions = organism_questions("passage", Language(), 60)
    split = questions.split(seed=5)
    assert list(split.test) == list(questions.split(seed=6).test)
    assert len(split.test) > 60
    with pytest.raises(QuestionsError, match="name their split"):
        Questions([replace(questions[0], side=""), *questions[1:]]).split()


def made_up(**shares):
    """A comparison with the shares given for the unchanged model and one variant."""
    items = {
        variant: {
            task: [ItemResult(str(i), {"accuracy": float(i < pair[k] * 50)}) for i in range(50)]
            for task, pair in shares.items()
        }
        for k, variant in enumerate(("unchanged", "v"))
    }
    tasks = {task: TaskInfo("reasoning", "accuracy", 0.1) for task in shares}
    return Comparison(items, tasks, resamples=200)


def test_harm_counts_what_misses_the_goal_and_nothing_else():
    comparison = made_up(good=(1.0, 0.96), bad=(1.0, 0.5), noise=(0.1, 0.0))
    assert main_job_settings.missed_goals(comparison, "v", ["good"]) == 0
    assert main_job_settings.missed_goals(
        comparison, "v", ["good", "bad", "noise"]
    ) == pytest.approx(0.45)


def scored(scores, ran):
    """A `compare` that looks scores up by variant and task, and notes what was asked of it."""

    def compare(lm, variants, tasks, **options):
        ran.update((name, task.name) for name in variants for task in tasks)
        return SimpleNamespace(
            tasks=[task.name for task in tasks],
            informative=lambda task: True,
            score=lambda variant, task: scores[variant][task],
        )

    return compare


def test_an_edit_that_costs_too_much_comes_after_all_others(lm, monkeypatch):
    names = (main_job_settings.RECITED, main_job_settings.TRUE, main_job_settings.LANGUAGE)
    scores = {
        variant: dict(zip(names, values))
        for variant, values in {
            "unchanged": (1.0, 0.0, 2.0),
            "blunt": (0.0, 1.0, 2.2),
            "mild": (0.9, 0.0, 2.05),
            "better": (0.5, 0.0, 2.05),
        }.items()
    }
    job = main_job_settings.Job()
    monkeypatch.setattr(main_job_settings, "compare", scored(scores, set()))
    tasks = [SimpleNamespace(name=name) for name in names]
    edits = dict.fromkeys(("blunt", "mild", "better"))
    assert main_job_settings.choose_edit(job, lm, edits, tasks).label == "better"
    chosen = main_job_settings.choose_edit(job, lm, {"blunt": None}, tasks)
    assert (chosen.label, chosen.objective > main_job_settings.TOO_COSTLY) == ("blunt", True)


@pytest.mark.parametrize("what", ["edit", "steering"])
@pytest.mark.parametrize("steps", [3, 20])  # few values, so that many candidates are equal
@pytest.mark.parametrize("seed", range(8))
def test_a_candidate_is_left_out_only_where_it_cannot_be_a_finalist(
    lm, monkeypatch, what, steps, seed
):
    generator, n = np.random.default_rng(seed), 40
    language = main_job_settings.LANGUAGE
    names = [main_job_settings.RECITED, main_job_settings.TRUE, *main_job_settings.SKILLS]
    choose, screen, skills = {
        "edit": (main_job_settings.choose_edit, names[:2], [*names[2:], "common facts"]),
        "steering": (main_job_settings.choose_steering, names[1:2], names[2:]),
    }[what]
    tasks = [SimpleNamespace(name=name) for name in [*skills, language, *screen]]
    screened = [task for task in tasks if task.name not in skills]
    candidates = dict.fromkeys(map(str, range(n)))
    scores = {
        one: {task.name: generator.integers(0, steps + 1) / steps for task in tasks}
        | {language: 2.0 if generator.random() < 0.7 else 2.3}
        for one in candidates
    }
    scores["7"] = dict.fromkeys(scores["7"], math.nan)
    scores["unchanged"] = {task.name: 1.0 for task in tasks} | {language: 2.0}
    ran: set[tuple[str, str]] = set()
    monkeypatch.setattr(main_job_settings, "compare", scored(scores, ran))
    job = main_job_settings.Job()

    found = choose(job, lm, candidates, tasks)
    finalists = {one for one, task in ran if task in skills}
    assert {(one, screen[0]) for one in candidates} <= ran
    assert sum((one, language) in ran for one in candidates) < 0.8 * n
    reached = {one: choose(job, lm, {one: None}, screened).objective for one in candidates}
    best = sorted(candidates, key=reached.__getitem__)[: main_job_settings.FINALISTS]
    assert finalists == set(best)
    assert choose(job, lm, dict.fromkeys(best), tasks) == replace(found, tried=len(best))


def test_against_random_is_the_paired_difference():
    comparison = made_up(t=(0.2, 0.6))
    found = main_job.against_random(comparison, "t", "v", ["unchanged", "unchanged"])
    assert found.value == pytest.approx(0.4)
    assert found.low > 0.2
    assert found.n == 50


def test_a_claim_is_what_its_adjusted_test_allows():
    comparison = made_up(**{main_job_settings.TRUE: (0.0, 0.2)})
    for p, words in ((0.01, "returns exceptions"), (0.9, "is not shown to return")):
        cell = replace(comparison.cell("v", main_job_settings.TRUE), p_holm=p)
        comparison._cells["v", main_job_settings.TRUE] = cell
        results = SimpleNamespace(comparison=comparison)
        line = main_job_report._truth(results, "v", ["unchanged"])
        assert line.startswith(f"v {words}")
        assert f"p (Holm) against the unchanged model {p:.3f}" in line
        assert "+20 points" in line
        assert "beyond it, unadjusted" in line


def test_the_largest_change_is_that_of_any_task_but_memorization():
    shares = {"a": (0.9, 0.6), "b": (0.4, 0.98), "verses": (1.0, 0.0)}
    comparison = made_up(**shares)
    comparison.tasks["verses"] = TaskInfo("memorization", "accuracy")
    comparison.tasks["b"] = TaskInfo(CONFLICT, "accuracy")
    (line,) = largest_changes(comparison)
    assert line.startswith("v changes b most. From 40 % [")
    assert "+58 points" in line
    comparison._cells["v", "b"] = replace(comparison.cell("v", "b"), p_holm=0.2)
    (line,) = largest_changes(comparison)
    assert line.startswith("The largest change under v, in b, is not clear.")


@pytest.fixture(params=["untrained", pytest.param("shipped", marks=pytest.mark.slow)])
def subject(request):
    """An organism for the whole job: a small untrained one, and the shipped one in a long run."""
    if request.param == "shipped":
        return lirefs.load("organism")
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(ModelShape(hidden=32, layers=3, mlp=64, heads=2), tokenizer, 0)
    return lirefs.wrap(model.eval(), tokenizer)


def test_the_main_job_runs_and_every_question_is_answered(subject, monkeypatch, tmp_path):
    lm = subject
    small = Grid(
        keeps=(0.5, 0.9), longest_run=2, strengths=(1.0,), scopes=("all",),
        swept_keeps=(0.5, 0.9), swept_multiples=(-1.0, 1.0), random_directions=1,
    )  # fmt: skip
    for module, values in {
        grid: {"WHOLE": small},
        main_job_settings: {"FINALISTS": 2},
        main_job: {"FORGOTTEN": 8},
        matching: {"TEXTS": 8, "TRIES": 4},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    texts = training_texts(Language(), 40)
    factors = kfac.collect(lm, texts, kfac.find_targets(lm.model), progress=False)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    job = main_job_settings.Job(edit_layers=[1, 2], limit=8, out=tmp_path)
    found = main_job.run_on_organism(job, lm, factors, Language())
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())
    assert found.edit.label.startswith("layers 1, 2;")
    assert set(found.steers) == {"add", "amplify", "ablate"}
    lines = main_job_report.organism_findings(found)
    questions = [line for line in lines if line.endswith("?")]
    assert [line[:3] for line in questions] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert not any(one in " ".join(lines) for one in ("layers 1, 2;", "its controls", "in no mean"))
    assert sum("at the perplexity of" in one or "could be set to" in one for one in lines) >= 2
    methods = found.comparison.summary().methods
    last = lines[lines.index(questions[-1]) + 1 :]
    assert len(last) == len(methods)
    assert all(name in line for name, line in zip(methods, last))
    page = lirefs.write_report(found.comparison, tmp_path, main_job_report.organism_figures(found))
    assert page.stat().st_size > 100_000
    saved = json.dumps(main_job_report.organism_provenance(found))
    assert "keep sweep" in saved


def test_settings_that_are_given_are_not_chosen(lm):
    factors = kfac.collect(
        lm.model,
        [lm.pad(lm.encode(training_texts(Language(), 5)))],
        kfac.find_targets(lm.model),
        progress=False,
    )
    job = main_job_settings.Job(edit_layers=[3], keep=0.5, strength=3.0)
    made = main_job_settings.curvature_candidates(job, factors, lm.n_layers)
    assert list(made) == ["layers 3; gate, up; keep 0.5", "layers 3; all; keep 0.5"]
    probes = {
        form: lirefs.fit(
            lm, organism_questions(form, Language(), 8).split(), shuffles=2, progress=False
        )
        for form in main_job_settings.STEERING_FORMS
    }
    labels = list(main_job_settings.steering_candidates(job, probes, "add"))
    assert all(label.endswith(", 3") for label in labels)
    assert not any("layer 0" in label for label in labels)
    assert set(made["layers 3; gate, up; keep 0.5"].keep) == {
        "model.layers.3.mlp.gate_proj",
        "model.layers.3.mlp.up_proj",
    }
