"""Options and checks that several commands share."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, TypeVar

from rich.console import Console
from typer import Option

from lirefs.errors import SettingError
from lirefs.model.loading import usable_device

DEFAULT_MODEL = "smollm2-135m"

console = Console(stderr=True, highlight=False)
"""For progress and messages; results go to the standard output."""


def say_on_console(line: str) -> None:
    """Print a line on the console, as it is."""
    console.print(line, markup=False, soft_wrap=True)


def device_option(value: str | None) -> str | None:
    """Callback of an option that names a device; SettingError if no such device exists."""
    if value is not None:
        usable_device(value, "--device")
    return value


def folder_to_write(value: Path | None) -> Path | None:
    """Callback of an option that names a folder for results, existing or not."""
    if value is not None and value.exists() and not value.is_dir():
        raise SettingError(f"{value}: exists and is not a folder; name another place")
    return value if value is None else _writable(value)


def file_to_write(value: Path) -> Path:
    """The same for a file, which is replaced if it exists."""
    if value.is_dir():
        raise SettingError(f"{value}: is a folder; name a file to write")
    _writable(value.parent)
    return value


def new_folder(value: Path) -> Path:
    """The same for a folder that must not exist yet."""
    if value.exists():
        raise SettingError(f"{value}: exists; name a new folder")
    return _writable(value)


def _writable(folder: Path) -> Path:
    """Checked first, because hours of work should not end at a folder that cannot be made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise SettingError(f"{folder}: cannot be made, because {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingError(f"{folder}: nothing can be written in {there}; name another place")
    return folder


Model = Annotated[str, Option(help="Built-in name, hub id, folder or .gguf file.")]
Device = Annotated[str | None, Option(help="Default: cuda if available.", callback=device_option)]
FactorsFile = Annotated[Path, Option(help="File written by `lirefs curvature collect`.")]
Keep = Annotated[float, Option(help="Share of curvature mass to keep, in (0, 1].")]
Seed = Annotated[int, Option(min=0, help="Seed of labels, splits, controls, intervals.")]
OutFolder = Annotated[
    Path, Option(help="Folder of the report, tables and figures.", callback=folder_to_write)
]

Number = TypeVar("Number", int, float)


def numbers_option(text: str, option: str, kind: type[Number]) -> list[Number]:
    """Numbers of an option, separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "20,21,22" if kind is int else "-1,0.5,1"
        raise SettingError(f"{option} {text!r}: expected numbers such as {example}") from None


def indices_option(text: str | None, option: str = "--layers") -> list[int] | None:
    """Whole numbers of an option, ascending; None if it was not given."""
    return None if text is None else sorted(set(numbers_option(text, option, int)))


def choice_option(name: str, option: str, known: Collection[str]) -> None:
    """Check a name of an option against the known ones."""
    if name not in known:
        raise SettingError(f"{option} {name!r}: expected one of {', '.join(known)}")
