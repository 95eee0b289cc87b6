"""What a notebook shows of every public object: short text, and tables where there are rows."""

from __future__ import annotations

import importlib
import inspect
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from made_up import made_up
from steering_tools import split
from tiny import LAYERS, fresh_model, tiny_tokenizer

import kfac
import lirefs
from kfac.analysis.split_half import SideAgreement
from lirefs import comparison, directions, model, organism, statistics, steering, tasks
from lirefs.comparison.figures.figure import Figure
from lirefs.files import html_table
from lirefs.pictures import Picture
from lirefs.tasks.mining import Mined, Window

DOORS = (lirefs, kfac, comparison, directions, lirefs.export, model, organism, statistics,
         steering, tasks, importlib.import_module("lirefs.main_job"))  # fmt: skip
MOST_LINES, MOST_CHARACTERS = 12, 1200
ABSTRACT = {
    "EditHandle", "Handle", "Intervention", "ItemTask", "Operator", "Selection", "SpectralEdit",
    "Task", "WeightEdit",
}  # fmt: skip
"""Protocols, bases, and handles, which `attach` returns and nobody reads."""
TABLES = (
    "Activations", "Comparison", "Direction", "Directions", "Factors", "FilledBlank",
    "LanguageModel", "Layout", "Mined", "MultipleChoice", "Perplexity", "Probe", "Questions",
    "RankAgreement", "Recitation", "ShortAnswer", "StressTest", "Summary", "Traits",
)  # fmt: skip
LONG = "word and word\n" * 200


def classes():
    found = {}
    for door in DOORS:
        for name in door.__all__:
            one = getattr(door, name)
            if inspect.isclass(one) and not issubclass(one, Exception):
                found[name] = one
    return found


@pytest.fixture(scope="module")
def objects():
    """One object of every public class, large where its text could grow with it."""
    lm = lirefs.wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny")
    probe = lirefs.fit(lm, split(), shuffles=8, progress=False)
    factors = kfac.collect(lm, ["some text to read", "another text"], layers=range(LAYERS),
                           progress=False)  # fmt: skip
    name = factors.names[0]
    spectrum, target = factors.eigen(name), factors.targets(lm.model)[0]
    one = kfac.Estimate(0.5, 0.4, 0.6, 80)
    many, wide = np.zeros((3, 200, 4)), np.ones(3000)
    found = made_up(12, 4)
    chosen = [(f"{i}", LONG, ["a", "b"], 0) for i in range(200)]
    texts = [(f"{i}", "some text to recite, as it is") for i in range(30)]
    recited = [(f"{i}", [3, 4, 5], [6, 7, 8]) for i in range(30)]
    window = Window("a/0", list(range(64)), list(range(48)), "prefix", "suffix", 0.5)
    edit = kfac.CurvatureEdit(factors, 0.8)
    steer = lirefs.Steer(probe.best, "add", 1.0)
    stairs = kfac.staircase(spectrum.lam, spectrum.mu, 0.8)
    side = SideAgreement(wide, wide, wide, wide, wide)
    pooled = comparison.pool({f"{i}": made_up(12, 4, seed=i).summary() for i in range(3)})
    made = [
        lirefs.capture(lm, split().test.prompts, progress=False), found, found.summary(), probe,
        probe.best, probe.directions, lirefs.Gate(probe.best), lm, lm.layout, lm.traits,
        lirefs.LogisticDirection(), lirefs.MeanDifference(), lirefs.PCADirection(),
        lirefs.RidgeDirection(), lirefs.WhitenedMeanDifference(),
        lirefs.MultipleChoice("choice", chosen),
        lirefs.Perplexity("texts", texts), split().train, split().train[0], split(),
        lirefs.Recitation("recited", recited),
        lirefs.StressTest("stress", recited),
        tasks.FilledBlank("blank", [("1", ["a", "b"], LONG, 0)]),
        tasks.RankAgreement("ndcg", [("1", [3, 4, 5], [list(range(10))] * 3)]),
        lirefs.Prompted(LONG * 9), lirefs.Schedule([1.0] * 5000), lirefs.scope.all_tokens(),
        steer, steer + edit,
        kfac.BandProfile([name] * 200, ["top", "rest"], many, many, wide),
        kfac.BandRatios([name] * 200, ["top", "rest"], many, many, (5, 6)),
        factors.curvature(name), edit, spectrum, one, factors, edit.choose(name, None),
        kfac.LossSlices(name, np.zeros((9, 2)), wide, wide, wide, many, many),
        kfac.MagnitudeEdit(factors.names, 0.5), kfac.SVDEdit(factors.names, 0.5),
        kfac.RandomPairsEdit(factors, 0.5), kfac.RandomRotationEdit(factors, 0.5), target,
        kfac.plan([target]), kfac.FlatShares([name] * 200, [wide] * 50, wide, many),
        kfac.Relearning([0, 5], {"arm": [one] * 200}, {"arm": [one] * 200}), stairs,
        kfac.SplitHalf(name, side, side), kfac.TableSelection(torch.ones(500, 500) > 0, 1.0),
        kfac.SubnetEdit({name: torch.ones(50, 50) > 0}, {name: "0" * 64}, {}),
        factors.records[name],
        comparison.SweepChoice("a", one, one, one, 0.5, statistics.BestOf(0.5, one, 0.5, 9)),
        edit.report()[0], kfac.UnionEdit(factors, factors, 0.5),
        kfac.RemovalEdit(factors, 0.5), *found.cells()[:2],
        Figure("name", "Title", "Caption.", Picture(b"0" * 5000, b"0" * 5000)),
        comparison.Flip("1", LONG[:200], "a", "b", "c", True),
        comparison.TagChanges("task", "variant", (comparison.TagChange("tag", 0.5, one, one),) * 99,
                              None, None),
        comparison.TagChange("tag", 0.5, one, one), next(iter(found.tasks.values())),
        directions.components(lm, probe.best, split()), probe.scores[0],
        directions.Transfer(tuple(range(99)), (one,) * 99, (one,) * 99), organism.Language(0),
        organism.Language(0).exceptions[0], statistics.BestOf(0.5, one, 0.5, 9),
        organism.Planted(one, one, one, one, one, one, one, 5, 5000, 2.0, 1.5, 0.9, lm.model, []),
        next(iter(found.results["unchanged"].values()))[0], window,
        Mined([window] * 200, {"texts": 5, "distinct": 200}, {"tokenizer": "0" * 64}),
        tasks.ShortAnswer("short", [("1", LONG, ["4"])]),
        lirefs.show_tokens(lm, "a prompt " * 12, steer),
        next(iter(tasks.SKILLS.values())), pooled, next(iter(pooled.means.values())),
        statistics.Resamples(5000, 2000, 0),
    ]  # fmt: skip
    return {type(one).__name__: one for one in made}


def short(text):
    assert len(text.split("\n")) <= MOST_LINES
    assert len(text) <= MOST_CHARACTERS
    assert " object at 0x" not in text


def test_every_public_object_is_short_in_text(objects):
    names = {name for name, one in classes().items() if not issubclass(one, str)}
    missing = names - ABSTRACT - objects.keys()
    assert not missing
    for one in objects.values():
        short(repr(one))


class Cells(HTMLParser):
    """Cells of the tables of a page, each of which must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.mark.parametrize("name", TABLES)
def test_a_notebook_shows_a_table(objects, name):
    text = objects[name]._repr_html_()
    found = Cells(text)
    assert not found.open
    assert found.cells
    assert len(found.cells) < 500
    assert "<script" not in text


def test_a_table_of_a_probe_and_of_a_summary_says_what_they_hold(objects):
    probe, summary = objects["Probe"], objects["Summary"]
    cells = Cells(probe._repr_html_()).cells
    numbers = {f"{float(one):.3g}" for one in cells if re.fullmatch(r"[\d.]+", one)}
    assert f"{probe.best_scores.test_auroc.value:.3g}" in numbers
    cells = Cells(summary._repr_html_()).cells
    assert set(summary.variants) <= set(cells)
    mean = summary.means["variant A", "arithmetic"]
    ends = f"[{100 * mean.low:.3g}, {100 * mean.high:.3g}]"
    assert f"{100 * mean.value:.3g} {ends}" in cells
    assert any(f"(n = {mean.n})" in one for one in cells)


def test_a_comparison_says_its_scores_tasks_and_numbers_of_items():
    found = made_up(2, 3)
    task, variant = next(iter(found.tasks)), found.variants[1]
    value = found.cell(variant, task).value
    assert f"{variant} {value.value:.4g}" in repr(found)
    assert all(f"\n{one} (" in repr(found) for one in found.tasks)
    cells = Cells(found._repr_html_()).cells
    assert f"{value:.3g}" in cells
    assert any(one.startswith(f"{task} (") and f"n = {value.n})" in one for one in cells)
    assert "more tasks" in repr(made_up(20, 2))


def test_numbers_have_few_digits_and_strengths_and_classes_are_named(objects):
    assert repr(lirefs.statistics.Estimate(1 / 3, 1 / 7, 0.5, 9)) == (
        "Estimate(0.3333 [0.1429, 0.5], n=9)"
    )
    for name in ("Cell", "Question", "TargetReport"):
        assert not re.search(r"\d\.\d{6}", repr(objects[name]))
    probe = objects["Probe"]
    assert repr(probe).startswith(f"Probe({LAYERS} layers, best layer ")
    assert repr(probe).endswith(f"n={probe.best_scores.test_auroc.n})")
    cells = Cells(probe.best._repr_html_()).cells
    assert {f"mean {name}" for name in probe.names} < set(cells)
    for strength, shown in ((0.5, "add 0.5 at"), ([1.0, None], "add 2 strengths by row at"),
                            ({1: 0.5}, "add {1: 0.5} at")):  # fmt: skip
        assert shown in repr(lirefs.Steer(probe.directions[1], "add", strength))
    assert "Steer(ablate at" in repr(lirefs.Steer(probe.best, "ablate"))


def test_a_table_has_at_most_12_rows_and_texts_on_the_left():
    rows = [{"id": f"{i}", "text": "word " * 40, "n": i, "share": i / 3} for i in range(200)]
    page = html_table("<title>", rows)
    assert page.count("<tr>") == 1 + 6 + 1 + 6
    assert '<td style="text-align: left">word word' in page
    assert '<td style="text-align: right">0.333</td>' in page
    assert "&lt;title&gt;" in page
    assert max(map(len, Cells(page).cells)) == 60
    assert Cells(html_table("t", [{"a": None, "b": float("nan"), "c": True}])).cells[3:] == ["True"]
