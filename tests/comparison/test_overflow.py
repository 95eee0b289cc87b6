"""An item on which the model overflowed is n/a where it counts, and costs no other number."""

import csv
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import compare, ndcg_task, wrap
from lirefs.comparison import (
    Comparison,
    TaskInfo,
    changes_by_tag,
    flips,
    load_comparison,
    write_report,
)
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.figures.sweeps import pareto_fronts
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.report.tables import overview_table, task_table
from lirefs.comparison.report.verdict import verdict
from lirefs.comparison.sweeps import choose_on_validation, damage_of, matched
from lirefs.errors import SettingError
from lirefs.main_job.settings import LANGUAGE, missed_goals
from lirefs.tasks import (
    FilledBlank,
    ItemResult,
    MultipleChoice,
    Perplexity,
    Recitation,
    ShortAnswer,
    StressTest,
)

NAMES = ("unchanged", "one", "two", "three")


def items(metric, value, bad=None):
    found = [ItemResult(str(i), {metric: value}, weight=5.0) for i in range(10)]
    if bad is not None:
        found[3] = ItemResult("3", {metric: bad}, weight=5.0)
    return found


@pytest.mark.parametrize("where", ["unchanged", "overflowed"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("metric", "value"), [("perplexity", 2.0), ("accuracy", 1.0), ("ndcg", 0.4)]
)
def test_the_cell_is_not_available_and_the_rest_is_saved(metric, value, bad, where, tmp_path):
    name = "nll" if metric == "perplexity" else metric
    variants = ("unchanged", "fine", "overflowed")
    results = {
        one: {"t": items(name, value, bad if one == where else None), "whole": items(name, value)}
        for one in variants
    }
    tasks = dict.fromkeys(("t", "whole"), TaskInfo("language", metric))
    comparison = Comparison(results, tasks, {}, 100, 0)
    write_report(comparison, tmp_path)
    for found in (comparison, load_comparison(tmp_path)):
        values = {cell.variant: cell.value.value for cell in found.cells() if cell.task == "t"}
        assert [one for one in variants if math.isnan(values[one])] == [where]
        assert math.isnan(found.cell("overflowed", "t").retained.value)
        assert math.isnan(found.cell("overflowed", "t").p_holm)
        assert not found.cell("overflowed", "t").clear
        assert found.cell("overflowed", "whole").p_holm == 1.0
        assert math.isfinite(found.cell("fine", "whole").retained.value)
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3
    with (tmp_path / "results.csv").open() as file:
        counts = {(row["variant"], row["task"]): row["not_finite"] for row in csv.DictReader(file)}
    assert {cell: n for cell, n in counts.items() if n != "0"} == {(where, "t"): "1"}
    reason = f"n/a where a score is not finite: 1 of 10 items of t under {where}."
    summary = comparison.summary()
    report, page, latex = (
        (tmp_path / name).read_text() for name in ("report.md", "report.html", "overview.tex")
    )
    assert "n/a (1 of 10 items not finite)" in report
    assert "n/a (1 of 10 items not finite)" in page
    for text in (verdict(summary)[-1], overview_table(summary).note, latex.replace("--", "n/a")):
        assert reason in text
    for table in (task_table(summary, "t"), task_table(summary, "whole")):
        assert (reason[:-1] in table.note) == (table.name == "t")
    assert all(reason in one.caption for one in retained_figures(summary))
    assert len(retained_figures(summary)) == 2
    assert "nan" not in report.replace("unchanged", "")
    assert "nan" not in f"{comparison!r}{comparison._repr_html_()}"
    assert ("t" in summary.informative) == (where == "overflowed")
    mean = summary.means["fine", "language"]
    assert mean.value == pytest.approx(1)
    assert mean.n == (20 if where == "overflowed" else 10)
    assert math.isnan(summary.means["overflowed", "language"].value) == (where == "overflowed")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_other_metrics_and_weights_cost_their_cell_alone(bad, tmp_path):
    def rows(**changed):
        plain = ItemResult("0", {"accuracy": 1.0, "margin": 2.0}, weight=2.0)
        return [plain, replace(plain, id="1"), replace(plain, id="2", **changed)]

    results = {
        "unchanged": {"t": rows(), "u": rows(weight=bad)},
        "margin": {"t": rows(scores={"accuracy": 0.0, "margin": bad}), "u": rows()},
    }
    tasks = dict.fromkeys(("t", "u"), TaskInfo("reasoning", "accuracy"))
    comparison = Comparison(results, tasks, resamples=50)
    write_report(comparison, tmp_path)
    for found in (comparison, load_comparison(tmp_path)):
        cell = found.cell("margin", "t")
        assert (cell.value.value, cell.not_finite) == (pytest.approx(2 / 3), 0)
        assert math.isnan(cell.extra["margin"])
        assert found.cell("unchanged", "t").extra == {"margin": 2.0}
        assert found.cell("unchanged", "u").not_finite == 1
        assert math.isnan(found.cell("margin", "u").difference.value)
    assert "margin n/a" in (tmp_path / "report.md").read_text()


def test_a_control_that_overflowed_is_not_called_missing():
    def results(lost, bad=None):
        return {
            "m": [
                ItemResult(str(i), {"accuracy": float(i >= lost if bad is None or i else bad)})
                for i in range(20)
            ]
        }

    found = Comparison(
        {"unchanged": results(0), "edit": results(20), "random": results(0, math.nan)},
        {"m": TaskInfo("memorization", "accuracy")},
    )
    lines = " ".join(verdict(found.summary()))
    assert "edit lowers memorization" in lines
    assert "1 of 20 items of m under random" in lines
    assert "No control was run" not in lines


def test_flips_and_tags_leave_out_the_item():
    before = [ItemResult(f"{tag}/{i}", {"exact": 1.0}) for tag in "abcd" for i in range(3)]
    lost = [replace(one, scores={"exact": float(i % 4 > 1)}) for i, one in enumerate(before)]
    lost[4] = replace(lost[4], scores={"exact": math.nan})
    results = {"unchanged": {"t": before}, "edit": {"t": lost}}
    found = Comparison(results, {"t": TaskInfo("reasoning", "exact")}, resamples=50)
    expected = [i for i in range(12) if i % 4 < 2 and i != 4]
    assert [one.id for one in flips(found, "t", "edit")] == [before[i].id for i in expected]
    changes = changes_by_tag(found, "t", "edit", {"a": 1, "b": 2, "c": 3, "d": 4})
    assert [math.isnan(one.change.value) for one in changes.tags] == [False, True, False, False]
    assert changes.spearman.n == 3
    without = Comparison(
        {name: {"t": [one for one in by["t"] if one.id[0] != "b"]} for name, by in results.items()},
        found.tasks,
        resamples=50,
    )
    same = changes_by_tag(without, "t", "edit", {"a": 1, "c": 3, "d": 4})
    assert (changes.spearman, changes.p_value) == (same.spearman, same.p_value)
    assert changes_by_tag(found, "t", "edit").tags[-1].tag == "b"
    tag_bars(changes)


def test_sweeps_and_choices_pass_over_the_setting(tmp_path):
    def comparison(damages, scores):
        results = {
            name: {
                "by": [ItemResult(str(i), {"nll": d if i else bad}, 1.0) for i in range(8)],
                "t": [ItemResult(str(i), {"exact": s}) for i in range(8)],
            }
            for name, (d, bad), s in zip(NAMES, damages, scores, strict=True)
        }
        infos = {"by": TaskInfo("language", "perplexity"), "t": TaskInfo("reasoning", "exact")}
        return Comparison(results, infos, resamples=40)

    damages = [(1.0, 1.0), (1.5, 1.5), (2.0, math.inf), (3.0, 3.0)]
    found = comparison(damages, [1.0, 0.8, 0.6, 0.4])
    curve = {"m": [(1.0, "one"), (2.0, "two"), (3.0, "three")]}
    near, far = matched(found, curve, "t", "by", [math.exp(0.25), math.exp(1.5)])["m"]
    assert 0.8 < near.value < 1
    assert math.isnan(far.value)  # the sweep ends before the setting that overflowed
    assert math.isnan(damage_of(found, "two", "by"))
    pareto_fronts(found, curve, "t", "by", ("damage", "score"))

    chosen = choose_on_validation(found, found, "by", NAMES[1:], larger_is_better=False)
    assert (chosen.variant, chosen.best_of.k) == ("one", 2)
    with pytest.raises(SettingError, match="not finite"):
        choose_on_validation(found, found, "by", ["two"])
    draw = found.plot({name: float(i) for i, name in enumerate(NAMES)})
    draw.savefig(tmp_path / "x.png")


def test_a_setting_that_overflowed_meets_no_goal():
    bad = [ItemResult("0", {"nll": math.nan}, 1.0)]
    good = [ItemResult("0", {"nll": 1.0}, 1.0)]
    found = Comparison(
        {"unchanged": {LANGUAGE: good}, "fine": {LANGUAGE: good}, "overflowed": {LANGUAGE: bad}},
        {LANGUAGE: TaskInfo("language", "perplexity")},
    )
    assert missed_goals(found, "fine", ()) == 0
    assert missed_goals(found, "overflowed", ()) == math.inf


def test_the_sentence_lists_the_first_cells_only():
    bad = [ItemResult("0", {"exact": math.nan})]
    results = {name: {"t": bad} for name in ("unchanged", *map(str, range(30)))}
    found = Comparison(results, {"t": TaskInfo("reasoning", "exact")}).summary().not_finite()
    assert found.count("of t under") == 5
    assert found.endswith("and in 26 more cells.")


class Overflow:
    """Makes every state that reaches the unembedding NaN."""

    def attach(self, model):
        weight = model.model.norm.weight.data
        before = weight.clone()
        weight.fill_(torch.nan)
        return SimpleNamespace(remove=lambda: weight.copy_(before))

    def describe(self):
        return {"kind": "overflow"}


def test_no_task_takes_an_overflow_for_an_answer(tmp_path):
    lm = wrap(fresh_model("llama"), tiny_tokenizer())
    tasks = [
        Perplexity("texts", [("0", "abc def"), ("1", "xyz")]),
        MultipleChoice("choices", [("0", "a", [" b", " c"], 0), ("1", "q", [" b", " c"], 1)]),
        FilledBlank("blanks", [("0", ("a cat", "a dog"), " barks", 1)]),
        ndcg_task(lm, [("0", "hello world")], k=3),
        ShortAnswer("answers", [("0", "hello", "world"), ("1", "abc", "d")], max_new_tokens=3),
        Recitation("recited", [("0", [5, 6, 7], [8, 9]), ("1", [5, 6, 7], [8])]),
        StressTest("perturbed", [("0", [5, 6, 7], [8, 9])], shifts=1),
    ]
    settings = {"journal": tmp_path / "j", "progress": False, "resamples": 50}
    for _ in range(2):  # the second time from the journal
        found = compare(lm, {"overflowed": Overflow()}, tasks, **settings)
        write_report(found, tmp_path / "report")
        for task in tasks:
            assert math.isfinite(found.score("unchanged", task.name))
            assert math.isnan(found.score("overflowed", task.name))
            (first, *_) = found.results["overflowed"][task.name]
            assert all(map(math.isnan, first.scores.values()))
