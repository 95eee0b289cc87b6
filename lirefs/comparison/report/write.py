"""The report of a comparison as a folder of files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from urllib.parse import quote

from lirefs.comparison import results_file
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.retained import retained_figures
from lirefs.comparison.report import csv_latex, page, tables
from lirefs.comparison.report.flip_list import flip_list
from lirefs.comparison.report.verdict import verdict
from lirefs.comparison.report.words import words_used
from lirefs.comparison.summary import Summary
from lirefs.errors import ResultsFileError, SettingError, must_be
from lirefs.files import atomic_write_text, in_markdown, read_regular, refuse_foreign
from lirefs.pictures import MOST_BYTES, Picture, check_picture

PAGES = ("results.csv", "overview.tex", "report.md", "report.html")
"""What a report consists of, in addition to `results.json` and its figures."""
TABLE = "variant,task,group,metric,chance,above_chance,n,"
"""How `results.csv` begins."""


def write_report(
    comparison: Comparison, folder: str | Path, figures: Sequence[Figure] | None = None
) -> Path:
    """Write the report: `report.html`, `report.md`, `results.json`, CSV, LaTeX and figures.

    The page needs no other file. `results.json` has every item; `results.csv` a row for each
    cell; `overview.tex` tables for a paper; figures are PNG and SVG.

    Args:
        comparison: What to report.
        folder: Created when missing; the files of an earlier report in it are replaced.
        figures: Figures to show; None for retained performance by group and by task.

    Returns:
        The path of `report.html`.

    Raises:
        SettingError: The folder holds files of these names and no report of a comparison, or two
            figures have one name.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> sums = [(f"{a}", f"Math: {a} + 27 =", str(a + 27)) for a in range(20, 50)]
        >>> task = lirefs.ShortAnswer("sums", sums, group="arithmetic")
        >>> comparison = lirefs.compare(lm, {}, [task], progress=False)
        >>> lirefs.write_report(comparison, "report")
        PosixPath('report/report.html')
    """
    must_be(comparison, Comparison, "comparison")
    must_be(folder, (str, PathLike), "folder")
    folder = Path(folder)
    shown = retained_figures(comparison.summary()) if figures is None else figures
    files = [file for one in shown for file in one.files]
    # Two names that differ in case alone are one file on some systems.
    for name, times in Counter(map(str.casefold, files)).items():
        if times > 1:
            raise SettingError(f"two figures would be written to {name}; give each its own name")
    refuse_foreign(folder / "results.json", results_file.FORMAT, [*PAGES, *files])
    text = results_file.results_json(comparison, shown, comparison.run)
    atomic_write_text(folder / "results.json", text)
    return write_pages(comparison, folder, shown)


def write_pages(
    comparison: Comparison, folder: Path, figures: Sequence[Figure], left_out: Sequence[str] = ()
) -> Path:
    """Write everything of a report except `results.json`: see `write_report`.

    `left_out` names the pictures that are not shown, and says why.
    """
    summary = comparison.summary()
    for figure in figures:
        figure.save(folder)
    atomic_write_text(folder / "results.csv", csv_latex.csv_text(summary))
    atomic_write_text(folder / "overview.tex", csv_latex.latex_tables(summary))
    atomic_write_text(folder / "report.md", markdown_report(summary, figures, left_out))
    text = page.html_page(summary, flip_list(comparison), figures, left_out)
    atomic_write_text(folder / "report.html", text)
    return folder / "report.html"


def load_report_figures(path: Path, summary: Summary) -> tuple[list[Figure], list[str]]:
    """The figures of a saved report, and which are left out and why.

    The default figures are drawn again. Others are read from their files, and left out where one is
    missing, or is not the file that the report was written with: its SHA-256 differs.

    Raises:
        ResultsFileError: The list of figures is damaged, or a figure cannot be read.
    """
    file = results_file.results_path(path)
    again = {one.name: one for one in retained_figures(summary)}
    figures, left_out = [], []
    for listed, digests in results_file.figures_in_results(file):
        if one := again.get(listed["name"]):
            figures.append(one)
            continue
        png, svg = (file.parent / f"{listed['name']}.{kind}" for kind in ("png", "svg"))
        try:
            # Also where a link leads nowhere, there is one.
            absent = [one.name for one in (png, svg) if not (one.is_symlink() or one.exists())]
            if absent:
                left_out += [f"{name} is not in the folder of the results" for name in absent]
                continue
            picture = Picture(read_regular(png, MOST_BYTES), read_regular(svg, MOST_BYTES))
            check_picture(picture)
        except OSError as problem:
            raise ResultsFileError(
                f"{png} or .svg: cannot be read ({problem.strerror}); remove them, or compare again"
            ) from problem
        except ValueError as problem:
            raise ResultsFileError(
                f"{png.with_suffix('')}: {problem}; remove its files, or compare again"
            ) from problem
        figure = Figure(listed["name"], listed["title"], listed["caption"], picture)
        foreign = [
            kind for kind, found in figure.sha256.items() if digests.get(kind, found) != found
        ]
        left_out += [
            f"{figure.name}.{kind} is not the picture of this comparison (its SHA-256 differs)"
            for kind in foreign
        ]
        if not foreign:
            figures.append(figure)
    return figures, left_out


def markdown_report(
    summary: Summary, figures: Sequence[Figure], left_out: Sequence[str] = ()
) -> str:
    """The report as Markdown, which links to the files of the figures."""
    md, overview = in_markdown, tables.overview_table(summary)
    run = (f"{name}: {md(value)}" for name, value in tables.about_run(summary))
    lines = [f"# {md(summary.title)}", "", ", ".join(run), "", md(" ".join(verdict(summary)))]
    for note in summary.notes:
        lines += ["", md(note)]
    lines += ["", *(f"{name}: {md(', '.join(some))}  " for name, some in tables.legend(summary))]
    for table in (overview, *tables.equal_tables(summary)):
        lines += ["", f"## {md(table.name)}", "", md(table.note), "", *tables.markdown_table(table)]
    if summary.findings:
        lines += ["", "## Findings", ""]
        for finding in map(md, summary.findings):
            lines += ["", f"### {finding}", ""] if finding.endswith("?") else [f"* {finding}"]
        lines += ["", *(f"* **{word}**: {meaning}" for word, meaning in words_used(summary))]
    for figure in figures:
        picture = f"![{md(figure.title)}]({quote(figure.name)}.png)"
        lines += ["", f"## {md(figure.title)}", "", picture, "", md(figure.caption)]
    if left_out:
        lines += ["", md(f"Not shown: {'; '.join(left_out)}.")]
    lines += ["", "## Every task", "", tables.ADJUSTED, tables.STATISTICS, ""]
    for task, info in summary.tasks.items():
        table = tables.task_table(summary, task)
        about = "; ".join(filter(None, (info.group, table.note)))
        lines += ["", f"### {md(f'{table.name} ({about})')}", "", *tables.markdown_table(table)]
    settings = json.dumps(summary.settings, indent=1)  # pure ASCII, and no line is a fence
    lines += ["", "## Settings", "", "```json", settings, "```", ""]
    return "\n".join(lines)
