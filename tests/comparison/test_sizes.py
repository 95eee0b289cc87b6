"""Many items, many variants and long names: one pass for each task, and bounded pictures."""

import struct
import warnings

import numpy as np
import pytest

from lirefs.comparison import Comparison, TaskInfo, changes_by_tag, comparison, write_report
from lirefs.comparison.figures import retained, tags
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.report import flip_list
from lirefs.pictures import literal_text, shortened
from lirefs.statistics import significance
from lirefs.statistics.resamples import Resamples
from lirefs.tasks import ItemResult


def made_up(variants, tasks, items=6):
    """Every other task is a perplexity."""
    generator = np.random.default_rng(0)
    infos = {
        task: TaskInfo(("language", "reasoning")[i % 2], ("perplexity", "accuracy")[i % 2])
        for i, task in enumerate(tasks)
    }

    def results(task):
        if infos[task].metric == "perplexity":
            return [ItemResult(f"a/{i}", {"nll": generator.random()}, 3.0) for i in range(items)]
        return [ItemResult(f"a/{i}", {"accuracy": float(i > 1)}) for i in range(items)]

    names = ("unchanged", *variants)
    return Comparison(
        {v: {task: results(task) for task in tasks} for v in names}, infos, resamples=20
    )


def size_of(png):
    return struct.unpack(">II", png[16:24])


def test_each_task_makes_its_resamples_once_and_all_tests_share_their_signs(monkeypatch):
    passes, signs = [], []
    blocks, flipped = Resamples.blocks, significance._flipped
    monkeypatch.setattr(Resamples, "blocks", lambda self: passes.append(self.seed) or blocks(self))
    monkeypatch.setattr(
        significance, "_flipped", lambda *given: signs.append(given) or flipped(*given)
    )
    found = made_up([f"v{i}" for i in range(20)], [f"t{i}" for i in range(8)], items=14)
    summary = found.summary()
    assert len(summary.cells) == 21 * 8
    assert sorted(passes) == [0, 2, 4, 6]  # scores of 0 and 1 need none
    assert len(signs) == 1
    assert found.summary().cells == summary.cells
    assert len(passes) == 4


def test_all_variants_together_have_the_numbers_of_each_alone():
    found = made_up(["one", "two", "three"], ["text", "sums"])
    for variant in found.variants:
        both = {v: found.results[v] for v in dict.fromkeys(("unchanged", variant))}
        alone = Comparison(both, found.tasks, resamples=20)
        for task in found.tasks:
            cell, other = found.cell(variant, task), alone.cell(variant, task)
            for name in ("value", "difference", "retained", "p", "detectable"):
                assert getattr(cell, name) == getattr(other, name)
            assert alone.unadjusted_cell(variant, task).value == cell.value


LONG = {"characters": "$v" * 2500, "lines": "some words\n" * 500}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_name_does_not_stretch_a_picture(kind, tmp_path):
    name = LONG[kind]
    found = made_up([f"{name}1", f"{name}2", "short"], [f"{name}a", f"{name}b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit warns
        write_report(found, tmp_path)
        canvas = found.plot({f"{name}1": 1.0, "short": 2.0}, label=name)
        canvas.savefig(tmp_path / "plot.png")
        bars = tag_bars(changes_by_tag(found, f"{name}b", f"{name}1"))
    pictures = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert len(pictures) == 4
    for png in (*pictures, bars.png):
        assert max(size_of(png)) < 2500
    assert name.strip() in (tmp_path / "report.html").read_text()
    svg = (tmp_path / "retained_tasks.svg").read_text()
    assert "1" in svg
    assert len(max(svg.split("<text")[1:], key=len)) < 2500


def test_many_variants_and_tasks_are_drawn_in_part_and_the_caption_says_so(monkeypatch):
    monkeypatch.setattr(retained, "_MOST_ROWS", 3)
    monkeypatch.setattr(retained, "_MOST_PANELS", 2)
    found = made_up(["v0", "v1", "v2 control", "v3", "v4"], ["t0", "t1", "t2", "t3"]).summary()
    groups, tasks = retained_figures(found)
    assert "the first 3 of 5 variants" in groups.caption
    assert "the first 2 of 5 variants" in tasks.caption
    assert "the first 3 of 4 tasks" in tasks.caption
    drawn = [one.picture.svg.decode() for one in (groups, tasks)]
    assert [[f">v{i}<" in svg for i in range(5)] for svg in drawn] == [
        [True, True, False, True, False],
        [True, True, False, False, False],
    ]
    assert [f">t{i} (6)<" in drawn[1] for i in range(4)].count(True) == 3
    monkeypatch.undo()
    assert "the first" not in "".join(one.caption for one in retained_figures(found))


def test_many_tags_are_drawn_in_part(monkeypatch):
    found = made_up(["v"], ["a", "b"])
    for name, by_task in found.results.items():
        wrong = 1.0 if name == "unchanged" else 0.0
        by_task["b"] = [ItemResult(f"tag{i}/0", {"accuracy": wrong}) for i in range(30)]
    changes = changes_by_tag(found, "b", "v")
    monkeypatch.setattr(tags, "MOST", 6)
    svg = tag_bars(changes).svg.decode()
    assert svg.count(">tag") == 6
    assert "the first and the last 3 of 30 tags" in svg


def test_a_name_is_cut_in_its_middle():
    assert shortened("a short  name\n", 20) == "a short name"
    cut = shortened("strength " + "0" * 50 + "1", 20)
    assert len(cut) == 20
    assert (cut[:9], cut[-1]) == ("strength ", "1")
    assert "…" in cut
    assert len(literal_text("x" * 5000)) == 100
    assert literal_text("one\ntwo") == "one\ntwo"


def test_the_page_lists_as_many_flips_of_each_as_fit(monkeypatch):
    found = made_up(["v", "w"], ["a", "b", "c", "d"], items=40)
    for variant, lost in (("v", 30), ("w", 7)):
        for task in ("b", "d"):
            found.results[variant][task] = [
                ItemResult(f"a/{i}", {"accuracy": float(i > 1 + lost)}) for i in range(40)
            ]
    for most, each in ((1000, 30), (40, 13), (28, 7), (27, 6), (3, 0)):
        monkeypatch.setattr(flip_list, "MOST_FLIPS", most)
        listed = flip_list.flip_list(found)
        assert (listed.total, listed.each) == (74, each)
        assert listed.shown == 2 * min(30, each) + 2 * min(7, each) <= most


def test_a_comparison_is_not_asked_for_its_scores_more_often_for_more_variants(monkeypatch):
    """How often the items of a cell are read does not depend on how many cells there are."""

    def reads(variants):
        found = made_up([f"v{i}" for i in range(variants)], ["a", "b"])
        counts = []
        original = comparison.Scores.of
        with monkeypatch.context() as patched:
            patched.setattr(
                comparison.Scores, "of", lambda *given: counts.append(1) or original(*given)
            )
            found.summary()
        return len(counts) / (variants + 1)

    assert reads(40) <= reads(5)
