"""What the main job and the command line print: lines and tables that act on no terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lirefs.errors import visible


class SafeConsole(Console):
    """A console on which texts act on nothing: no markup, no emoji, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed, in tables too, goes through here."""
        return super().render_str(visible(text), **options)


def console_table(*heads: str, title: str | None = None) -> Table:
    """A table for the console, whose texts go on in the next line where it is narrow."""
    columns = (Column(head, overflow="fold") for head in heads)
    return Table(*columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
