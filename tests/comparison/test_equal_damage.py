"""Variants that were set to the perplexity of another one, in a report."""

import math

import pytest

from lirefs.comparison import Comparison, TaskInfo, load_comparison, write_report
from lirefs.comparison.controls import control_reasons
from lirefs.comparison.report.tables import equal_tables, overview_table
from lirefs.comparison.summary import EQUAL
from lirefs.tasks.task import ItemResult

PERPLEXITIES = {"unchanged": 4.0, "edit": 5.0, "SVD": 5.02, "far": 5.5}


def compared(equal, perplexities=PERPLEXITIES, texts=True):
    results, infos = {}, {"sums": TaskInfo("arithmetic", "accuracy")}
    if texts:
        infos["stories"] = TaskInfo("language", "perplexity")
    for name, perplexity in perplexities.items():
        sums = [ItemResult(str(i), {"accuracy": float(i < 30)}) for i in range(40)]
        nll = 10 * math.log(perplexity)
        stories = [ItemResult(str(i), {"nll": nll}, 10) for i in range(40)]
        results[name] = {"sums": sums, "stories": stories} if texts else {"sums": sums}
    return Comparison(results, infos, provenance={EQUAL: equal}, resamples=20)


def test_a_table_for_each_goal_says_how_equal_perplexities_are():
    summary = compared({"edit": ["SVD", "far"], "far": []}).summary()
    (table,) = equal_tables(summary)
    assert table.name == "Equal damage: at the perplexity of edit"
    assert table.head == ["variant", "perplexity [95 %]", "over edit's", "arithmetic", "language"]
    assert [row[0].text for row in table.rows] == ["edit", "SVD", "far"]
    assert [row[2].text for row in table.rows] == ["-", "+0.40\u00a0%", "+10.00\u00a0%"]
    assert [row[3].text for row in table.rows] == ["100\u00a0%"] * 3
    assert table.grey == {1}  # the control
    assert (
        "On the 40 test texts of stories, perplexities differ by more than 1\u00a0%" in table.note
    )
    assert table.note.endswith("for far, which cannot be compared here.")
    (table,) = equal_tables(compared({"edit": ["SVD"]}).summary())
    assert table.note.endswith("perplexities differ by at most 0.40\u00a0%.")


def test_the_overview_says_which_rows_are_at_equal_damage(tmp_path):
    comparison = compared({"edit": ["SVD"], "far": ["SVD"]})
    table = overview_table(comparison.summary())
    assert table.head[-1] == "at the perplexity of"
    marks = {row[0].text: row[-1].text for row in table.rows}
    assert marks == {"unchanged": "-", "edit": "-", "far": "-", "SVD": "edit and far"}
    write_report(comparison, tmp_path, [])
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text("utf-8")
        assert "Equal damage: at the perplexity of far" in text
        assert "at the perplexity of" in text
    again = load_comparison(tmp_path).summary()
    assert [one.rows for one in equal_tables(again)] == [
        one.rows for one in equal_tables(comparison.summary())
    ]


@pytest.mark.parametrize(
    "equal", [None, [], {"edit": "SVD"}, {"gone": ["SVD"]}, {"edit": [3, "?"]}]
)
def test_without_such_variants_a_report_is_as_before(equal):
    summary = compared(equal).summary()
    assert equal_tables(summary) == []
    assert overview_table(summary).head[-1].startswith("language")


def test_without_texts_there_is_no_equal_damage():
    assert equal_tables(compared({"edit": ["SVD"]}, texts=False).summary()) == []


def test_controls_at_equal_damage_are_explained():
    first, second = control_reasons(["random pairs", "random pairs at K-FAC's damage"])
    assert "as many curvature pairs" in first
    assert second.endswith("(the same at the strength that costs as much perplexity as K-FAC)")
