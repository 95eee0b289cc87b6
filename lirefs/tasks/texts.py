"""Texts as people have them: strings, rows, files of text and JSON Lines, through one door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from lirefs.errors import DataFileError, LirefsError, TaskError, as_list
from lirefs.files import read_jsonl
from lirefs.tasks.items import as_row

Texts = str | PathLike[str] | Sequence[str | PathLike[str] | tuple[str, str] | Mapping[str, Any]]
"""A path, or a list of texts, (id, text), rows (mappings such as `{"text": ...}`) and `Path`s.

A path names a file of JSON Lines (its name ends in `.jsonl`, or it begins with `{`), a file of
text, which is one text however many lines it has, or a folder, of which every `.txt` file is one
text. A string by itself is a path; in a list, strings are texts.
"""


class TextRow(NamedTuple):
    """One text: its id, where it comes from, for messages, and its fields."""

    id: str
    where: str
    fields: Mapping[str, Any]


def text_rows(texts: Texts, what: str, error: type[LirefsError] = TaskError) -> list[TextRow]:
    """The rows of `texts`, which the caller's messages call `what`.

    A row without an id is called `line-3` in a file, `FILE:3` in one of several sources, and
    `item-2` in a list.

    Raises:
        DataFileError: A file cannot be read, is empty or is not JSON Lines.
        error: An entry of the list is not a text.
    """
    if isinstance(texts, str | PathLike):
        path = Path(texts)
        if not _exists(path):
            raise DataFileError(
                f"{' '.join(str(texts).split()):.60}: no such file; a string is a path, so put "
                "texts in a list: [text]"
            )
        return _file_rows(path, alone=True)
    entries = as_list(texts, what, error=error)
    rows: list[TextRow] = []
    for index, one in enumerate(entries):
        if isinstance(one, PathLike):
            rows += _file_rows(Path(one), alone=len(entries) == 1)
            continue
        where = f"{what}: item {index}"
        fields = {"text": one} if isinstance(one, str) else one
        if not isinstance(fields, Mapping):
            name, text = as_row(where, index, fields, ("id", "text"), error)
            fields = {"id": name, "text": text}
        rows.append(TextRow(_id(fields, f"item-{index}"), where, fields))
    return rows


def plain_texts(
    texts: Texts, what: str, error: type[LirefsError] = TaskError
) -> list[tuple[str, str]]:
    """Id and `text` of each row of `texts`."""
    rows = text_rows(texts, what, error)
    for row in rows:
        if not isinstance(row.fields.get("text"), str):
            raise error(f"{row.where}: needs a string 'text'")
    return [(row.id, row.fields["text"]) for row in rows]


def _file_rows(path: Path, alone: bool) -> list[TextRow]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DataFileError(f"{path}: a folder without a .txt file")
        return [TextRow(str(file), str(file), {"text": _read(file)}) for file in files]
    start = "" if path.suffix == ".jsonl" else _read(path).lstrip()[:1]
    if path.suffix == ".jsonl" or start in ("", "{"):
        return [
            TextRow(
                _id(fields, f"line-{line}" if alone else f"{path}:{line}"),
                f"{path}, line {line}",
                fields,
            )
            for line, fields in read_jsonl(path)
        ]
    return [TextRow(str(path), str(path), {"text": _read(path)})]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or not one: a text, most likely
        return False


def _id(fields: Mapping[str, Any], otherwise: str) -> str:
    return str(fields.get("id") or otherwise)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataFileError(f"{file}: no such file") from None
    except UnicodeDecodeError as problem:
        raise DataFileError(f"{file}: not UTF-8 (byte {problem.start + 1})") from problem
    except OSError as problem:
        raise DataFileError(f"{file}: cannot be read ({problem.strerror})") from problem
