"""Write files atomically; read JSON with errors that name file and line; rows as HTML."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import math
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from lirefs.errors import DataFileError, LirefsError, SettingError, WriteError, must_be, visible

HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which no file can hold and no tokenizer reads."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; move the file to ``path`` on success, remove it on failure.

    Parent folders are made. The name is the same, as writers choose the format by suffix, and so is
    the file system, so that the move is one atomic rename. A failure (WriteError) changes nothing.
    """
    must_be(path, (str, os.PathLike), "the path of a file", WriteError)
    final = Path(path)
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=final.parent) as folder:
            temporary = Path(folder) / final.name
            yield temporary
            usual_file_permissions(Path(folder))
            # Some file systems write, or notice that they are full, only here.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)  # noqa: PTH105 (the name that the reader knows as atomic)


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the system and of safetensors into WriteErrors that name ``path``."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise WriteError(f"{path}: cannot be written ({reason})") from problem


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Append UTF-8 text to a file in one piece, and return when it is on disk.

    Texts of two processes do not mix. If the disk is full (WriteError) or the process is killed, a
    part may stay: readers must leave out an unfinished last line.
    """
    data = memoryview(text.encode("utf-8"))
    with write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            while data:  # a full disk takes a part, and reports its error at the next call
                data = data[file.write(data) :]
            os.fsync(file.fileno())


def usual_file_permissions(folder: Path) -> None:
    """Give files the permissions of new ones: safetensors' are their owner's alone."""
    # Reading the umask means setting it, for all threads; a new file shows it as well.
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


def refuse_folder(path: str | os.PathLike[str], error: type[LirefsError]) -> None:
    """Raise `error` if a path that should name a file names a folder."""
    must_be(path, (str, os.PathLike), "the path of a file", error)
    if Path(path).is_dir():
        raise error(f"{path}: is a folder; name a file")


def holds_mark(path: Path, mark: str) -> bool:
    """Whether a file is one of ours: `mark` is in its first megabyte, or it is empty."""
    try:
        with path.open("rb") as file:
            head = file.read(2**20)
    except OSError:  # a folder, for one
        return False
    return not head or mark.encode() in head


def refuse_foreign(record: Path, mark: str, others: Iterable[str] = ()) -> None:
    """Raise SettingError if what a command is about to write would replace what it did not write.

    Args:
        record: The file that shows whose a folder is: if the command wrote it, it wrote the
            others too.
        mark: Text that every such file holds, and the files of others do not.
        others: Names of the other files that the command writes to the same folder. None of them
            may be there without the record.
    """
    if record.exists():
        foreign = [] if holds_mark(record, mark) else [record]
    else:
        foreign = [path for one in others if (path := record.parent / one).exists()]
    if foreign:
        raise SettingError(
            f"{foreign[0]}: exists, and this command did not write it; move it, or name another "
            "place to write to"
        )


def sha256_of(source: str | os.PathLike[str] | bytes) -> str:
    """Return the SHA-256 of a file (a path, ``str`` included) or of ``bytes``, as 64 hex digits."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """Return ``$LIREFS_CACHE``, or else the user's cache folder, without creating it."""
    given = os.environ.get("LIREFS_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("lirefs"))


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a stranger's file; OSError if it is not a regular file of at most so many.

    A link could lead to any file of the reader's, and a pipe or a device may never end.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link; put the file itself in its place")
    # Without O_NONBLOCK a pipe is waited for.
    flags = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    with os.fdopen(os.open(path, os.O_RDONLY | sum(flags)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}")
        return file.read(status.st_size)  # a larger number would be that much memory at once


def read_jsonl(
    path: str | os.PathLike[str], error: type[LirefsError] = DataFileError
) -> list[tuple[int, dict[str, Any]]]:
    """Read a JSON Lines file: number, from 1, and object of each line that is not blank.

    A file that is missing, unreadable, empty or not UTF-8 (a byte order mark is allowed), or a line
    that is not a JSON object, raises ``error``, which names the file and the line.
    """
    must_be(path, (str, os.PathLike), "the path of a file", error)
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
            found = f"{json.dumps(row):.40}"
            raise error(f"{file}, line {number}: expected an object {{...}}, found {found}")
        rows.append((number, row))
    if not rows:
        raise error(f"{file}: empty, expected one JSON object per line")
    return rows


class _TwiceError(ValueError):
    """An object of JSON has two values for one key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _TwiceError(f"two values for the key {key!r:.60}")
    return found


def parse_json(text: str, levels: int | None = None) -> Any:
    """Parse JSON from an untrusted source; NaN and Infinity are read, as `json.dumps` writes them.

    ValueErrors are text that is not JSON or is nested deeper than ``levels`` or Python allows, an
    object with two values for one key, half of a surrogate pair, which cannot be written to a file,
    and a number that no float can hold.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (json.JSONDecodeError, _TwiceError):
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
            elif isinstance(one, str) and not one.isascii() and (half := HALF.search(one)):
                raise ValueError(
                    f"\\u{ord(half[0]):04x} is half of a character, written without its other half"
                )
            elif isinstance(one, int) and abs(one) > sys.float_info.max:
                raise ValueError("a number with too many digits")
        layer, depth = below, depth + 1
    return value


_MARKUP = re.compile(
    r"[\\`|$]|<(?=[a-zA-Z/!?])|\](?=[(\[:])|[*~](?=\S)|(?<=\S)[*~]|_(?!\w)|(?<!\w)_|&(?=#?\w+;)"
    r"|^[-+>](?=\s\S)|^#(?=#*\s)"
)


def in_markdown(text: str) -> str:
    """A text as Markdown shows it, in one line: nothing of it is markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(visible(text).split()))


_SHOWN, _LONGEST = 12, 60
"""Rows of a table in a notebook, and characters of a cell."""


def html_table(title: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A title and a table, as a notebook shows them; of many rows the first and the last.

    Numbers are on the right, with three digits, and texts on the left, where a notebook's own
    style would put both on the right.
    """
    shown = list(rows)
    columns = list(dict.fromkeys(name for row in shown for name in row))
    if len(shown) > _SHOWN:
        half = _SHOWN // 2
        shown = [*shown[:half], dict.fromkeys(columns, "…"), *shown[-half:]]
    lines = ["".join(_cell("th", name) for name in columns)]
    lines += ["".join(_cell("td", row.get(name)) for name in columns) for row in shown]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<p><code>{html.escape(title)}</code></p>\n<table>\n{body}\n</table>"


def _cell(tag: str, value: Any) -> str:
    side, text = "left", "" if value is None else str(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        side = "right"
        if not isinstance(value, Integral):
            text = "" if math.isnan(value) else f"{float(value):.3g}"
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    return f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag}>'
