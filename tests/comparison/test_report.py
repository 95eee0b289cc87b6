import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from command_line import run
from made_up import NASTY, SHARED, drawn, made_up, with_tests

from lirefs import pictures
from lirefs.comparison import Comparison, Figure, flips, load_comparison, results_file, write_report
from lirefs.comparison.cell import LEVEL
from lirefs.comparison.figures import retained
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.report import csv_latex, flip_list, page, tables, write
from lirefs.comparison.report.words_diff import BEFORE
from lirefs.errors import ResultsFileError
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


def html_of(comparison):
    return page.html_page(comparison.summary(), flip_list.flip_list(comparison), [])


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
    summary = comparison.summary()
    text = page.html_page(summary, flip_list.flip_list(comparison), retained_figures(summary))
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
    found = Page(html_of(comparison))
    assert not [one for _, one in found.elements if one.get("id") == "broken"]
    data = json.loads(found.scripts["flip-data"])
    assert "<" not in found.scripts["flip-data"]
    assert data["shared"][0] == SHARED
    prompts = {item[2] for item in data["items"] if item[0] == 0}
    assert prompts
    assert all(re.fullmatch(r"Question \d+: what\? " + re.escape(NASTY), one) for one in prompts)


def test_the_page_has_every_flip_up_to_a_bound(comparison, monkeypatch):
    def shown():
        text = html_of(comparison)
        data = json.loads(Page(text).scripts["flip-data"])
        rows = [
            (data["tasks"][data["items"][item][0]], data["variants"][variant],
             data["items"][item][1], bool(gained),
             "".join(part for where, part in parts if where != BEFORE))
            for item, variant, gained, parts in data["flips"]
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
    monkeypatch.setattr(flip_list, "MOST_FLIPS", 12)
    rows, text = shown()
    assert 0 < len(rows) <= 12
    assert set(rows) < set(every)
    assert f"{len(every) - len(rows)} are left out" in text


def test_long_texts_are_cut_and_say_so(monkeypatch, comparison):
    monkeypatch.setattr(flip_list, "MOST_CHARACTERS", 10)
    assert flip_list._cut("a" * 8 + "b" * 8) == "aaaaa [... 6 characters left out ...] bbbbb"


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
    assert flip_list.shared_beginning(prompts) == expected


def test_only_what_holds_after_the_adjustment_is_marked(comparison):
    table = tables.task_table(comparison.summary(), "task 1 of arithmetic")
    assert table.marked == {1}
    column = table.head.index("p (Holm)")
    assert [row[column].text for row in table.rows] == ["-", "< 0.001 *", "0.800"]
    assert f"p (Holm) < {LEVEL:g}" in tables.STATISTICS
    unset = Comparison(comparison.results, comparison.tasks, resamples=50)
    assert not any(unset.cell("unchanged", task).clear for task in unset.tasks)


def test_conflicts_retain_nothing(comparison):
    task = next(name for name, info in made_up(8).tasks.items() if info.group == CONFLICT)
    more = made_up(8).summary()
    table = tables.task_table(more, task)
    assert {row[table.head.index("retained [95 %]")].text for row in table.rows} == {"-"}
    rows = list(csv.DictReader(csv_latex.csv_text(more).splitlines()))
    assert {row["retained"] for row in rows if row["task"] == task} == {""}
    assert task not in csv_latex.latex_tables(more)


def test_csv_has_every_number_of_every_cell(comparison):
    rows = list(csv.DictReader(csv_latex.csv_text(comparison.summary()).splitlines()))
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


def test_a_data_frame_has_the_numbers_of_the_csv(comparison):
    summary = comparison.summary()
    frame = summary.to_dataframe()
    rows = list(csv.DictReader(csv_latex.csv_text(summary).splitlines()))
    assert list(frame.columns) == list(rows[0])
    assert list(frame["score"]) == [float(row["score"]) for row in rows]
    assert list(frame["difference"].isna()) == [row["difference"] == "" for row in rows]


def test_latex_is_balanced_and_escaped():
    found = made_up()
    nasty = r"[a_b] & 50% of $x^2$ {~} \ # <>"
    named = {
        (nasty if variant == "variant A" else variant): items
        for variant, items in found.results.items()
    }
    text = csv_latex.latex_tables(Comparison(named, found.tasks, resamples=50).summary())
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
    text = write.markdown_report(Comparison(named, found.tasks, resamples=50).summary(), [])
    assert r"a \| b" in text
    table = [line for line in text.split("\n") if line.startswith("|")]
    overview = table[: len(found.variants) + 1]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in overview}) == 1


def test_figures_are_the_same_bytes_and_readable(comparison):
    first, second = (retained_figures(comparison.summary()) for _ in range(2))
    assert [one.name for one in first] == ["retained", "retained_tasks"]
    assert first == second
    for picture, words in (
        (first[0].picture, "variant A"),
        (first[1].picture, "variant A"),
    ):
        svg = picture.svg.decode()
        assert picture.png.startswith(b"\x89PNG")
        assert words in svg  # text is text
        width = float(re.search(r'width="([\d.]+)pt"', svg).group(1))
        assert width <= 72 * pictures.WIDE + 1e-6
        sizes = [float(one) for one in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
        assert min(sizes) >= pictures.SMALL


@pytest.mark.parametrize(("tasks", "variants"), [(5, 1), (12, 4), (40, 10)])
def test_no_text_of_the_task_figure_overlaps_at_any_size(tasks, variants, monkeypatch):
    canvases = []
    real = retained.picture_of
    monkeypatch.setattr(
        retained, "picture_of", lambda canvas: canvases.append(canvas) or real(canvas)
    )
    found = made_up(tasks, variants)
    retained.retained_by_task(found.summary())
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
    assert write_report(alone, tmp_path).exists()
    assert not (tmp_path / "retained.png").exists()


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    comparison = made_up(ratio=math.inf, pairs=(1, 2))
    own = Figure("own", "Own", "A figure.", drawn())
    write_report(comparison, folder, [own, *retained_figures(comparison.summary())])
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A report with a figure that no comparison draws by itself."""
    return shutil.copytree(saved_once, tmp_path / "saved")


@pytest.fixture
def _tested(monkeypatch):
    """Loaded comparisons have the p values of those that were made up."""
    monkeypatch.setattr(
        "lirefs.comparison.results_file.load_comparison",
        lambda path: with_tests(load_comparison(path)),
    )


@pytest.mark.usefixtures("_tested")
def test_report_writes_the_same_again_without_a_model(saved, tmp_path, monkeypatch, capsys):
    folder = saved
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


def test_report_says_which_figures_are_missing(saved, monkeypatch, capsys):
    folder = saved
    (folder / "own.svg").unlink()
    results = (folder / "results.json").read_bytes()
    assert run(monkeypatch, "report", folder) == 0
    assert "own.svg" in capsys.readouterr().err
    text = (folder / "report.html").read_text()
    assert "A figure." not in text
    assert (folder / "results.json").read_bytes() == results


def test_report_names_what_is_wrong(saved, tmp_path, monkeypatch, capsys):
    folder = saved
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
        ([{"name": "own", "title": 1, "caption": ""}], "not a string"),
        ([{"name": "\u0142" * 190, "title": "", "caption": ""}], "cannot be read"),
        ([{"title": "t"}], "list of figures is damaged"),
        (None, "list of figures is damaged"),
    ):
        (folder / "results.json").write_text(json.dumps({**data, "figures": figures}))
        with pytest.raises(ResultsFileError, match=words):
            write.load_report_figures(folder, made_up().summary())
    (folder / "results.json").write_text(json.dumps(data))
    (folder / "own.png").write_bytes(b"no picture")
    with pytest.raises(ResultsFileError, match="not a PNG"):
        write.load_report_figures(folder, made_up().summary())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(resamples=10**9), "resamples"),
        (lambda data: data.update(resamples=True), "resamples"),
        (lambda data: data.update(seed=0.5), "seed"),
        (lambda data: data.update(provenance=[]), "provenance"),
        (lambda data: data["provenance"].update(findings="all"), "findings"),
        (lambda data: data["tasks"]["texts"].update(metric=1), "not a string"),
        (lambda data: data["tasks"]["texts"].update(chance=2), "chance"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(weight=-1), "weight"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(weight=10**400), "digits"),
        (lambda data: data["tasks"]["texts"]["items"][0].update(prompt=None), "wrong type"),
        (lambda data: data["results"]["unchanged"]["texts"][0].update(parsed=1), "wrong type"),
        (lambda data: data["results"]["unchanged"]["texts"][0].update(scores={"nll": "1"}), "are"),
        (
            lambda data: data.update(results=dict(reversed(data["results"].items()))),
            "first variant",
        ),
    ],
)
def test_results_that_make_no_sense_are_refused(tmp_path, change, says):
    data = json.loads(results_file.results_json(made_up()))
    change(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(ResultsFileError, match=says):
        load_comparison(tmp_path)


def test_results_nested_too_deep_are_refused(tmp_path):
    text = results_file.results_json(made_up()).replace('"made up"', "[" * 450 + "]" * 450)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultsFileError, match="deeper than 300"):
        load_comparison(tmp_path)


def test_every_setting_is_on_the_page(comparison):
    settings = comparison.summary().settings
    assert settings["nested"] == {"keep": {"a": 0.5}}
    assert settings["bootstrap"] == {"resamples": 50, "seed": 0}
    text = html_of(comparison)
    assert "nested / keep / a" in text
    assert "0" * 64 in text
