"""`lirefs pool`: the reports of several models together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Group, RenderableType
from typer import Argument

from lirefs.cli.options import Json, Quiet, print_result
from lirefs.errors import SettingError
from lirefs.main_job.console import console_table


def pool_command(
    reports: Annotated[list[Path], Argument(help="Two or more folders of reports.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pool the reports of one comparison on several models, such as seeds of one recipe.

    The same tasks and variants are needed. Each number stands with its interval over models and
    items, and with the value of each report.
    """
    from lirefs.comparison.pooled import pool
    from lirefs.comparison.results_file import load_comparison

    names = [one.resolve().name for one in reports]
    if len(set(names)) < len(names):
        names = list(map(str, reports))
    if len(set(names)) < len(names):
        raise SettingError("a report is named twice; pooling needs different ones")
    found = pool(
        {name: load_comparison(one).summary() for name, one in zip(names, reports, strict=True)}
    )
    shown: list[RenderableType] = []
    for one in found.tables():
        table = console_table(*one.head, title=one.name)
        for row in one.rows:
            table.add_row(*map(str, row))
        shown += [table, one.note, ""]
    if found.left_out:
        shown.append(f"left out, because only some reports have them: {', '.join(found.left_out)}")
    print_result(found.to_dict(), Group(*shown), as_json)
