import json
import math

import numpy as np
import pytest
import torch

from lirefs import Direction, MultipleChoice, Perplexity, Recitation, ShortAnswer, Steer, compare
from lirefs.comparison import Comparison, TaskInfo, flips, write_report
from lirefs.errors import InterventionError, TaskError
from lirefs.statistics.significance import detectable_difference
from lirefs.tasks.inference import greedy
from lirefs.tasks.task import ItemResult


@pytest.fixture(scope="module")
def comparison():
    from tiny import tiny_model, tiny_tokenizer

    from lirefs import wrap

    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    prefixes = lm.encode([f"prefix {i}" for i in range(6)])
    said = greedy(lm, prefixes, 5)
    tasks = [
        Recitation("recite", [(str(i), p, s) for i, (p, s) in enumerate(zip(prefixes, said))]),
        MultipleChoice("choose", [(str(i), f"q{i}", [" a", " b"], i % 2) for i in range(8)]),
        ShortAnswer("answer", [(str(i), f"q{i}", ["x"]) for i in range(5)]),
        Perplexity("texts", [(str(i), "some text " * (i + 1)) for i in range(4)]),
    ]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    one = Direction(vector, 2)
    variants = {"same": Steer(one, "add", 0.0), "strong": Steer(one, "add", 20.0)}
    return compare(lm, variants, tasks, resamples=500, progress=False)


def test_a_null_variant_differs_nowhere(comparison):
    for task in comparison.tasks:
        cell = comparison.cell("same", task)
        assert cell.difference.value == 0
        assert cell.difference.low <= 0 <= cell.difference.high
        assert cell.p == cell.p_holm == 1
        same, base = comparison.results["same"][task], comparison.results["unchanged"][task]
        assert same == base
    assert comparison.summary().means["same", "memorization"].value == 1


def test_a_strong_variant_differs(comparison):
    assert comparison.cell("unchanged", "recite").value.value == 1
    recite = comparison.cell("strong", "recite")
    assert recite.value.value < 1
    assert recite.difference.high <= 0
    assert set(recite.extra) == {"loose", "levenshtein", "token_match"}
    strong, base = (comparison.cell(name, "texts") for name in ("strong", "unchanged"))
    assert strong.retained.value == pytest.approx(base.value.value / strong.value.value)


def test_a_zero_baseline_is_left_out_not_divided_by(comparison):
    cell = comparison.cell("strong", "answer")
    assert cell.value.value == 0
    assert math.isnan(cell.retained.value)
    assert comparison.summary().means["strong", "closed-book"].n == 0


def scored(**shares):
    """A comparison of n = 40 items where each task has the share given."""
    items = {
        task: [ItemResult(str(i), {"accuracy": float(i < share * 40)}) for i in range(40)]
        for task, share in shares.items()
    }
    tasks = {task: TaskInfo("reasoning", "accuracy", 0.25) for task in shares}
    return Comparison({"unchanged": items, "v": items}, tasks, resamples=100)


def test_a_task_at_chance_is_marked_and_left_out_of_the_mean(tmp_path):
    one = scored(guessed=0.3, solved=0.8)
    assert one.summary().groups == {"reasoning": ("solved",)}
    assert one.summary().means["v", "reasoning"].n == 40
    page = write_report(one, tmp_path)
    assert "chance 25 %; unchanged model not above chance" in page.read_text().replace(
        "\u00a0", " "
    )
    none = scored(guessed=0.3)
    assert math.isnan(none.summary().means["v", "reasoning"].value)
    assert write_report(none, tmp_path).exists()


def test_saved_report_is_whole_and_self_contained(comparison, tmp_path):
    page = write_report(comparison, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        *("report.html", "report.md", "results.json", "results.csv", "overview.tex"),
        *("retained.png", "retained.svg", "retained_tasks.png", "retained_tasks.svg"),
        *("retained-dark.png", "retained-dark.svg"),
    }
    html = page.read_text()
    assert "data:image/png;base64," in html
    assert "http" not in html.replace("http-equiv", "")
    for variant in comparison.variants:
        assert variant in html
        assert variant in (tmp_path / "report" / "report.md").read_text()
    data = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(data["results"]["strong"]["choose"]) == 8
    assert len(data["cells"]) == 3 * 4


def test_paired_interval_against_a_plain_bootstrap():
    generator = np.random.default_rng(0)
    base = generator.random(60) < 0.6
    variant = np.where(generator.random(60) < 0.7, base, ~base)
    results = {
        name: {"t": [ItemResult(str(i), {"accuracy": float(v)}) for i, v in enumerate(values)]}
        for name, values in (("unchanged", base), ("variant", variant))
    }
    found = (
        Comparison(results, {"t": TaskInfo("reasoning", "accuracy")})
        .cell("variant", "t")
        .difference
    )
    gap = variant.astype(float) - base
    draws = [generator.choice(gap, 60).mean() for _ in range(4000)]
    assert found.value == pytest.approx(gap.mean())
    assert found.low == pytest.approx(np.percentile(draws, 2.5), abs=0.02)
    assert found.high == pytest.approx(np.percentile(draws, 97.5), abs=0.02)


def test_named_errors(lm):
    task = MultipleChoice("t", [("a", "q", [" a", " b"], 0)])
    good = Steer(Direction(torch.ones(32), 1), "add")
    with pytest.raises(TaskError, match="no tasks"):
        compare(lm, {"a": good}, [], progress=False)
    with pytest.raises(TaskError, match="share a name"):
        compare(lm, {"a": good}, [task, task], progress=False)
    with pytest.raises(TaskError, match="unchanged"):
        compare(lm, {"unchanged": good}, [task], progress=False)
    with pytest.raises(InterventionError):  # before any task has run
        compare(lm, {"a": Steer(Direction(torch.ones(5), 1), "add")}, [task], progress=False)


def test_a_null_run_reports_no_difference_anywhere(comparison):
    alone = Comparison(
        {name: comparison.results[name] for name in ("unchanged", "same")}, comparison.tasks
    )
    assert not any(cell.clear for cell in alone.cells())
    assert not any(flips(alone, task, "same") for task in alone.tasks)
    summary = alone.summary()
    counted = [group for group, tasks in summary.groups.items() if tasks]
    assert counted
    assert all(summary.means["same", group].value == 1 for group in counted)


def test_a_planted_difference_of_the_detectable_size_is_found_as_often_as_said():
    """Of four items in ten that change, more are lost than gained, by the detectable difference."""
    n, discordant = 120, 0.4
    least = detectable_difference(n, discordant)
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        change = generator.choice(
            [-1, 1, 0], n, p=[(discordant + least) / 2, (discordant - least) / 2, 1 - discordant]
        )
        base = np.where(change == 0, generator.random(n) < 0.5, change < 0)
        results = {
            name: {"t": [ItemResult(str(i), {"accuracy": float(v)}) for i, v in enumerate(scores)]}
            for name, scores in (("unchanged", base), ("planted", base + change))
        }
        one = Comparison(results, {"t": TaskInfo("reasoning", "accuracy")}, resamples=2)
        found += one.cell("planted", "t").p_holm < 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.05)


def test_a_planted_difference_is_found_among_many_null_tasks_and_nothing_else():
    generator = np.random.default_rng(1)
    base, results = {}, {}
    for task in range(30):
        scores = generator.random(150) < 0.6
        moved = np.where(generator.random(150) < 0.1, generator.random(150) < 0.6, scores)
        if task == 7:
            moved = scores & (generator.random(150) < 0.75)
        base[f"t{task}"], results[f"t{task}"] = (
            [ItemResult(str(i), {"accuracy": float(v)}) for i, v in enumerate(values)]
            for values in (scores, moved)
        )
    tasks = {name: TaskInfo("reasoning", "accuracy") for name in base}
    one = Comparison({"unchanged": base, "planted": results}, tasks, resamples=2)
    assert [cell.task for cell in one.cells() if cell.clear] == ["t7"]
