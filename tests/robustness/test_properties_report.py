"""Properties of comparisons and of the files of a report, on random examples."""

import csv
import io
import itertools
import json
import re
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.spectra_plots import TaskPosition, two_sided_spectrum
from lirefs import Comparison, compare, load_comparison
from lirefs.comparison import TaskInfo, changes_by_tag, flips, journal, pareto_fronts, tag_bars
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.report import csv_latex, page, tables
from lirefs.comparison.report.flip_list import flip_list
from lirefs.comparison.results_file import results_json
from lirefs.errors import visible
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT, GROUPS, ItemResult, ItemTask

some = settings(max_examples=40, deadline=None, derandomize=True)

NASTY = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>&amp;<b onmouseover=x>",
    "quote\" ' `",
    "a|b\\|c",
    "a,b;\r\nc",
    "\rcarriage",
    "=1+1",
    "$x_1$ and $\\frac$",
    "\\input{x} % & # _ ^ ~ {",
    "[0.5pt]*",
    "\u2028\u2029\x00\x1b",
    "   ",
    "$",
]
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
names = texts.filter(str.strip)


@st.composite
def comparisons(draw, texts=texts, names=names, metrics=("accuracy", "perplexity", "share")):
    """A comparison with any names and texts, whose variants differ at random."""
    tasks = {}
    for name in draw(st.lists(names, min_size=1, max_size=3, unique=True)):
        metric = draw(st.sampled_from(metrics))
        group = draw(st.sampled_from([*GROUPS, CONFLICT, "other"]))
        tasks[name] = TaskInfo(group, metric, draw(st.sampled_from([0.0, 0.25])))
    others = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    variants = ["unchanged", *(one for one in others if one != "unchanged")]
    results = {variant: {} for variant in variants}
    for name, info in tasks.items():
        n = draw(st.integers(1, 6))
        asked = [(f"{draw(texts)}/{row}", draw(texts), draw(texts)) for row in range(n)]
        for variant in variants:
            results[variant][name] = [
                ItemResult(
                    key,
                    {draw_score(draw, info.metric)[0]: draw_score(draw, info.metric)[1]},
                    float(row % 3 + 1) if info.metric == "perplexity" else 1.0,
                    prompt,
                    expected,
                    draw(texts),
                    draw(st.booleans()),
                )
                for row, (key, prompt, expected) in enumerate(asked)
            ]
    provenance = {"model_name": draw(texts), draw(texts): [draw(texts)], "findings": [draw(texts)]}
    return Comparison(results, tasks, provenance, resamples=40, seed=draw(st.integers(0, 3)))


def draw_score(draw, metric):
    if metric == "perplexity":
        return "nll", draw(st.integers(1, 40)) / 4
    values = st.integers(0, 1) if metric == "accuracy" else st.integers(0, 8).map(lambda n: n / 8)
    return metric, float(draw(values))


def table_rows(found):
    summary = found.summary()
    return [tables.markdown_table(tables.task_table(summary, task)) for task in found.tasks]


# Comparisons


@given(comparisons(metrics=["accuracy"]), st.randoms(use_true_random=False))
@some
def test_tables_do_not_depend_on_the_order_of_items(found, random):
    orders = {task: list(range(len(items))) for task, items in found.results["unchanged"].items()}
    for order in orders.values():
        random.shuffle(order)
    mixed = {
        variant: {task: [items[row] for row in orders[task]] for task, items in by_task.items()}
        for variant, by_task in found.results.items()
    }
    other = Comparison(mixed, found.tasks, found.provenance, found.resamples, found.seed)
    assert table_rows(other) == table_rows(found)
    assert csv_latex.csv_text(other.summary()) == csv_latex.csv_text(found.summary())
    for task, variant in itertools.product(found.tasks, found.variants[1:]):
        first, second = (changes_by_tag(one, task, variant).tags for one in (found, other))
        assert sorted(map(repr, first)) == sorted(map(repr, second))  # where NaN is NaN
        key = {one.id: one for one in flips(found, task, variant)}
        assert {one.id: one for one in flips(other, task, variant)} == key


@given(comparisons())
@some
def test_saved_comparisons_come_back_as_they_were(found):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_text(results_json(found), "utf-8")
        loaded = load_comparison(folder)
    assert loaded.results == found.results
    assert loaded.tasks == found.tasks
    assert table_rows(loaded) == table_rows(found)
    for made in (csv_latex.csv_text, csv_latex.latex_tables):
        assert made(loaded.summary()) == made(found.summary())
    assert results_json(loaded) == results_json(found)


@dataclass(frozen=True)
class Numbers(ItemTask):
    """Scores a number by its parity; the run dies after a number of parts."""

    group: str = "arithmetic"
    metric: str = "accuracy"
    chance: float = 0.0

    def run(self, lm, advance):
        if LEFT[0] == 0:
            raise KeyboardInterrupt
        LEFT[0] -= 1
        return [ItemResult(str(one), {"accuracy": float(one % 2)}) for one in self.items]


LEFT = [-1]


class Nothing:
    """An intervention that does nothing."""

    def attach(self, model):
        return self

    def remove(self):
        pass

    def describe(self):
        return {"kind": "nothing"}


@given(
    st.lists(st.lists(st.integers(0, 10**9), min_size=1, max_size=12), min_size=1, max_size=3),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(1, 5),
)
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_interruptions_and_parts_change_nothing(lm, rows, deaths, part):
    tasks = [Numbers(f"task {i}", items) for i, items in enumerate(rows)]
    LEFT[0] = -1
    whole = compare(lm, {"same": Nothing()}, tasks, resamples=10, progress=False)
    wanted = {"accuracy"}
    for task, items in zip(tasks, rows):
        got = whole.results["same"][task.name]
        assert [one.id for one in got] == [str(one) for one in items]
        assert {name for one in got for name in one.scores} == wanted
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "PART", part)
        for death in [*deaths, -1]:
            LEFT[0] = death
            try:
                found = compare(
                    lm, {"same": Nothing()}, tasks, resamples=10, journal=folder, progress=False
                )
            except KeyboardInterrupt:
                continue
    assert results_json(found) == results_json(whole)


# Files of a report


class Elements(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.inside, self.data = [], None, {}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside = dict(attributes).get("id", tag)
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, text):
        self.data[self.inside] = self.data.get(self.inside, "") + text


def parsed(text):
    found = Elements()
    found.feed(text)
    found.close()
    return found


@given(comparisons())
@some
def test_pages_show_any_text_as_text(found):
    text = page.html_page(found.summary(), flip_list(found), [])
    elements = parsed(text)
    assert elements.tags.count("script") == 2
    assert len(re.findall("<script", text, re.IGNORECASE)) == 2
    assert len(re.findall("</script", text, re.IGNORECASE)) == 2
    assert "<!--" not in text
    assert "b" not in elements.tags
    data = json.loads(elements.data["flip-data"])
    assert data["tasks"] == list(found.tasks)
    assert data["variants"] == found.variants[1:]
    listed = [flips(found, task, variant) for task in found.tasks for variant in found.variants[1:]]
    whole = [one for some in listed for one in some]
    assert len(data["flips"]) == len(whole)
    for (place, _, gained, parts), flip in zip(data["flips"], whole):
        after = "".join(part for where, part in parts if where != 1)
        task, key, prompt, expected, before = data["items"][place]
        assert (key, data["shared"][task] + prompt) == (flip.id, flip.prompt)
        assert (expected, before, after) == (flip.expected, flip.before, flip.after)
        assert gained == flip.gained


def in_cell(name):
    """A name as a spreadsheet shows it, which takes none for a formula."""
    text = visible(name)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


@given(comparisons())
@some
def test_csv_returns_names_and_numbers(found):
    rows = list(csv.DictReader(io.StringIO(csv_latex.csv_text(found.summary()), newline="")))
    cells = found.cells()
    written = [(row["variant"], row["task"]) for row in rows]
    assert written == [(in_cell(one.variant), in_cell(one.task)) for one in cells]
    for row, cell in zip(rows, cells):
        assert float(row["score"]) == pytest.approx(cell.value.value, rel=1e-15, nan_ok=True)
        assert None not in row
        assert int(row["n"]) == cell.value.n


ESCAPED = re.compile(
    r"\\text(?:backslash|asciicircum|asciitilde|less|greater|bar)\{\}|\\[{}$&#%_]|\{[][*]\}"
)


@given(texts)
@some
def test_latex_escapes_leave_nothing_special(text):
    plain = ESCAPED.sub("", csv_latex.escape_latex(text))
    assert not set(plain) & set("\\{}$&#%_^~<>|[]*")
    assert "\n" not in plain
    letters = [one for one in visible(text) if one.isalnum()]
    assert [
        one for one in ESCAPED.sub("", csv_latex.escape_latex(text)) if one.isalnum()
    ] == letters


@given(comparisons())
@some
def test_tables_keep_their_columns(found):
    summary = found.summary()
    rows = csv_latex.latex_tables(summary).split("\n")
    for begin in [i for i, row in enumerate(rows) if row.startswith(r"\begin{tabular}")]:
        columns = rows[begin].count("c}") and len(re.search(r"\{l(c+)\}", rows[begin])[1]) + 1
        for row in itertools.takewhile(lambda one: one != r"\end{tabular}", rows[begin + 1 :]):
            if "&" in row and not row.startswith(r"\multicolumn"):
                assert len(re.findall(r"(?<!\\)&", row)) + 1 == columns
    for task in found.tasks:
        table = tables.task_table(summary, task)
        for line in tables.markdown_table(table):
            cells = re.split(r"(?<!\\)(?:\\\\)*\|", line)
            assert len(cells) == len(table.head) + 2
            assert "\n" not in line


@given(comparisons())
@settings(max_examples=4, deadline=None, derandomize=True)
def test_figures_take_any_name(found):
    for figure in retained_figures(found.summary()):
        assert figure.picture.png.startswith(b"\x89PNG")


DRAWN = [
    "",
    "   ",
    "$",
    "$x_1$ and $\\frac$",
    "\rcarriage",
    "\u2028\x00\x1b",
    "long " * 80,
    "x" * 300,
]


@pytest.mark.parametrize("name", DRAWN)
def test_figures_take_nasty_names(name):
    items = [ItemResult(f"{name}/{row}", {"accuracy": 1.0}) for row in range(30)]
    results = {variant: {name: items} for variant in ("unchanged", name)}
    found = Comparison(results, {name: TaskInfo(name, "accuracy")}, resamples=10)
    figures = retained_figures(found.summary())
    assert len(figures) == 2
    change = changes_by_tag(found, name, name)
    positions = [TaskPosition(name, "other", *[Estimate(0.1, 0.05, 0.2, 9)] * 2)] if name else []
    pictures = [one.picture for one in figures]
    pictures += [tag_bars(change), two_sided_spectrum(positions, "title")]
    pictures.append(pareto_fronts(found, {name: [(1.0, name)]}, name, name, ("x", "y")))
    for picture in pictures:
        assert picture.png.startswith(b"\x89PNG")
        ElementTree.fromstring(picture.svg)  # well-formed
    if "frac" in name:  # what looks like mathematics is shown literally
        assert [b"$x_1$" in picture.svg for picture in pictures] == [True] * 5
