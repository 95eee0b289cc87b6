"""A report whose names, files and pictures are a stranger's."""

import csv
import json
import logging
import os
import re
import warnings
from dataclasses import replace

import pytest
from command_line import run
from made_up import drawn, made_up

from lirefs.cli.options import print_result, say_on_console
from lirefs.comparison import write_report
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.report import write
from lirefs.comparison.results_file import load_comparison
from lirefs.errors import LirefsError, ResultsFileError, SettingError, visible
from lirefs.files import in_markdown, read_regular
from lirefs.main_job.console import SafeConsole, console_table
from lirefs.pictures import canvas_of, check_picture, picture_of

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What no output may hold."""
ESCAPES = "\x1b[2J\x1b]8;;http://evil\x07 \x9b31m \u202egnp.exe \u2066x \r\x85"
NAMES = [
    f"=1+1{ESCAPES}", "@sum", "+cmd|' /C calc'!A0", "-2+3", "\ttab", "[click](javascript:alert(1))",
    "![x](http://evil/a.png)", "<script>alert(1)</script>", "`code` **bold** _it_ ~~gone~~ $x$",
    "a|b", "\\input{evil} \\\\ %", "# heading", "[bold]rich[/bold] :cow:", "&lt;b&gt;",
]  # fmt: skip


def named():
    """A comparison in which every name is a stranger's."""
    found = made_up(tasks=3, variants=2, items=4)
    tasks = dict(zip(found.tasks, NAMES[:3], strict=True))
    variants = dict(zip(found.variants, ["unchanged", NAMES[5], NAMES[7]], strict=True))
    results = {
        variants[variant]: {tasks[task]: items for task, items in by_task.items()}
        for variant, by_task in found.results.items()
    }
    infos = {tasks[task]: replace(one, group=NAMES[8]) for task, one in found.tasks.items()}
    infos[tasks["texts"]] = replace(infos[tasks["texts"]], group="language")
    provenance = {"model_name": NAMES[6], "findings": NAMES, NAMES[3]: ESCAPES}
    about = {"started": ESCAPES, "command": NAMES[8], "seconds": 1}
    notes = tuple(NAMES)
    return Comparison(results, infos, provenance, 20, 0, ESCAPES + NAMES[5], notes, about)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    figure = Figure("x) ![](http", NAMES[5], "\n\n".join(NAMES), drawn())
    write_report(named(), folder, [figure])
    return folder


def test_nothing_that_acts_reaches_a_file(report):
    for name in ("report.md", "report.html", "results.csv", "overview.tex", "results.json"):
        assert not ACTS.search((report / name).read_text("utf-8")), name


def test_no_cell_of_the_csv_is_a_formula(report):
    with (report / "results.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any(cell.startswith("'=1+1") for cell in cells)
    for cell in cells:
        number = re.fullmatch(r"[-+]?([\d.]+(e[-+]?\d+)?|inf|nan)", cell)
        assert number or not cell.startswith(("=", "+", "-", "@", "\t", "\n")), cell


def test_no_name_is_markdown(report):
    text, settings = (report / "report.md").read_text().split("## Settings")
    for markup in ("](", "<script", "**bold**", "_it_", "`code`", "~~g", "$x$", "&lt;"):
        found = re.findall(rf"(?<!\\){re.escape(markup)}[^ \n]*", text)
        assert found == (["](x%29%20%21%5B%5D%28http.png)"] if markup == "](" else [])
    assert "\n# heading" not in text
    assert len(re.findall("^```", settings, re.MULTILINE)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_is(name):
    shown = in_markdown(name)
    assert re.sub(r"\\([\\`|$<\]*~_&>+#-])", r"\1", shown) == " ".join(visible(name).split())


def test_plain_texts_stay_as_they_are():
    for text in ("p < 0.05 *", "50 % [0, 5] of mlp_in", "-1.5", "-", "a - b", "K-FAC (n = 3)"):
        assert in_markdown(text) == text


def test_latex_prints_names(report):
    text = (report / "overview.tex").read_text()
    assert r"\input" not in text
    assert r"\textbackslash{}u001b" in text


class Terminal:
    """A terminal, as far as rich asks."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("name", [*NAMES, ESCAPES])
def test_the_terminal_shows_names_as_they_are(name, monkeypatch, capsys):
    shown = Terminal()
    console = SafeConsole(file=shown, width=200, force_terminal=True, color_system=None)
    table = console_table(name, title=name)
    table.add_row(name)
    console.print(name, table)
    console.rule(name)
    monkeypatch.setattr("lirefs.cli.options.console", SafeConsole(stderr=True, width=400))
    say_on_console(name)
    print_result({name: name}, name, as_json=True)
    said = capsys.readouterr()
    for text in (shown.text, said.err, said.out):
        assert not ACTS.search(text)
    assert json.loads(said.out) == {name: name}
    assert visible(name).strip().partition("\n")[0][:20].split()[0] in shown.text


def test_errors_logs_and_warnings_act_on_no_terminal(tmp_path, monkeypatch, capsys):
    assert not ACTS.search(str(SettingError(ESCAPES)))
    assert not ACTS.search(str(LirefsError(ESCAPES)))
    assert run(monkeypatch, "report", tmp_path / "\x1b[2J\u202e") == 2
    assert not ACTS.search(capsys.readouterr().err)


def test_what_libraries_log_acts_on_no_terminal(monkeypatch, capsys, caplog):
    made, formatted = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        assert run(monkeypatch, "--version") == 0
        logging.getLogger("a.library").warning("name %s", ESCAPES)
        assert "name \\u001b[2J" in caplog.text
        assert not ACTS.search(caplog.text)
        assert not ACTS.search(warnings.formatwarning(f"name {ESCAPES}", UserWarning, "x.py", 1))
    finally:
        logging.setLogRecordFactory(made)
        warnings.formatwarning = formatted


@pytest.fixture
def strange(report, tmp_path):
    for name in ("results.json", "x) ![](http.png", "x) ![](http.svg"):
        (tmp_path / name).write_bytes((report / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["results.json", "x) ![](http.png", "x) ![](http.svg"])
def test_only_regular_files_of_a_strangers_folder_are_read(name, strange, monkeypatch):
    monkeypatch.setattr(write, "retained_figures", lambda summary: [])
    summary = named().summary()
    place, secret = strange / name, strange / "secret"
    place.rename(secret)
    for make, says in (
        (lambda: place.symlink_to(secret), "it is a link"),
        (lambda: place.symlink_to("/dev/zero"), "it is a link"),
        (lambda: place.symlink_to("nowhere"), "it is a link"),
        (lambda: os.mkfifo(place), "not a regular file"),
    ):
        make()
        with pytest.raises(ResultsFileError, match=says):
            write.load_report_figures(strange, summary)
        place.unlink()


@pytest.mark.parametrize("name", ["results.json", "x) ![](http.png", "x) ![](http.svg"])
def test_files_that_are_too_large(name, strange, monkeypatch):
    monkeypatch.setattr(write, "retained_figures", lambda summary: [])
    os.truncate(strange / name, (2 << 30) + 1)
    with pytest.raises(ResultsFileError, match="2,147,483,649 bytes, more than"):
        write.load_report_figures(strange, named().summary())


def test_a_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, more than 4"):
        read_regular(tmp_path / "a", 4)


def test_a_picture_is_a_picture():
    canvas, (axis,) = canvas_of(1, (2, 2))
    axis.plot([0, 1], [1, 0])
    axis.imshow([[0, 1]])
    whole = picture_of(canvas)
    for one in (drawn(), whole, picture_of(canvas, dark=True)):
        check_picture(one)
    png = whole.png
    end = b"\0\0\0\0IEND\xaeB`\x82"
    flipped = png[:50] + bytes([png[50] ^ 1]) + png[51:]
    for wrong in (b"", b"\x89PNG", png[:60], flipped, png[:33] + end, b"GIF89a"):
        with pytest.raises(ValueError, match="not a PNG"):
            check_picture(replace(whole, png=wrong))
    huge = png[:16] + (50_000).to_bytes(4, "big") * 2 + png[24:]
    with pytest.raises(ValueError, match="PNG"):
        check_picture(replace(whole, png=huge))


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        "<g onload='alert(1)'/>",
        "<foreignObject/>",
        "<image xlink:href='http://evil/a.png'/>",
        "<image href='file:///etc/passwd'/>",
        "<use href='other.svg#a'/>",
        "<a href='http://evil'/>",
        "<style>@import 'http://evil'</style>",
        "<style>* {fill: url(http://evil)}</style>",
        "<rect style='fill: url(\"http://evil\")'/>",
        "<set attributeName='href'/>",
        "<image href='data:image/svg+xml;base64,AA'/>",
        "<?xml-stylesheet href='http://evil'?>",
        "<g>",
    ],
)
def test_a_drawing_does_nothing_else(inside):
    svg = f"<svg xmlns:xlink='http://www.w3.org/1999/xlink'>{inside}</svg>".encode()
    with pytest.raises(ValueError, match="SVG"):
        check_picture(replace(drawn(), svg=svg))


def test_a_drawing_declares_no_entities():
    bomb = b"<!DOCTYPE svg [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><svg><text>&b;</text></svg>"
    with pytest.raises(ValueError, match="entities"):
        check_picture(replace(drawn(), svg=bomb))


def test_a_strange_report_is_written_again(strange, monkeypatch, capsys):
    assert run(monkeypatch, "report", strange) == 0
    assert not ACTS.search(capsys.readouterr().err)
    assert load_comparison(strange).title.startswith("\x1b")
