"""One command line for both packages."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

import kfac
import lirefs
from lirefs import (
    commands_compare,
    commands_curvature,
    commands_mine,
    commands_organism,
    commands_report,
    commands_steering,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
commands_compare.register(app)
app.add_typer(commands_organism.app, name="organism")
commands_steering.register(app)
commands_mine.register(app)
commands_report.register(app)
app.add_typer(commands_curvature.app, name="curvature")
console = Console(stderr=True, highlight=False)


def main() -> None:
    """Run the command line; errors of ours end in one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except (lirefs.LirefsError, kfac.KfacError) as error:
        message = " ".join(str(error).split())
        console.print(f"{type(error).__name__}: {message}", markup=False, soft_wrap=True)
        sys.exit(2)


@app.callback()
def _root() -> None:
    """Reasoning against recitation in language models."""
