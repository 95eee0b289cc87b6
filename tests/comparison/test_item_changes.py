import itertools

import numpy as np
import pytest

from experiments.spectra_plots import TaskPosition, two_sided_spectrum
from lirefs.comparison import Comparison, TaskInfo, changes_by_tag, flips, tag_bars
from lirefs.errors import TaskError
from lirefs.statistics.intervals import Estimate, permutation_p
from lirefs.statistics.paired import difference_of_shares, ratio_of_shares
from lirefs.tasks.task import ItemResult


def comparison(before, after, ids=None, metric="accuracy", weights=None, task="facts"):
    ids = ids or [f"i/{n}" for n in range(len(before))]
    weights = weights or [1.0] * len(before)

    def items(scores, word):
        return [
            ItemResult(
                one, {metric: float(s)}, weight=w, prompt=f"P{one}", expected="E", output=word
            )
            for one, s, w in zip(ids, scores, weights)
        ]

    results = {"unchanged": {task: items(before, "old")}, "edit": {task: items(after, "new")}}
    return Comparison(results, {task: TaskInfo("closed-book", metric)}, resamples=500)


def test_flips_hold_both_texts_and_the_direction():
    found = flips(comparison([1, 1, 0, 0], [1, 0, 1, 0]), "facts", "edit")
    assert [(one.id, one.gained) for one in found] == [("i/1", False), ("i/2", True)]
    assert (found[0].before, found[0].after) == ("old", "new")
    assert (found[0].prompt, found[0].expected) == ("Pi/1", "E")
    assert flips(comparison([0.5], [1]), "facts", "edit") == []


@pytest.mark.parametrize(("task", "variant"), [("fact", "edit"), ("facts", "edits")])
def test_an_unknown_task_or_variant_is_named(task, variant):
    for analysis in (changes_by_tag, flips):
        with pytest.raises(TaskError, match="the comparison has no"):
            analysis(comparison([1], [0]), task, variant)


IDS = ["rare/1", "rare/2", "mid/x/1", "mid/x/2", "common/1", "common/2"]


def test_changes_by_tag_are_means_of_the_items_of_the_tag():
    found = changes_by_tag(comparison([1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], IDS), "facts", "edit")
    assert [one.tag for one in found.tags] == ["rare", "mid/x", "common"]
    assert [one.change.value for one in found.tags] == [-1.0, -0.5, 0.0]
    assert [one.relative.value for one in found.tags] == [-1.0, -0.5, 0.0]
    assert [one.before for one in found.tags] == [1.0, 1.0, 0.5]
    assert all(one.change.n == 2 for one in found.tags)
    assert found.spearman is None
    assert found.tags[0].change == difference_of_shares(0, 2, 2)
    assert found.tags[0].relative.high == ratio_of_shares(0, 0, 2, 2).high - 1


def test_weights_count():
    weighted = comparison([1, 0], [0, 0], ["a/1", "a/2"], weights=[3.0, 1.0])
    found = changes_by_tag(weighted, "facts", "edit")
    assert found.tags[0].before == 0.75
    assert found.tags[0].change.value == -0.75


def test_spearman_with_the_number_of_each_tag():
    one = comparison([1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], IDS)
    up = changes_by_tag(one, "facts", "edit", {"rare": 1, "mid/x": 10, "common": 100})
    down = changes_by_tag(one, "facts", "edit", {"rare": 100, "mid/x": 10, "common": 1})
    assert (up.spearman.value, down.spearman.value) == (pytest.approx(1), pytest.approx(-1))
    assert up.spearman.n == 3
    assert [one.tag for one in down.tags] == ["common", "mid/x", "rare"]
    assert up.p_value == pytest.approx(2 / 6, abs=0.02)  # two of the six orders are as far from 0


def test_a_tag_without_a_base_has_no_relative_change():
    found = changes_by_tag(comparison([0, 0], [1, 0], ["a/1", "a/2"]), "facts", "edit")
    assert not np.isfinite(found.tags[0].relative.value)
    assert found.tags[0].change.value == 0.5
    assert tag_bars(found).png.startswith(b"\x89PNG")


def test_tags_and_numbers_must_be_there():
    with pytest.raises(TaskError, match="has no tag"):
        changes_by_tag(comparison([1], [0], ["plain"]), "facts", "edit")
    with pytest.raises(TaskError, match="no number is given for tag 'a'"):
        changes_by_tag(comparison([1], [0], ["a/1"]), "facts", "edit", {"b": 1})
    with pytest.raises(TaskError, match="perplexity"):
        changes_by_tag(comparison([1], [0], ["a/1"], metric="perplexity"), "facts", "edit")


def test_permutation_p_is_the_share_of_all_orders():
    one, other = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 3, 5, 4])
    centred = other - 3
    reach = abs(centred @ (one - 3))
    orders = np.array(list(itertools.permutations(centred)))
    exact = (np.abs(orders @ (one - 3)) >= reach - 1e-9).mean()
    assert permutation_p(one, other) == pytest.approx(exact, abs=0.02)
    assert np.isnan(permutation_p(one, np.ones(5)))


def test_figures_are_pictures():
    many = changes_by_tag(
        comparison([1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], IDS),
        "facts",
        "edit",
        {"rare": 1, "mid/x": 10, "common": 100},
    )
    assert tag_bars(many).png.startswith(b"\x89PNG")
    positions = [
        TaskPosition(f"task {n}", group, Estimate(x, x - 0.1, x + 0.1, 9), Estimate(y, y, y, 9))
        for n, (group, x, y) in enumerate(
            [("memorization", -0.4, 0.5), ("reasoning", 0.4, 0.1), ("conflict", 0.4, 0.1)]
        )
    ]
    assert two_sided_spectrum(positions, "title").png.startswith(b"\x89PNG")
