"""Files: written whole or not at all, read with the line number of what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from lirefs.errors import DataFileError, LirefsError, WriteError

_CHUNK = 1 << 20


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there at success, remove it on failure.

    The suffix is kept, because writers such as matplotlib choose the format by it. Missing parent
    folders are made.

    Args:
        path: Where the finished file shall be. An existing file is replaced.

    Yields:
        The path to write to, in the same folder, so that the final move is one atomic rename.

    Raises:
        WriteError: The disk is full, or the folder cannot be written to. An existing file stays.
    """
    final = Path(path)
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=final.parent) as folder:
            temporary = Path(folder) / final.name
            yield temporary
            usual_permissions(Path(folder))
            # Some file systems find out that they are full, or write, only when asked to.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)  # noqa: PTH105 (the name that the reader knows as atomic)


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give what goes wrong while writing the path, and a name.

    Args:
        path: What is being written.

    Raises:
        WriteError: For an error of the system or of safetensors, which names no path.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise WriteError(f"{path}: cannot be written ({reason})") from problem


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Append to a file in one piece, which is on disk when this returns.

    Args:
        path: The file; it and missing parent folders are made.
        text: What to append, as UTF-8. Two processes that append at once do not mix. Where the
            disk is full or the process is killed, a part of it may stay: readers must leave out
            an unfinished last line.

    Raises:
        WriteError: The disk is full, or the file cannot be written to.
    """
    data = memoryview(text.encode("utf-8"))
    with write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            while data:  # a full disk takes a part, and gives its error to the next call
                data = data[file.write(data) :]
            os.fsync(file.fileno())


def usual_permissions(folder: Path) -> None:
    """Give the files in a folder the permissions of any new file of this process.

    safetensors makes its files readable by their owner alone, whatever the umask is.
    """
    # The umask can only be read by setting it, for all threads; a new file tells it as well.
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.iterdir():
        file.chmod(mode)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all, newlines as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


def sha256_of(source: str | os.PathLike[str] | bytes) -> str:
    """Return the SHA-256 of a file (a path, ``str`` included) or of ``bytes``, as 64 hex digits."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with Path(source).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the folder for what can be made again: ``$LIREFS_CACHE``, else the user's cache.

    The folder is not created.
    """
    named = os.environ.get("LIREFS_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(platformdirs.user_cache_dir("lirefs"))


def read_jsonl(
    path: str | os.PathLike[str], error: type[LirefsError] = DataFileError
) -> list[tuple[int, dict[str, Any]]]:
    """Read a JSON Lines file of objects. Blank lines are skipped.

    Args:
        path: The file, UTF-8, with or without a byte order mark.
        error: The class to raise, so that question sets can raise ``QuestionsError``.

    Returns:
        Line number and dictionary of each line that is not blank.

    Raises:
        LirefsError: of class ``error``, naming the file and, where there is one, the line: the
            file is missing, unreadable, not UTF-8 or empty, a line is not JSON or not an object.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except OSError as problem:
        raise error(f"{file}: cannot be read ({problem.strerror})") from problem
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8"))
        except UnicodeDecodeError as problem:
            raise error(f"{file}, line {number}: not UTF-8 (byte {problem.start + 1})") from problem
        except ValueError as problem:
            reason = problem.msg if isinstance(problem, json.JSONDecodeError) else str(problem)
            raise error(f"{file}, line {number}: not JSON ({reason})") from problem
        if not isinstance(row, dict):
            raise error(f"{file}, line {number}: expected an object {{...}}, found {_kind(row)}")
        rows.append((number, row))
    if not rows:
        raise error(f"{file}: empty, expected one JSON object a line")
    return rows


def parse_json(text: str, levels: int | None = None) -> Any:
    """Parse JSON that anyone may have written.

    Args:
        text: The JSON. NaN and Infinity are read, as `json.dumps` writes them.
        levels: Lists and objects may be nested this deep; None: as deep as Python can read.

    Raises:
        ValueError: It is no JSON (a `json.JSONDecodeError`), nested too deep, or holds half of a
            surrogate pair, which no file can be written with, or a whole number that no float
            can hold.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads no more than some thousand digits
        raise ValueError("a number with too many digits") from None
    layer, depth = [value], 0
    while layer:
        if levels is not None and depth > levels:
            raise ValueError(f"nested deeper than {levels} levels")
        below: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not one.isascii():
                _check_text(one)
            elif isinstance(one, int) and abs(one) > sys.float_info.max:
                raise ValueError("a number with too many digits")
        layer, depth = below, depth + 1
    return value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        half = f"{ord(text[problem.start]):04x}"
        raise ValueError(
            f"\\u{half} is half of a character, written without its other half"
        ) from None


def _kind(value: object) -> str:
    """Return the JSON word for the type of ``value``."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "an array")
