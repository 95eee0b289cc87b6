"""The report of a comparison: what is written beside its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lirefs.comparison import results_file as storage
from lirefs.comparison.figures import retained as retained_plots
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.report import exports, page, tables
from lirefs.errors import ResultsFileError
from lirefs.files import atomic_write_text
from lirefs.pictures import Picture

if TYPE_CHECKING:
    from lirefs.comparison.comparison import Comparison


_PNG = b"\x89PNG"


def default_figures(comparison: Comparison) -> list[Figure]:
    """The figures that every comparison has: retained performance by task group and by task."""
    if len(comparison.variants) < 2 or not any(map(comparison.counted, comparison.groups)):
        return []  # nothing was changed, or there is nothing to retain
    drawn = (
        "Share of the unchanged model's score (line at 1: no change); for language, the unchanged "
        "perplexity over the variant's. Bars: 95 % intervals, paired over "
        "items. Arrows lie beyond the axis. Tasks on which the "
        "unchanged model is not above chance are left out"
    )
    return [
        Figure(
            "retained",
            "Retained performance by task group",
            f"Mean over the tasks of a group. {drawn}; n counts the items of the others.",
            retained_plots.by_group(comparison),
        ),
        Figure(
            "retained_tasks",
            "Retained performance by task",
            "Filled dots: the difference from the unchanged model is clear, p < "
            f"{tables.LEVEL:g} after Holm's adjustment; hollow dots: it is not. In brackets: "
            f"number of items. {drawn}.",
            retained_plots.by_task(comparison),
        ),
    ]


def load_figures(path: Path, comparison: Comparison) -> tuple[list[Figure], list[str]]:
    """The figures of a saved report: the default ones drawn again, others from their files.

    Args:
        path: `results.json`, or the folder that holds it; figures lie beside it.
        comparison: What was loaded from it.

    Returns:
        The figures, and the names of files that are missing.

    Raises:
        ResultsFileError: The list of figures is damaged, or a figure cannot be read.
    """
    file = storage.file_of(path)
    saved = storage.listed_figures(file)
    again = {one.name: one for one in default_figures(comparison)}
    figures, missing = [], []
    for listed in saved:
        if listed["name"] in again:
            figures.append(again[listed["name"]])
            continue
        png, svg = (file.parent / f"{listed['name']}.{kind}" for kind in ("png", "svg"))
        try:
            absent = [one.name for one in (png, svg) if not one.exists()]
            missing += absent
            if absent:
                continue
            picture = Picture(png.read_bytes(), svg.read_bytes())
        except OSError as problem:
            raise ResultsFileError(f"{png}: cannot be read ({problem.strerror})") from problem
        if not picture.png.startswith(_PNG):
            raise ResultsFileError(f"{png}: is no PNG picture; remove it, or compare again")
        figures.append(Figure(**listed, picture=picture))
    return figures, missing


def write(comparison: Comparison, folder: Path, figures: Sequence[Figure]) -> Path:
    """Write all of a report but its JSON: see `Comparison.save`.

    Returns:
        The path of `report.html`.
    """
    for figure in figures:
        figure.picture.save(folder, figure.name)
    atomic_write_text(folder / "results.csv", exports.csv_text(comparison))
    atomic_write_text(folder / "overview.tex", exports.latex(comparison))
    atomic_write_text(folder / "report.md", markdown(comparison, figures))
    atomic_write_text(folder / "report.html", page.html(comparison, figures))
    return folder / "report.html"


def markdown(comparison: Comparison, figures: Sequence[Figure]) -> str:
    """The report as Markdown; figures are linked as files beside it."""
    overview = tables.overview(comparison)
    lines = [f"# {page.title(comparison)}", ""]
    lines += [f"* {finding}" for finding in page.findings(comparison)]
    lines += ["", f"## {overview.name}", "", overview.note, "", *tables.markdown(overview)]
    for figure in figures:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({figure.name}.png)", ""]
        lines += [figure.caption]
    lines += ["", "## Every task", "", tables.LEGEND, ""]
    for task in comparison.tasks:
        table = tables.of_task(comparison, task)
        about = "; ".join(filter(None, (comparison.tasks[task].group, table.note)))
        lines += ["", f"### {table.name} ({about})", "", *tables.markdown(table)]
    lines += ["", "## Settings", "", "```json", page.settings(comparison), "```", ""]
    return "\n".join(lines)
