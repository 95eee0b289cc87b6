import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from command_line import run
from made_up import NASTY, SHARED, made_up

from lirefs import pictures as plots
from lirefs.comparison import results_file as storage
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.figures import retained as retained_plots
from lirefs.comparison.item_changes import flips
from lirefs.comparison.report import exports, page, tables
from lirefs.comparison.report import write as report
from lirefs.errors import ResultsFileError
from lirefs.pictures import Picture
from lirefs.tasks.task import CONFLICT


@pytest.fixture(scope="module")
def comparison():
    return made_up()


class Page(HTMLParser):
    """Elements of a page with what they contain, and what a script element holds by its id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._open = dict(attrs).get("id", "")

    def handle_data(self, data):
        if self._open is not None:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def handle_endtag(self, tag):
        if tag == "script":
            self._open = None

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_flips_are_the_items_whose_score_changes(comparison):
    task, variant = "task 1 of arithmetic", "variant A"
    before, after = comparison.results["unchanged"][task], comparison.results[variant][task]
    found = flips(comparison, task, variant)
    assert [one.id for one in found] == [
        a.id for a, b in zip(before, after) if a.scores["accuracy"] != b.scores["accuracy"]
    ]
    assert sum(one.gained - (not one.gained) for one in found) == pytest.approx(
        20 * comparison.cell(variant, task).difference.value
    )
    for one in found:
        assert one.after == one.expected if one.gained else one.before == one.expected
    assert flips(comparison, "texts", variant) == []  # perplexity is neither right nor wrong
    assert flips(comparison, task, "unchanged") == []


def test_the_page_is_whole_labelled_and_alone(comparison):
    text = page.html(comparison, report.default_figures(comparison))
    found = Page(text)
    assert len(found.all("script")) == 2
    assert found.all("table")
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(one["src"].startswith("data:image/png;base64,") for one in found.all("img"))
    assert all(one["alt"] for one in found.all("img"))
    assert len(found.all("label")) == len(found.all("select")) + len(found.all("input")) == 4
    outside = [
        one for one in ("href", "src") for _, a in found.elements if a.get(one, "#")[0] != "#"
    ]
    assert len(outside) == len(found.all("img"))
    assert not found.all("link")
    assert "http" not in text.replace("http-equiv", "").replace("httpx", "")
    policy = next(one for one in found.all("meta") if one.get("http-equiv"))
    assert policy["content"].startswith("default-src 'none'")


def test_no_text_of_an_item_breaks_out(comparison):
    found = Page(page.html(comparison, []))
    assert not [one for _, one in found.elements if one.get("id") == "broken"]
    data = json.loads(found.scripts["flip-data"])
    assert "<" not in found.scripts["flip-data"]
    assert data["shared"][0] == SHARED
    prompts = {item[2] for item in data["items"] if item[0] == 0}
    assert prompts
    assert all(re.fullmatch(r"Question \d+: what\? " + re.escape(NASTY), one) for one in prompts)


def test_the_page_has_every_flip_up_to_a_bound(comparison, monkeypatch):
    def shown():
        text = page.html(comparison, [])
        data = json.loads(Page(text).scripts["flip-data"])
        rows = [
            (data["tasks"][data["items"][item][0]], data["variants"][variant],
             data["items"][item][1], bool(gained), after)
            for item, variant, gained, after in data["flips"]
        ]  # fmt: skip
        return rows, text

    every = [
        (task, variant, one.id, one.gained, one.after)
        for task in comparison.tasks
        for variant in comparison.variants[1:]
        for one in flips(comparison, task, variant)
    ]
    rows, text = shown()
    assert rows == every
    assert "left out;" not in text
    assert len(every) > 12
    monkeypatch.setattr(page, "MOST_FLIPS", 12)
    rows, text = shown()
    assert 0 < len(rows) <= 12
    assert set(rows) < set(every)
    assert f"{len(every) - len(rows)} are left out" in text


def test_long_texts_are_cut_and_say_so(monkeypatch, comparison):
    monkeypatch.setattr(page, "MOST_LETTERS", 10)
    assert page._cut("a" * 8 + "b" * 8) == "aaaaa [... 6 letters left out ...] bbbbb"


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([SHARED + "a", SHARED + "b"], SHARED),
        ([SHARED + "same line a", SHARED + "same line b"], SHARED),
        (["short\na", "short\nb"], ""),
        ([SHARED + "only one"], ""),
        ([SHARED, SHARED], SHARED),
    ],
)
def test_shared_beginning(prompts, expected):
    assert page.shared_beginning(prompts) == expected


def test_only_what_holds_after_the_adjustment_is_marked(comparison):
    table = tables.of_task(comparison, "task 1 of arithmetic")
    assert table.marked == {1}
    column = table.head.index("p (Holm)")
    assert [row[column].text for row in table.rows] == ["-", "< 0.001 *", "0.800"]
    assert f"p (Holm) < {tables.LEVEL:g}" in tables.LEGEND
    unset = Comparison(comparison.results, comparison.tasks, resamples=50)
    assert not any(map(tables.clear, [unset.cell("unchanged", task) for task in unset.tasks]))


def test_conflicts_retain_nothing(comparison):
    task = next(name for name, info in made_up(8).tasks.items() if info.group == CONFLICT)
    more = made_up(8)
    table = tables.of_task(more, task)
    assert {row[table.head.index("retained [95 %]")].text for row in table.rows} == {"-"}
    rows = list(csv.DictReader(exports.csv_text(more).splitlines()))
    assert {row["retained"] for row in rows if row["task"] == task} == {""}
    assert task not in exports.latex(more)


def test_csv_has_every_number_of_every_cell(comparison):
    rows = list(csv.DictReader(exports.csv_text(comparison).splitlines()))
    assert len(rows) == len(comparison.cells())
    for row, cell in zip(rows, comparison.cells()):
        assert (row["variant"], row["task"], row["group"]) == (cell.variant, cell.task, cell.group)
        for name, one in (("score", cell.value), ("difference", cell.difference)):
            ends = [row[f"{name}{end}"] for end in ("", "_low", "_high")]
            assert ends == (
                ["", "", ""] if one is None else [*map(str, (one.value, one.low, one.high))]
            )
        for name in ("p", "p_holm", "detectable"):
            value = getattr(cell, name)
            assert row[name] == ("" if value is None else str(value))
        assert (int(row["n"]), int(row["unparsable"])) == (cell.value.n, cell.unparsable)


def test_latex_is_balanced_and_escaped():
    found = made_up()
    nasty = r"[a_b] & 50% of $x^2$ {~} \ # <>"
    named = {
        (nasty if variant == "variant A" else variant): items
        for variant, items in found.results.items()
    }
    text = exports.latex(Comparison(named, found.tasks, resamples=50))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    plain = re.sub(r"\\[\\{}$&#%_]", "", text)
    depth = 0
    for letter in plain:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    columns = [line.count("&") for line in re.sub(r"\\&", "", text).split("\n") if "&" in line]
    assert set(columns) == {5, 2}  # groups of one table, variants of the other
    assert r"{[}a\_b{]} \& 50\% of" in text
    starts = [line.lstrip()[:1] for line in text.split("\n")]
    assert "[" not in starts
    assert "*" not in starts


def test_markdown_keeps_its_columns():
    found = made_up()
    named = {("a | b" if v == "variant A" else v): items for v, items in found.results.items()}
    text = report.markdown(Comparison(named, found.tasks, resamples=50), [])
    assert r"a \| b" in text
    table = [line for line in text.split("\n") if line.startswith("|")]
    overview = table[: len(found.variants) + 1]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in overview}) == 1


def test_figures_are_the_same_bytes_and_readable(comparison):
    first, second = (report.default_figures(comparison) for _ in range(2))
    assert [one.name for one in first] == ["retained", "retained_tasks"]
    assert first == second
    values = np.geomspace(1, 1e-6, 40)
    curve = np.stack([np.geomspace(1e-4, 1, 9), np.linspace(0.1, 1, 9)], axis=1)
    spectra = [
        plots.Spectrum(f"layers.{i}.up", values, values, values * 40, curve, 0.9) for i in range(9)
    ]
    for picture, words in (
        (first[0].picture, "variant A"),
        (first[1].picture, "variant A"),
        (plots.curvature_spectrum(spectra), "layers.4.up"),
    ):
        svg = picture.svg.decode()
        assert picture.png.startswith(b"\x89PNG")
        assert words in svg  # text is text
        width = float(re.search(r'width="([\d.]+)pt"', svg).group(1))
        assert width <= 72 * plots.WIDE + 1e-6
        sizes = [float(one) for one in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
        assert min(sizes) >= plots.SMALL


def test_names_in_a_legend_keep_what_differs():
    assert plots._apart(["a.0.up", "a.1.up"]) == ["0", "1"]
    assert plots._apart(["a.0.up", "a.1.down"]) == ["0.up", "1.down"]
    assert plots._apart(["a.0.up"]) == ["a.0.up"]
    assert plots._apart(["a", "a.b"]) == ["a", "a.b"]


@pytest.mark.parametrize(("tasks", "variants"), [(5, 1), (12, 4), (40, 10)])
def test_no_text_of_the_task_figure_overlaps_at_any_size(tasks, variants, monkeypatch):
    canvases = []
    real = retained_plots.picture_of
    monkeypatch.setattr(
        retained_plots, "picture_of", lambda canvas: canvases.append(canvas) or real(canvas)
    )
    found = made_up(tasks, variants)
    retained_plots.by_task(found)
    (canvas,) = canvases
    assert canvas.get_size_inches()[1] < 10  # one page
    boxes = []
    for axis in canvas.axes:
        texts = [axis.title, *axis.get_xticklabels(), *axis.get_yticklabels()]
        boxes += [(one.get_text(), one.get_window_extent()) for one in texts if one.get_text()]
    for k, (name, box) in enumerate(boxes):
        assert box.x0 >= 0, name
        assert box.x1 <= canvas.bbox.x1, name
        assert box.y1 <= canvas.bbox.y1, name
        for other, another in boxes[:k]:
            assert not box.overlaps(another), (name, other)


def test_a_comparison_without_variants_has_a_report(tmp_path):
    found = made_up()
    alone = Comparison({"unchanged": found.results["unchanged"]}, found.tasks, resamples=50)
    assert alone.save(tmp_path).exists()
    assert not (tmp_path / "retained.png").exists()


def saved(folder):
    """A report with a figure that no comparison draws by itself."""
    comparison = made_up(ratio=math.inf, pairs=(1, 2))
    own = report.Figure("own", "Own", "A figure.", Picture(b"\x89PNG own", b"<svg>own</svg>"))
    figures = [own, *report.default_figures(comparison)]
    comparison.save(folder, figures)
    return folder


@pytest.fixture
def _tested(monkeypatch):
    """Loaded comparisons have the p values of those that were made up."""
    from made_up import with_tests

    real = Comparison.load
    monkeypatch.setattr(Comparison, "load", classmethod(lambda _, path: with_tests(real(path))))


@pytest.mark.usefixtures("_tested")
def test_report_writes_the_same_again_without_a_model(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "first")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("lirefs.load", None)  # would fail
    for name in before:
        if name not in ("results.json", "own.png", "own.svg"):
            (folder / name).unlink()
    assert run(monkeypatch, "report", folder) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "left out" not in capsys.readouterr().err
    assert run(monkeypatch, "report", folder / "results.json", "--out", tmp_path / "new") == 0
    again = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert again == {name: data for name, data in before.items() if name != "results.json"}


def test_report_says_which_figures_are_missing(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path)
    (folder / "own.svg").unlink()
    results = (folder / "results.json").read_bytes()
    assert run(monkeypatch, "report", folder) == 0
    assert "own.svg" in capsys.readouterr().err
    text = (folder / "report.html").read_text()
    assert "A figure." not in text
    assert (folder / "results.json").read_bytes() == results


def test_report_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "report")
    assert run(monkeypatch, "report", tmp_path / "absent") == 2
    assert "ResultsFileError" in capsys.readouterr().err
    assert run(monkeypatch, "report", folder, "--out", folder / "results.json") == 2
    assert "SettingError" in capsys.readouterr().err
    data = json.loads((folder / "results.json").read_text())
    for figures, words in (
        ([{"name": "../up", "title": "", "caption": ""}], "not the name"),
        ([{"name": "", "title": "", "caption": ""}], "not the name"),
        ([{"name": "..", "title": "", "caption": ""}], "not the name"),
        ([{"name": "x" * 10_000, "title": "", "caption": ""}], "not the name"),
        ([{"name": "a\x00", "title": "", "caption": ""}], "not the name"),
        ([{"name": "own", "title": 1, "caption": ""}], "no text"),
        ([{"name": "\u0142" * 190, "title": "", "caption": ""}], "cannot be read"),
        ([{"title": "t"}], "list of figures is damaged"),
        (None, "list of figures is damaged"),
    ):
        (folder / "results.json").write_text(json.dumps({**data, "figures": figures}))
        with pytest.raises(ResultsFileError, match=words):
            report.load_figures(folder, made_up())
    (folder / "results.json").write_text(json.dumps(data))
    (folder / "own.png").write_bytes(b"no picture")
    with pytest.raises(ResultsFileError, match="no PNG"):
        report.load_figures(folder, made_up())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(resamples=10**9), "resamples"),
        (lambda data: data.update(resamples=True), "resamples"),
        (lambda data: data.update(seed=0.5), "seed"),
        (lambda data: data.update(provenance=[]), "provenance"),
        (lambda data: data["provenance"].update(findings="all"), "findings"),
        (lambda data: data["tasks"]["texts"].update(metric=1), "no text"),
        (lambda data: data["tasks"]["texts"].update(chance=2), "chance"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(weight=-1), "weighs"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(weight=10**400), "digits"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(prompt=None), "another type"),
        (lambda data: data["results"]["unchanged"]["texts"][0].update(parsed=1), "another type"),
        (lambda data: data["results"]["unchanged"]["texts"][0].update(scores={"nll": "1"}), "are"),
        (lambda data: data.update(results=dict(reversed(data["results"].items()))), "first place"),
    ],
)
def test_results_that_make_no_sense_are_refused(tmp_path, change, says):
    data = json.loads(storage.dumps(made_up()))
    change(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(ResultsFileError, match=says):
        Comparison.load(tmp_path)


def test_results_nested_too_deep_are_refused(tmp_path):
    text = storage.dumps(made_up()).replace('"made up"', "[" * 450 + "]" * 450)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsFileError, match="deeper than 300"):
        Comparison.load(tmp_path)


def test_every_setting_is_on_the_page(comparison):
    settings = json.loads(page.settings(comparison))
    assert settings["nested"] == {"keep": {"a": 0.5}}
    assert settings["bootstrap"] == {"resamples": 50, "seed": 0}
    text = page.html(comparison, [])
    assert "nested / keep / a" in text
    assert "0" * 64 in text
