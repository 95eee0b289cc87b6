"""The command-line page of the docs, generated from the commands themselves.

`python tests/support/cli_page.py` writes it.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from lirefs.cli import app as cli

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
HEAD = """# Command line

What `lirefs COMMAND --help` says, for every command. This page is made of the commands themselves:
`python tests/support/cli_page.py` writes it again, and a test compares the two. An error that the
packages raise on purpose ends in one line on standard error and exit code 2.
"""
WORDS = {str: "text", Path: "path", int: "integer", float: "number"}


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command."""

    name: str
    words: list[str]
    kind: str
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def commands(app: typer.Typer = cli.app, name: str = "lirefs") -> Iterator[tuple[str, Callable]]:
    """Full name and function of every command, in the order of the command line."""
    for one in app.registered_commands:
        own = one.name or one.callback.__name__.replace("_", "-")
        yield f"{name} {own}", one.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{name} {group.name}")


def parameters(command: Callable) -> tuple[list[Parameter], list[Parameter]]:
    """Arguments and options of a command."""
    hints = typing.get_type_hints(command, include_extras=True)
    arguments, options = [], []
    for name, one in inspect.signature(command).parameters.items():
        plain, info = typing.get_args(hints[name])[:2]
        text = " ".join((info.help or "").split()).replace("|", "\\|")
        # Inside Annotated, typer stores the first declaration as the default.
        said = [one for one in (info.default, *(info.param_decls or ())) if one is not ...]
        words = said or [f"--{name.replace('_', '-')}"]
        found = Parameter(name, words, _kind(plain, info), one.default, text)
        assert isinstance(info, ArgumentInfo | OptionInfo), f"{command}: {name}"
        (arguments if isinstance(info, ArgumentInfo) else options).append(found)
    return arguments, options


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD]
    for name, command in commands():
        arguments, options = parameters(command)
        usage = " ".join([name, *map(_placeholder, arguments), "[OPTIONS]"])
        parts.append(f"## {name}\n\n{inspect.getdoc(command)}\n\n```bash\n{usage}\n```\n")
        if arguments:
            rows = [f"| `{one.name.upper()}` | {one.kind} | {one.help} |" for one in arguments]
            parts.append(
                "\n".join(["| argument | value | what it is |", "|---|---|---|", *rows, ""])
            )
        rows = [
            f"| {', '.join(f'`{word}`' for word in one.words)} | {one.kind} | {_default(one)} "
            f"| {one.help} |"
            for one in options
        ]
        head = ["| option | value | default | what it does |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *rows, ""]))
    return "\n".join(parts)


def _placeholder(one: Parameter) -> str:
    name = one.name.upper() + ("..." if one.kind.endswith("s") else "")
    return name if one.required else f"[{name}]"


def _kind(plain: Any, info: Any) -> str:
    if typing.get_origin(plain) in (typing.Union, types.UnionType):
        plain = next(one for one in typing.get_args(plain) if one is not type(None))
    if typing.get_origin(plain) is list:
        return WORDS[typing.get_args(plain)[0]] + "s"
    if plain is bool:
        return ""
    if isinstance(plain, type) and issubclass(plain, enum.Enum):
        return ", ".join(f"`{one.value}`" for one in plain)
    return WORDS[plain] if info.min is None else f"{WORDS[plain]} from {info.min}"


def _default(one: Parameter) -> str:
    if one.required:
        return "required"
    return "" if one.default is None or one.default is False else f"`{one.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
