"""One command line for both packages."""

from __future__ import annotations

import sys

import typer

import kfac
import lirefs
from lirefs.cli import curvature, organism
from lirefs.cli.compare import compare_command
from lirefs.cli.directions import export_command, probe_command, steer_command
from lirefs.cli.mine import mine_command
from lirefs.cli.options import say_on_console
from lirefs.cli.report import report_command

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("compare")(compare_command)
app.command("probe")(probe_command)
app.command("steer")(steer_command)
app.command("export")(export_command)
app.command("mine")(mine_command)
app.command("report")(report_command)
app.add_typer(organism.app, name="organism")
app.add_typer(curvature.app, name="curvature")
INTERRUPTED = 130  # as typer ends after Ctrl-C


def main() -> None:
    """Run the command line; errors end in one line and exit code 2, an interruption in 130."""
    try:
        app(standalone_mode=True)
    except (lirefs.LirefsError, kfac.KfacError, OSError) as error:
        say_on_console(f"{type(error).__name__}: {' '.join(str(error).split())}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say_on_console(
                "interrupted; commands that keep finished work use it again when repeated (lirefs "
                "compare: with --resume)"
            )
        raise


@app.callback()
def _root() -> None:
    """Reasoning against recitation in language models."""
