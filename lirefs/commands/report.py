"""The command that writes a report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lirefs.errors import SettingError
from lirefs.harness.comparison import Comparison

console = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(report)


def report(
    results: Annotated[Path, typer.Argument(help="results.json, or the folder that holds it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to. Default: where results.json is.")
    ] = None,
) -> None:
    """Write a report again from its results.json, without a model."""
    if out is not None and out.exists() and not out.is_dir():
        raise SettingError(f"--out {out}: exists and is not a folder")
    comparison = Comparison.load(results)
    from lirefs.harness import report as reports  # matplotlib takes a second to load
    from lirefs.harness import storage

    figures, missing = reports.load_figures(results, comparison)
    if missing:
        console.print(
            f"left out, because they are not beside the results: {', '.join(missing)}",
            markup=False,
            soft_wrap=True,
        )
    page = reports.write(comparison, out or storage.file_of(results).parent, figures)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
