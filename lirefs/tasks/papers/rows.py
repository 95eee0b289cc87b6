"""Rows of evaluation data: JSON Lines of the user's own first, else a set of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lirefs.errors import DataFileError, NoDataError, TaskError
from lirefs.files import read_jsonl

Row = dict[str, Any]
Numbered = list[tuple[int, Row]]
PASSAGE_CHARACTERS = 600


@dataclass(frozen=True)
class Hub:
    """A set on the hub.

    Attributes:
        id: Its id.
        split: The rows that are tested.
        configs: Its configurations; the rows of several are put together.
        shots_split: The rows that answered examples are taken from; empty: the tested split.
        adapt: A row of the hub with the fields that a local file has.
        config_field: Field that gets the name of the configuration; empty: none.
    """

    id: str
    split: str = "test"
    configs: tuple[str | None, ...] = (None,)
    shots_split: str = ""
    adapt: Callable[[Row], Row] = dict
    config_field: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows of one source, each with its line or number from 1.

    Attributes:
        source: Where they are from, for messages.
        tested: Rows to ask about.
        shots: Rows for answered examples; empty: some of the tested ones have to serve.
        error: What to raise for a malformed row: a file can be mended, a set of the hub cannot
            be had in the form that is needed.
    """

    source: str
    tested: Numbered
    shots: Numbered = field(default_factory=list)
    error: type[TaskError] = TaskError


class Sources:
    """Where rows come from: a folder, then the hub.

    Attributes:
        folder: Folder of JSON Lines files, None for none.

    Raises:
        DataFileError: If the folder does not exist.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._unreachable = False
        if self.folder is not None and not self.folder.is_dir():
            raise DataFileError(f"{self.folder}: no such folder of evaluation data")

    def files(self, pattern: str) -> list[Path]:
        """Files of the folder whose name fits `pattern`, sorted.

        Raises:
            NoDataError: If there is none.
        """
        found = sorted(self.folder.glob(pattern)) if self.folder else []
        if not found:
            where = f"in {self.folder}" if self.folder else "(no data folder given)"
            raise NoDataError(f"no {pattern} {where}")
        return found

    def rows(self, file: str, hub: Hub | None) -> Rows:
        """Rows of `<folder>/<file>.jsonl`, else of `hub`.

        Raises:
            NoDataError: If neither can be had; says why.
            DataFileError: If the file is there and cannot be read.
        """
        try:
            path = self.files(f"{file}.jsonl")[0]
        except NoDataError as problem:
            if hub is None:
                raise NoDataError(f"{problem}; no set of the hub serves") from None
            try:
                return self._hub_rows(hub)
            except NoDataError as other:
                raise NoDataError(f"{problem}; {other}") from None
        return Rows(str(path), read_jsonl(path))

    def _hub_rows(self, hub: Hub) -> Rows:
        tested, shots = [], []
        for config in hub.configs:
            tested += self._download(hub, config, hub.split)
            if hub.shots_split:
                shots += self._download(hub, config, hub.shots_split)
        return Rows(
            f"{hub.id} of the hub",
            list(enumerate(tested, start=1)),
            list(enumerate(shots, start=1)),
            NoDataError,
        )

    def _download(self, hub: Hub, config: str | None, split: str) -> list[Row]:
        if self._unreachable:
            raise NoDataError(
                f"{hub.id}: the hub cannot be reached (HF_HUB_OFFLINE=1 uses only what was "
                "downloaded before)"
            )
        import datasets  # takes a second to load
        from huggingface_hub import constants

        extra = {hub.config_field: config} if hub.config_field else {}
        try:
            data = datasets.load_dataset(hub.id, config, split=split)
            return [hub.adapt(dict(row)) | extra for row in data]
        # Hub, network, parquet and adapted fields fail each in their own classes, some of them
        # bare exceptions of the libraries below; whatever it is, this set cannot be had.
        except Exception as problem:
            lost = isinstance(problem, ConnectionError) or "LocalEntryNotFound" in str(problem)
            # A second set would wait for as long. When offline by choice nothing waits, and the
            # next set may be in the cache.
            self._unreachable = lost and not constants.HF_HUB_OFFLINE
            message = (str(problem) or "no message").splitlines()[0][:200]
            raise NoDataError(f"{hub.id}: {type(problem).__name__}: {message}") from problem


def passage_around(page: str, answers: list[str], length: int = PASSAGE_CHARACTERS) -> str:
    """About `length` characters of a page around the first answer in it, cut between words.

    Returns:
        The passage, empty if no answer occurs in the page.
    """
    names = [re.escape(answer) for answer in answers if answer.strip()]
    found = (
        re.search(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)", page, re.IGNORECASE) if names else None
    )
    if found is None:
        return ""
    # Two thirds before the answer, so that its sentence is likely whole.
    start = max(0, min(found.start() - 2 * length // 3, len(page) - length))
    passage = page[start : max(start + length, found.end())]
    if start:
        passage = passage.split(maxsplit=1)[-1]
    if start + length < len(page):
        passage = passage.rsplit(maxsplit=1)[0]
    return " ".join(passage.split())


def popqa_row(row: Row) -> Row:
    """A row of akariasai/PopQA; its answers are a JSON list in a text."""
    return {
        "question": row["question"],
        "answers": json.loads(row["possible_answers"]),
        "relation": row["prop"].replace(" ", "_"),
    }


def triviaqa_row(row: Row) -> Row:
    """A row of mandarjoshi/trivia_qa; `context` is empty without pages."""
    answers = [row["answer"]["value"], *row["answer"]["aliases"]]
    pages = (row.get("entity_pages") or {}).get("wiki_context") or []
    passages = [passage_around(page, answers) for page in pages]
    return {
        "question": row["question"],
        "answers": list(dict.fromkeys(answers)),
        "context": next(filter(None, passages), ""),
    }


def openbookqa_row(row: Row) -> Row:
    """A row of allenai/openbookqa, configuration `additional`."""
    return {
        "question": row["question_stem"],
        "options": list(row["choices"]["text"]),
        "answer_index": list(row["choices"]["label"]).index(row["answerKey"]),
        "fact": row["fact1"],
    }


def mgsm_row(row: Row) -> Row:
    """A row of juletxara/mgsm."""
    return {"question": row["question"], "answer": str(row["answer_number"])}


def ceval_row(row: Row) -> Row:
    """A row of ceval/ceval-exam; only its `dev` and `val` splits have answers."""
    return {
        "question": row["question"],
        "options": [row[letter] for letter in "ABCD"],
        "answer_index": "ABCD".index(row["answer"]),
    }
