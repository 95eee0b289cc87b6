"""One command line for both packages."""

from __future__ import annotations

import sys

import typer

import kfac
import lirefs
from lirefs.cli import curvature, organism
from lirefs.cli.compare import compare
from lirefs.cli.directions import export, probe, steer
from lirefs.cli.mine import mine
from lirefs.cli.options import say
from lirefs.cli.report import report

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (compare, probe, steer, export, mine, report):
    app.command()(command)
app.add_typer(organism.app, name="organism")
app.add_typer(curvature.app, name="curvature")
INTERRUPTED = 130  # as typer ends after Ctrl-C


def main() -> None:
    """Run the command line; errors end in one line and exit code 2, an interruption in 130."""
    try:
        app(standalone_mode=True)
    except (lirefs.LirefsError, kfac.KfacError, OSError) as error:
        say(f"{type(error).__name__}: {' '.join(str(error).split())}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say(
                "interrupted; commands that keep finished work use it again when repeated (lirefs "
                "compare: with --resume)"
            )
        raise


@app.callback()
def _root() -> None:
    """Reasoning against recitation in language models."""
