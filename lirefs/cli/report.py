"""`lirefs report`: write a report again from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lirefs.cli.options import folder_to_write, say_on_console
from lirefs.comparison.report.write import load_report_figures, write_pages
from lirefs.comparison.results_file import load_comparison, results_path


def report_command(
    results: Annotated[Path, Argument(help="results.json, or the folder that holds it.")],
    out: Annotated[
        Path | None,
        Option(
            help="Folder to write to. Default: where results.json is.", callback=folder_to_write
        ),
    ] = None,
) -> None:
    """Write a report again from its results.json, without a model."""
    comparison = load_comparison(results)
    if (results_path(results).parent / "unfinished").is_dir():
        say_on_console("these are results of an earlier run: a later one was interrupted")
    figures, left_out = load_report_figures(results, comparison.summary())
    for reason in left_out:
        say_on_console(f"left out: {reason}")
    page = write_pages(comparison, out or results_path(results).parent, figures, left_out)
    say_on_console(f"report: {page}")
