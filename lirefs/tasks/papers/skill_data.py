"""Rows of evaluation data: from a folder of JSON Lines files, else from a dataset of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lirefs.errors import DataFileError, NoDataError, TaskError, first_line_of_error
from lirefs.files import read_jsonl

Row = dict[str, Any]
NumberedRows = list[tuple[int, Row]]
"""Rows, each with its line in the file or its number in the dataset, from 1."""
PASSAGE_CHARACTERS = 600


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub: the rows of its `configs`, joined.

    `adapt` gives a row the fields of a local file; `config_field`, if not empty, is where the name
    of the configuration goes. Answered examples are from `shots_split`; empty: the tested split.
    """

    id: str
    split: str = "test"
    configs: Sequence[str | None] = (None,)
    shots_split: str = ""
    adapt: Callable[[Row], Row] = dict
    config_field: str = ""


@dataclass(frozen=True)
class SkillData:
    """The rows of one skill to ask about, and those for examples; empty: the same rows.

    `error` is for a malformed row: the user can fix a file, but not a dataset.
    """

    source: str
    tested: NumberedRows
    shots: NumberedRows = field(default_factory=list)
    error: type[TaskError] = TaskError


class SkillDataLoader:
    """Finds rows in a folder, else on the hub; stops asking the hub once it cannot be reached."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._unreachable = False
        if self.folder is not None and not self.folder.is_dir():
            raise DataFileError(f"{self.folder}: no such folder of evaluation data")

    def files(self, pattern: str) -> list[Path]:
        """Files of the folder whose names match `pattern`, sorted; NoDataError if there is none."""
        found = sorted(self.folder.glob(pattern)) if self.folder else []
        if not found:
            where = f"in {self.folder}" if self.folder else "(no data folder given)"
            raise NoDataError(f"no {pattern} {where}")
        return found

    def load(self, file: str, hub: HubDataset | None) -> SkillData:
        """Rows of `<folder>/<file>.jsonl`, else of `hub`; NoDataError says why there is neither."""
        try:
            path = self.files(f"{file}.jsonl")[0]
        except NoDataError as problem:
            if hub is None:
                raise NoDataError(f"{problem}; no dataset on the hub replaces it") from None
            try:
                tested = self._download(hub, hub.split)
                shots = self._download(hub, hub.shots_split) if hub.shots_split else []
            except NoDataError as other:
                raise NoDataError(f"{problem}; {other}") from None
            return SkillData(f"{hub.id} on the hub", tested, shots, NoDataError)
        return SkillData(str(path), read_jsonl(path))

    def _download(self, hub: HubDataset, split: str) -> NumberedRows:
        if self._unreachable:
            raise NoDataError(
                f"{hub.id}: the hub cannot be reached (set HF_HUB_OFFLINE=1 to use only what was "
                "downloaded before)"
            )
        import datasets  # takes a second to load
        from huggingface_hub import constants

        rows: list[Row] = []
        try:
            for config in hub.configs:
                extra = {hub.config_field: config} if hub.config_field else {}
                data = datasets.load_dataset(hub.id, config, split=split)
                rows += [hub.adapt(dict(row)) | extra for row in data]
        # The hub, the network, parquet and missing fields each raise their own classes, some of
        # them bare Exception; in every case this dataset cannot be used.
        except Exception as problem:
            lost = isinstance(problem, ConnectionError) or "LocalEntryNotFound" in str(problem)
            # Another dataset would wait just as long. Offline by choice, nothing waits, and the
            # next dataset may be in the cache.
            self._unreachable = lost and not constants.HF_HUB_OFFLINE
            message = (first_line_of_error(problem) or "no message")[:200]
            raise NoDataError(f"{hub.id}: {type(problem).__name__}: {message}") from problem
        return list(enumerate(rows, start=1))


def passage_around(page: str, answers: Sequence[str], length: int = PASSAGE_CHARACTERS) -> str:
    """About `length` characters around the first answer in a page, in whole words; "" if none."""
    names = "|".join(re.escape(answer) for answer in answers if answer.strip())
    found = re.search(rf"(?<!\w)(?:{names})(?!\w)", page, re.IGNORECASE) if names else None
    if found is None:
        return ""
    # Two thirds stand before the answer, so that its sentence is probably whole.
    start = max(0, min(found.start() - 2 * length // 3, len(page) - length))
    passage = page[start : max(start + length, found.end())]
    if start:
        passage = passage.split(maxsplit=1)[-1]
    if start + length < len(page):
        passage = passage.rsplit(maxsplit=1)[0]
    return " ".join(passage.split())


def popqa_row_of_hub(row: Row) -> Row:
    """A row of akariasai/PopQA, whose answers are a JSON list in a string."""
    answers = json.loads(row["possible_answers"])
    return {**row, "answers": answers, "relation": row["prop"].replace(" ", "_")}


def triviaqa_row_of_hub(row: Row) -> Row:
    """A row of mandarjoshi/trivia_qa; `context` is empty without pages."""
    answers = [row["answer"]["value"], *row["answer"]["aliases"]]
    pages = (row.get("entity_pages") or {}).get("wiki_context") or []
    context = next(filter(None, (passage_around(page, answers) for page in pages)), "")
    return {**row, "answers": list(dict.fromkeys(answers)), "context": context}


def openbookqa_row_of_hub(row: Row) -> Row:
    """A row of allenai/openbookqa, configuration `additional`."""
    return {
        "question": row["question_stem"],
        "options": list(row["choices"]["text"]),
        "answer_index": list(row["choices"]["label"]).index(row["answerKey"]),
        "fact": row["fact1"],
    }


def mgsm_row_of_hub(row: Row) -> Row:
    """A row of juletxara/mgsm."""
    return {**row, "answer": str(row["answer_number"])}


def ceval_row_of_hub(row: Row) -> Row:
    """A row of ceval/ceval-exam; only its `dev` and `val` splits have answers."""
    options = [row[letter] for letter in "ABCD"]
    return {**row, "options": options, "answer_index": "ABCD".index(row["answer"])}
