"""The comparisons of several models as one table."""

import json
import math
from dataclasses import replace

import pytest
from command_line import run

from lirefs.comparison import Comparison, TaskInfo, pool, write_report
from lirefs.comparison.summary import EQUAL
from lirefs.errors import SettingError
from lirefs.statistics import pool_estimates
from lirefs.tasks.task import ItemResult

TASKS = {"sums": TaskInfo("arithmetic", "accuracy"), "stories": TaskInfo("language", "perplexity")}


def compared(right, perplexities, variants=("unchanged", "edit", "SVD")):
    """How many of 40 sums each variant has right, and its perplexity."""
    results = {}
    for name, count, perplexity in zip(variants, right, perplexities, strict=True):
        sums = [ItemResult(str(i), {"accuracy": float(i < count)}) for i in range(40)]
        nlls = [10 * math.log(perplexity) + 0.1 * (i - 19.5) for i in range(40)]
        stories = [ItemResult(str(i), {"nll": nll}, 10) for i, nll in enumerate(nlls)]
        results[name] = {"sums": sums, "stories": stories}
    return Comparison(results, TASKS, provenance={EQUAL: {"edit": ["SVD"]}}, resamples=200)


RUNS = {
    "seed 0": compared((40, 30, 10), (2.0, 2.2, 2.21)),
    "seed 1": compared((38, 32, 12), (2.1, 2.4, 2.41)),
    "seed 2": compared((39, 28, 5), (1.9, 2.3, 2.31)),
}


@pytest.fixture(scope="module")
def pooled():
    return pool({name: one.summary() for name, one in RUNS.items()})


def test_each_number_is_that_of_the_runs_and_their_mean(pooled):
    found = pooled.changes["edit", "sums"]
    own = [one.cell("edit", "sums").difference for one in RUNS.values()]
    assert list(found.by_run) == own
    assert found.pooled == pool_estimates(own)
    assert found.pooled.value == pytest.approx((-10 - 6 - 11) / 120)
    means = pooled.means["SVD", "arithmetic"]
    assert means.pooled.value == pytest.approx((10 / 40 + 12 / 38 + 5 / 39) / 3)


def test_perplexities_are_pooled_as_logarithms(pooled):
    value, ratio = pooled.values["edit", "stories"], pooled.changes["edit", "stories"]
    assert value.pooled.value == pytest.approx((2.2 * 2.4 * 2.3) ** (1 / 3))
    ratios = [2.2 / 2.0, 2.4 / 2.1, 2.3 / 1.9]
    assert [one.value for one in ratio.by_run] == pytest.approx(ratios)
    assert ratio.pooled.value == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert ratio.pooled.low < ratio.pooled.value < ratio.pooled.high


def test_tables_show_the_pooled_number_and_each_run(pooled):
    overview, equal, changes = pooled.tables()
    assert [row[0].text for row in overview.rows] == ["edit", "SVD"]
    assert str(changes.rows[0][1]).startswith("-22 [")
    assert str(changes.rows[0][1]).endswith("] (-25, -15, -28)")
    assert equal.name == "Equal damage: at the perplexity of edit"
    assert [row[0].text for row in equal.rows] == ["edit", "SVD"]
    assert "(2.2, 2.4, 2.3)" in str(equal.rows[0][1])
    assert "seed 0, seed 1, seed 2" in overview.note


def test_variants_of_some_runs_are_left_out_by_name():
    other = compared((40, 30, 9), (2.0, 2.2, 2.2), ("unchanged", "edit", "noise"))
    found = pool({"a": RUNS["seed 0"].summary(), "b": other.summary()})
    assert found.variants == ("unchanged", "edit")
    assert found.left_out == ("SVD", "noise")
    assert not found.equal


def test_what_cannot_be_pooled_is_named():
    one = RUNS["seed 0"].summary()
    with pytest.raises(SettingError, match="at least two runs"):
        pool({"a": one})
    renamed = replace(one, tasks={**one.tasks, "sums": TaskInfo("arithmetic", "f1")})
    with pytest.raises(SettingError, match=r"'b' has other tasks than 'a': sums"):
        pool({"a": one, "b": renamed})
    other = compared((40, 1, 1), (2.0, 2.2, 2.2), ("unchanged", "x", "y")).summary()
    with pytest.raises(SettingError, match="no variant but the unchanged model"):
        pool({"a": one, "b": other})
    with pytest.raises(SettingError, match="run 'b'"):
        pool({"a": one, "b": RUNS["seed 1"]})


def test_the_command_prints_all_reports_together(tmp_path, monkeypatch, capsys):
    folders = []
    for name, one in RUNS.items():
        folders.append(tmp_path / name / "report")
        write_report(one, folders[-1], [])
    assert run(monkeypatch, "pool", *folders) == 0
    printed = capsys.readouterr().out
    assert "Retained of each group of tasks" in printed
    assert "(-25, -15, -28)" in printed
    assert run(monkeypatch, "pool", *folders, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == list(map(str, folders))  # all folders are called "report"
    assert len(found["changes"]["edit"]["sums"]["by_run"]) == 3
    assert run(monkeypatch, "pool", folders[0], folders[0]) == 2
    assert "named twice" in capsys.readouterr().err
