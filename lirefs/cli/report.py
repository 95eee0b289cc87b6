"""The command that writes a report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lirefs.cli.options import console, folder_to_write
from lirefs.comparison.report.write import load_figures, write_pages
from lirefs.comparison.results_file import file_of, load_comparison


def report(
    results: Annotated[Path, typer.Argument(help="results.json, or the folder that holds it.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write to. Default: where results.json is.", callback=folder_to_write
        ),
    ] = None,
) -> None:
    """Write a report again from its results.json, without a model."""
    comparison = load_comparison(results)
    figures, missing = load_figures(results, comparison.summary())
    if missing:
        console.print(
            f"left out, because they are not beside the results: {', '.join(missing)}",
            markup=False,
            soft_wrap=True,
        )
    page = write_pages(comparison, out or file_of(results).parent, figures)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
