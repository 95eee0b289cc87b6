"""`lirefs report`: write a report again from its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lirefs.cli.options import Force, Quiet, folder_to_write, keep_finished, say_on_console


def report_command(
    results: Annotated[Path, Argument(help="results.json, or the folder that holds it.")],
    out: Annotated[
        Path | None,
        Option(
            help="Folder to write to. Default: where results.json is.", callback=folder_to_write
        ),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a report again from its results.json, without a model.

    The pages next to results.json are replaced, those of another folder only with --force.
    """
    from lirefs.comparison.journal import journal_files
    from lirefs.comparison.report.write import PAGES, TABLE, load_report_figures, write_pages
    from lirefs.comparison.results_file import load_comparison, results_path

    comparison = load_comparison(results)
    own = results_path(results).parent
    if out is not None and out.resolve() != own.resolve():
        keep_finished(out / "results.csv", force, TABLE, PAGES)
    if journal_files(own / "unfinished"):
        say_on_console("these are results of an earlier run: a later one was interrupted")
    figures, left_out = load_report_figures(results, comparison.summary())
    for reason in left_out:
        say_on_console(f"left out: {reason}")
    page = write_pages(comparison, out or own, figures, left_out)
    say_on_console(f"report: {page}")
