"""Comparisons as data frames and figures."""

import math

import pytest
from made_up import made_up
from matplotlib import pyplot
from matplotlib.colors import to_hex

from lirefs.comparison import Comparison
from lirefs.comparison.figures.retained import draw_retained
from lirefs.errors import MissingError, SettingError
from lirefs.pictures import COLOURS, picture_of


def renamed(found, **names):
    results = {names.get(name.replace(" ", "_"), name): one for name, one in found.results.items()}
    return Comparison(results, found.tasks, found.provenance, found.resamples, found.seed)


def test_a_row_for_each_cell_or_for_each_item():
    found = made_up(8)
    cells = found.to_dataframe()
    assert len(cells) == len(found.variants) * len(found.tasks)
    items = found.to_dataframe(items=True)
    assert len(items) == sum(len(one) for by in found.results.values() for one in by.values())
    assert {"variant", "task", "group", "metric", "id", "prompt", "output", "weight"} <= set(items)
    mean = items[items.metric == "accuracy"].groupby(["variant", "task"]).accuracy.mean()
    for (variant, task), value in mean.items():
        assert value == pytest.approx(found.score(variant, task))
    texts = items[(items.task == "texts") & (items.variant == "variant A")]
    perplexity = math.exp(texts.nll.sum() / texts.weight.sum())
    assert perplexity == pytest.approx(found.score("variant A", "texts"))


def dots(canvas, row):
    """Colour, value and hollowness of the dots of a row."""
    found = {}
    for one in canvas.axes[0].collections:
        if not hasattr(one, "get_offsets") or one.get_paths()[0].vertices.shape[0] < 20:
            continue  # bars, arrows
        for (x, y), edge, face in zip(
            one.get_offsets(), one.get_edgecolors(), one.get_facecolors(), strict=True
        ):
            if abs(y - row) < 0.5:
                found[to_hex(edge)] = (x, to_hex(face) == "#ffffff")
    return found


def test_the_figure_of_retained_performance_is_of_colours_and_hollow_controls():
    found = renamed(made_up(12), variant_A="random pairs", variant_B="a $method")
    summary = found.summary()
    assert summary.controls == {"random pairs"}
    canvas = found.plot()
    (axis,) = canvas.axes
    rows = [one.get_text() for one in axis.get_yticklabels()]
    assert rows == [r"a \$method", "random pairs"]  # methods first
    for row, variant in enumerate(["a $method", "random pairs"]):
        shown = dots(canvas, row)
        assert len(shown) == len(summary.groups)
        for group, colour in zip(summary.groups, COLOURS, strict=False):
            value, hollow = shown[colour.lower()]
            assert value == pytest.approx(summary.means[variant, group].value)
            assert hollow == (variant == "random pairs")
    legend = [one.get_text() for one in canvas.legends[0].get_texts()]
    assert legend[-3:] == ["method", "control", "unchanged model"]
    assert not pyplot.get_fignums()
    assert picture_of(canvas) == picture_of(draw_retained(summary))


def test_without_controls_there_is_no_word_of_them():
    legend = [one.get_text() for one in made_up().plot().legends[0].get_texts()]
    assert "control" not in legend


def test_nothing_to_plot_is_said():
    found = made_up()
    alone = Comparison({"unchanged": found.results["unchanged"]}, found.tasks, resamples=50)
    with pytest.raises(SettingError, match="nothing to plot"):
        alone.plot()


@pytest.mark.parametrize(("tasks", "variants"), [(5, 1), (12, 4), (5, 20)])
def test_no_text_of_the_figure_overlaps_at_any_size(tasks, variants):
    canvas = made_up(tasks, variants).plot()
    picture_of(canvas)
    assert canvas.get_size_inches()[1] < 9.5
    (axis,) = canvas.axes
    texts = [*axis.get_xticklabels(), *axis.get_yticklabels(), *canvas.legends[0].get_texts()]
    boxes = [(one.get_text(), one.get_window_extent()) for one in texts if one.get_text()]
    for k, (name, box) in enumerate(boxes):
        assert box.x0 >= 0, name
        for other, another in boxes[:k]:
            assert not box.overlaps(another), (name, other)


def lines_of(axis):
    """Label to the points and the marker's face of each line that is drawn with markers."""
    return {
        one.get_label(): (list(one.get_xdata()), list(one.get_ydata()), one.get_markerfacecolor(),
                          one.get_linestyle())
        for one in axis.lines if one.get_marker() == "o"
    }  # fmt: skip


def test_the_figure_of_a_sweep_has_a_line_for_each_task_and_the_unchanged_score():
    found = renamed(made_up(3, 3), variant_C="random C")
    canvas = found.plot({"variant B": 2, "variant A": -1.0, "random C": 0}, label="step $a")
    left, right = canvas.axes  # one for each metric
    assert (left.get_ylabel(), right.get_ylabel()) == ("accuracy", "perplexity")
    assert left.get_xlabel() == r"step \$a"
    drawn = lines_of(left)
    tasks = [name for name in found.tasks if name != "texts"]
    labels = [f"{task}{kind}, n = 20" for task in tasks for kind in ("", ", control")]
    assert list(drawn) == labels
    x, y, face, style = drawn[labels[0]]
    assert (x, style) == ([-1.0, 2], "-")
    assert y == [found.score(name, tasks[0]) for name in ("variant A", "variant B")]
    assert face != "white"
    x, y, face, style = drawn[labels[1]]
    assert (x, y, face, style) == ([0], [found.score("random C", tasks[0])], "white", "--")
    dotted = [list(one.get_ydata())[:1] for one in left.lines if one.get_linestyle() == ":"]
    assert [y for one in dotted for y in one] == [found.score("unchanged", task) for task in tasks]
    bands = [one.get_paths()[0].vertices[:, 1] for one in right.collections]
    cells = [found.cell(name, "texts").value for name in ("variant A", "variant B")]
    assert bands[0].min() == pytest.approx(min(one.low for one in cells))
    assert bands[0].max() == pytest.approx(max(one.high for one in cells))
    assert picture_of(canvas).png


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"absent": 1.0}, MissingError, "no variant 'absent'; there are unchanged, variant A"),
        ({"variant A": "1"}, SettingError, r"x\['variant A'\] must be a finite number, got '1'"),
        ({"variant A": math.nan}, SettingError, "finite"),
        ({}, SettingError, "x is empty"),
        (["variant A"], SettingError, "x must be a Mapping"),
    ],
)
def test_a_sweep_that_cannot_be_drawn(x, error, message):
    with pytest.raises(error, match=message):
        made_up(2).plot(x)
