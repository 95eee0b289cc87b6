"""One command line for both packages."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from lirefs.cli import curvature, organism
from lirefs.cli.compare import compare_command
from lirefs.cli.directions import export_command, probe_command, steer_command
from lirefs.cli.mine import mine_command
from lirefs.cli.pool import pool_command
from lirefs.cli.report import report_command
from lirefs.errors import LirefsError, visible
from lirefs.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare_command)
app.command("probe")(probe_command)
app.command("steer")(steer_command)
app.command("export")(export_command)
app.command("mine")(mine_command)
app.command("report")(report_command)
app.command("pool")(pool_command)
app.add_typer(organism.app, name="organism")
app.add_typer(curvature.app, name="curvature")
_plain_warning = warnings.formatwarning
INTERRUPTED = 130  # as typer ends after Ctrl-C
KEEP_THEIR_WORK = ("compare", "mine", "curvature collect", "organism train")
"""Commands that go on where they were interrupted."""


def main() -> None:
    """Run the command line; errors end in one line and exit code 2, an interruption in 130."""
    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = _visible_warning
    try:
        app(standalone_mode=True)
    except (LirefsError, OSError) as error:
        typer.echo(visible(f"{type(error).__name__}: {' '.join(str(error).split())}"), err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED and os.environ.get("RANK", "0") == "0":
            typer.echo(visible(_after_an_interruption(sys.argv)), err=True)
        raise


class _VisibleRecord(logging.LogRecord):
    """A log record, of any library, that acts on no terminal."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _visible_warning(*fields: Any, **more: Any) -> str:
    return visible(_plain_warning(*fields, **more))


def _after_an_interruption(argv: list[str]) -> str:
    """A line with the command that goes on, ready to be pasted into the same shell."""
    arguments = argv[1:]
    kept = any(" ".join(arguments[:words]) in KEEP_THEIR_WORK for words in (1, 2))
    if arguments[:1] == ["compare"] and "--resume" not in arguments:
        arguments = [*arguments, "--resume"]
    command = shlex.join([*_program(argv[0]), *arguments])
    return f"interrupted; this command {'goes on' if kept else 'starts again'}: {command}"


def _program(path: str) -> list[str]:
    """The words that started this program."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        return ["torchrun", "--nproc-per-node", processes, path]
    if Path(path).name == "__main__.py":
        return [sys.executable, "-m", "lirefs"]
    return ["lirefs" if shutil.which("lirefs") == str(Path(path).absolute()) else path]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"lirefs {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version,
                           is_eager=True)
    ] = False,
) -> None:  # fmt: skip
    """Reasoning against recitation in language models."""
