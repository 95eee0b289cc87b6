"""Finished parts of a comparison, kept for resuming after a crash and shared by processes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lirefs.comparison.results_file import item_of_results
from lirefs.errors import SettingError
from lirefs.files import append_text, parse_json, sha256_of
from lirefs.model.language_model import LanguageModel
from lirefs.model.processes.world import World
from lirefs.tasks.task import ItemResult, Task
from lirefs.version import __version__

FILES = "items-*.jsonl"
"""Names of a journal's files."""
_BEGINS = b'{"key": "'
_LINE = re.compile(_BEGINS + b'[0-9a-f]{64}"')
"""How each of their lines begins."""
PART = 128
"""Items per part: the most that is lost when a comparison is killed."""


class Journal:
    """Results of finished parts, by a key of model, intervention, items and settings.

    Each process appends to its own file in the folder, which may be one for all of them or be on
    the disk of each; None keeps nothing. A part always consists of the same items, whatever was
    finished before, so batches and rounding are those of a run that was never interrupted.
    """

    def __init__(self, folder: str | Path | None, world: World) -> None:
        self._world = world
        self._folder = None if folder is None else Path(folder)
        self._lines: dict[str, list[ItemResult]] = {}
        self._own: set[str] = set()  # keys of the parts that are this process's work
        self._lacking: set[str] = set()  # keys that some process did not find in its folder
        if self._folder is not None and self._folder.exists():
            if not self._folder.is_dir():
                raise SettingError(f"journal {self._folder}: exists and is not a folder")
            ours = journal_files(self._folder)
            for file in sorted(self._folder.glob(FILES)):
                if file not in ours:
                    raise SettingError(
                        f"journal {file}: is not a file of a journal; move it, or name another "
                        "folder"
                    )
                self._read(file)
        self.resumed = bool(self._lines)

    def _read(self, file: Path) -> None:
        try:
            raw = file.read_bytes()
        except OSError as problem:
            raise SettingError(f"journal {file}: cannot be read ({problem.strerror})") from problem
        for line in raw.split(b"\n"):
            try:
                row = parse_json(line.decode())
                self._lines[row["key"]] = [item_of_results(item) for item in row["items"]]
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut short: that part runs again

    def share_out(self, parts: Iterable[tuple[str, Task]]) -> None:
        """Give each process its share of the parts that none has finished."""
        keys = dict(parts)
        finished = {key for key, part in keys.items() if self.finished(key, part) is not None}
        found = self._world.gather((finished, self.resumed))
        self.resumed = any(resumed for _, resumed in found)
        rest = [key for key in keys if not any(key in some for some, _ in found)]
        self._own = set(rest[self._world.rank :: self._world.size])
        self._lacking = {key for key in keys if not all(key in some for some, _ in found)}

    def mine(self, key: str) -> bool:
        """Whether a part is this process's work, and not done yet."""
        return key in self._own

    def finished(self, key: str, part: Task) -> list[ItemResult] | None:
        """The results of a part of a task, if it was finished."""
        items = self._lines.get(key)
        metric = "nll" if part.metric == "perplexity" else part.metric
        if items is None or len(items) != len(part):
            return None
        names = {frozenset(one.scores) for one in items}
        return items if len(names) == 1 and metric in names.pop() else None

    def add(self, key: str, items: list[ItemResult]) -> None:
        """Keep the results of a part; they are on disk when this returns."""
        self._lines[key] = items
        self._own.discard(key)
        if self._folder is not None:
            line = json.dumps({"key": key, "items": [asdict(item) for item in items]})
            # A newline first ends whatever a killed writer left.
            append_text(self._folder / f"items-{self._world.rank}.jsonl", f"\n{line}\n")

    def exchange(self) -> None:
        """Give every process what it lacks of the others' results."""
        known = {key: items for key, items in self._lines.items() if key in self._lacking}
        for one in self._world.gather(known):
            self._lines |= one


def journal_files(folder: Path) -> list[Path]:
    """The files of a journal in a folder, known by name and content; others are the user's own."""
    found = []
    for file in sorted(folder.glob(FILES)):
        if file.is_symlink() or not file.is_file():
            continue
        try:
            with file.open("rb") as opened:
                head = opened.read(2**20)
        except OSError as problem:
            raise SettingError(f"journal {file}: cannot be read ({problem.strerror})") from problem
        cut = head.strip()  # a killed writer may leave a part of the first line
        whole = _LINE.search(head)
        if whole or _BEGINS.startswith(cut) or re.fullmatch(_BEGINS + b"[0-9a-f]*", cut):
            found.append(file)
    return found


def remove_journal(folder: Path) -> bool:
    """Remove the files of a journal, and their folder if it holds nothing else.

    Returns whether there were any.
    """
    files = journal_files(folder)
    for file in files:
        file.unlink(missing_ok=True)
    if files:
        with suppress(OSError):  # it holds something else, or is a link
            folder.rmdir()
    return bool(files)


def task_parts(task: Task) -> list[list[int]]:
    """Rows of a task in parts, items of similar length together: less padding in a batch."""
    order = sorted(range(len(task)), key=lambda row: -len(repr(task.items[row])))
    return [order[start : start + PART] for start in range(0, len(order), PART)]


def task_texts(task: Task) -> tuple[list[Any], str]:
    """What a task is, by its class, name, group, metric and settings; and its items."""
    settings: dict[str, str] = {}
    if is_dataclass(task):
        named = [f.name for f in fields(task) if f.repr and f.name != "items"]
        settings = {name: _text_of(getattr(task, name)) for name in named}
    what = [type(task).__qualname__, task.name, task.group, task.metric, settings]
    return what, _text_of(list(task.items))


def task_digest(identity: str, lm: LanguageModel, task: Task) -> str:
    """SHA-256 of a task, or a part of one, on a model of this identity: 64 hex digits."""
    runs_on = [__version__, identity, lm.tokenizer_fingerprint, lm.device.type]
    content = [*runs_on, *task_texts(task)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _text_of(value: Any) -> str:
    """A value as text that tells it from others, which the `repr` of a large array does not."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {sha256_of(value.tobytes())}"
    if type(value) in (list, tuple):
        return f"[{', '.join(map(_text_of, value))}]"
    if is_dataclass(value) and not isinstance(value, type):  # its own `repr` may be short
        parts = [f"{one.name}={_text_of(getattr(value, one.name))}" for one in fields(value)]
        return f"{type(value).__qualname__}({', '.join(parts)})"
    return repr(value)


def part_key(digest: str, variant: str, described: Mapping[str, Any] | None) -> str:
    """SHA-256 of everything that decides a result: a part of a task, and an intervention."""
    content = json.dumps([digest, variant, described], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
