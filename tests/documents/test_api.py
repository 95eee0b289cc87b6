"""The public interface, compared with the agreed list in `tests/documents/api.txt`.

A change there is a change for every user. If it is meant, write it with
`python tests/documents/test_api.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

import kfac
import lirefs
from lirefs.cli.app import app

AGREED = Path(__file__).with_name("api.txt")


def members(owner: type) -> Iterator[str]:
    """Public methods, properties and fields that a class or its bases in this project define."""
    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        if one.__module__.partition(".")[0] not in ("kfac", "lirefs"):
            continue
        for name, value in vars(one).items():
            if name.startswith("_"):
                continue
            if isinstance(value, (classmethod, staticmethod)):
                value = value.__func__
            if isinstance(value, property):
                found[name] = f"{name} (property)"
            elif inspect.isfunction(value):
                found[name] = f"{name}{inspect.signature(value)}"
        if dataclasses.is_dataclass(one):
            found |= {
                field.name: f"{field.name} (field)"
                for field in dataclasses.fields(one)
                if not field.name.startswith("_")
            }
    yield from (found[name] for name in sorted(found))


def names(package: ModuleType) -> Iterator[str]:
    for name in sorted(package.__all__):
        value = getattr(package, name)
        title = f"{package.__name__}.{name}"
        if inspect.isclass(value):
            bases = [base.__name__ for base in value.__bases__ if base is not object]
            bases = [name for name in bases if not name.startswith("_")]
            yield f"class {title}({', '.join(bases)})" if bases else f"class {title}"
            if value.__init__ is not object.__init__ and not issubclass(value, BaseException):
                yield f"    {inspect.signature(value.__init__)}"
            yield from (f"    {member}" for member in members(value))
        elif inspect.isfunction(value):
            yield f"def {title}{inspect.signature(value)}"
        else:
            yield title


def options(command: Any, path: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name in sorted(command.commands):
            yield from options(command.commands[name], f"{path} {name}")
    else:
        yield f"$ {path}"
        for one in sorted(command.params, key=lambda one: one.name):
            flags = " / ".join((*one.opts, *one.secondary_opts))
            yield f"    {flags}{' (required)' if one.required else ''}"


def interface() -> str:
    lines = [*names(lirefs), *names(kfac), *options(typer.main.get_command(app), "lirefs")]
    return "\n".join(lines) + "\n"


def test_the_interface_is_the_agreed_one():
    assert interface() == AGREED.read_text("utf-8"), "if meant: python tests/documents/test_api.py"


if __name__ == "__main__":
    AGREED.write_text(interface(), "utf-8")
