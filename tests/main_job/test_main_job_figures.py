"""The figure of the swept edit: from the unchanged model to one that has lost its language."""

import numpy as np
import pytest
from made_up import made_up
from matplotlib.colors import to_hex

from lirefs.main_job import figures
from lirefs.main_job.grid import TRIAL, WHOLE
from lirefs.pictures import COLOURS
from lirefs.tasks.task import CONFLICT, GROUPS


def test_the_sweep_goes_from_where_nothing_is_lost_to_where_everything_is():
    for grid in (WHOLE, TRIAL):
        assert set(grid.keeps) < set(grid.swept_keeps)
        assert max(grid.swept_keeps) > 0.999
        assert min(grid.swept_keeps) <= 0.5
        assert grid.random_directions > 1  # which sentences speak of in the plural


def test_scores_stand_over_what_is_kept_and_begin_at_the_unchanged_model(monkeypatch):
    canvases = []
    monkeypatch.setattr(figures, "picture_of", canvases.append)
    summary = made_up(8, 3).summary()
    keeps = {"variant A": 0.5, "variant B": 0.9999, "variant C": 0.99}
    tasks = [name for name in summary.tasks if name != "texts"]
    figures.keep_spectrum(summary, keeps, tasks, "texts")
    upper, lower = canvases[0].axes
    order = ["unchanged", "variant B", "variant C", "variant A"]
    for line, task in zip(upper.lines, tasks, strict=True):
        np.testing.assert_allclose(line.get_xdata(), [0, 0.0001, 0.01, 0.5])
        values = [summary.cells[name, task].value.value for name in order]
        assert list(line.get_ydata()) == values
        group = summary.tasks[task].group
        colour = COLOURS[6] if group == CONFLICT else COLOURS[GROUPS.index(group)]
        assert to_hex(line.get_color()) == colour.lower()
    first, last = (summary.cells[name, "texts"].value.value for name in (order[0], order[-1]))
    assert lower.lines[0].get_ydata()[[0, -1]] == pytest.approx([1, last / first])
    assert upper.get_xticklabels()[0].get_text() == "1"
    assert upper.get_xlim()[0] == 0
    assert len(upper.get_xticks()) == len(upper.get_xticklabels()) == len(order)
    assert len(upper.get_xticks(minor=True)) == 0  # every tick has a label
    styles = {(to_hex(one.get_color()), one.get_linestyle()) for one in upper.lines}
    assert len(styles) == len(tasks)  # tasks of one group are told apart
