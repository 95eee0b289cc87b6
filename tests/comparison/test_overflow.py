"""An item on which the model overflowed is n/a where it counts, and costs no other number."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import fresh_model, tiny_tokenizer

from lirefs import compare, ndcg_task, wrap
from lirefs.comparison import Comparison, TaskInfo, load_comparison, write_report
from lirefs.tasks import FilledBlank, ItemResult, MultipleChoice, Perplexity


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
    report = (tmp_path / "report.md").read_text()
    assert "n/a" in report
    assert "nan" not in report.replace("unchanged", "")


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
