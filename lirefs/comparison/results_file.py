"""A comparison as a JSON file, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirefs.comparison.comparison import BASELINE, Comparison, TaskInfo
from lirefs.errors import ResultsFileError
from lirefs.files import parse_json
from lirefs.tasks.task import ItemResult

if TYPE_CHECKING:
    from lirefs.comparison.figures.figure import Figure

FORMAT = "lirefs-comparison-2"
MOST_RESAMPLES = 100_000
_LEVELS = 300  # what can be read can be written again, which takes two calls a level
_FIGURE = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}")
_ASKED = ("id", "weight", "prompt", "expected")
_GIVEN = ("scores", "output", "parsed")


def dumps(comparison: Comparison, figures: Sequence[Figure] = ()) -> str:
    """A comparison as JSON text: settings, every cell, every item.

    What was asked stands once for each task; what a variant gave, in the same order.
    """
    tasks = {
        name: {
            **asdict(info),
            "informative": comparison.informative(name),
            "items": [
                {field: getattr(item, field) for field in _ASKED}
                for item in comparison.results[BASELINE][name]
            ],
        }
        for name, info in comparison.tasks.items()
    }
    value = {
        "format": FORMAT,
        "provenance": comparison.provenance,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "figures": [
            {"name": one.name, "title": one.title, "caption": one.caption} for one in figures
        ],
        "cells": [asdict(cell) for cell in comparison.cells()],
        "tasks": tasks,
        "results": {
            variant: {
                task: [{field: getattr(item, field) for field in _GIVEN} for item in items]
                for task, items in by_task.items()
            }
            for variant, by_task in comparison.results.items()
        },
    }
    return json.dumps(plain(value), indent=1)


def load(path: Path) -> Comparison:
    """Read what `dumps` wrote; see `Comparison.load`."""
    file = file_of(path)
    data = read(file)
    try:
        tasks = {
            name: _task_info(one["group"], one["metric"], one["chance"])
            for name, one in data["tasks"].items()
        }
        results = {
            variant: {
                task: [
                    item_of({**asked, **given})
                    for asked, given in zip(
                        data["tasks"][task]["items"], by_task[task], strict=True
                    )
                ]
                for task in tasks
            }
            for variant, by_task in data["results"].items()
        }
        _check_settings(data)
        comparison = Comparison(results, tasks, data["provenance"], data["resamples"], data["seed"])
        if next(iter(results), None) != BASELINE or not all(results[BASELINE].values()):
            raise ValueError(f"no items of {BASELINE!r}, or not in the first place")
        comparison.cells()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as problem:
        raise ResultsFileError(
            f"{file}: damaged ({type(problem).__name__}: {str(problem)[:200]}); run the comparison "
            "again"
        ) from problem
    return comparison


def item_of(row: Mapping[str, Any]) -> ItemResult:
    """An item as a file has it, or a part of a journal.

    Raises:
        KeyError: It has no scores.
        TypeError: A field is missing, unknown or not of its type.
    """
    item = ItemResult(**{**row, "scores": _numbers(row["scores"])})
    texts = (item.id, item.prompt, item.expected, item.output)
    if not all(isinstance(one, str) for one in texts) or not isinstance(item.parsed, bool):
        raise TypeError(f"item {item.id!r:.80} has a field of another type")
    if not is_number(item.weight) or not 0 < item.weight < math.inf:
        raise TypeError(f"item {item.id!r:.80} weighs {item.weight!r:.80}")
    return item


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _task_info(group: Any, metric: Any, chance: Any) -> TaskInfo:
    if not isinstance(group, str) or not isinstance(metric, str):
        raise TypeError(f"group {group!r:.80} or metric {metric!r:.80} is no text")
    if not is_number(chance) or not 0 <= chance <= 1:
        raise ValueError(f"chance is {chance!r:.80}")
    return TaskInfo(group, metric, float(chance))


def _check_settings(data: Mapping[str, Any]) -> None:
    resamples, seed, provenance = (data[key] for key in ("resamples", "seed", "provenance"))
    if type(resamples) is not int or not 1 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples is {resamples!r:.80}, expected 1 to {MOST_RESAMPLES}")
    if type(seed) is not int:
        raise TypeError(f"seed is {seed!r:.80}")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("findings", []), list):
        raise TypeError("provenance is no object, or its findings no list")


def listed_figures(file: Path) -> list[dict[str, str]]:
    """Name, title and caption of each figure that was saved with a comparison.

    Raises:
        ResultsFileError: The list is damaged, or the file cannot be read.
    """
    try:
        found = [
            {key: one[key] for key in ("name", "title", "caption")} for one in read(file)["figures"]
        ]
    except (KeyError, TypeError) as problem:
        raise ResultsFileError(
            f"{file}: its list of figures is damaged ({type(problem).__name__}: {problem})"
        ) from problem
    for one in found:
        if not all(isinstance(text, str) for text in one.values()):
            raise ResultsFileError(f"{file}: its list of figures holds something that is no text")
        if not _FIGURE.fullmatch(one["name"]):
            raise ResultsFileError(
                f"{file}: {one['name']!r:.80} is not the name of a file beside it"
            )
    return found


def file_of(path: Path) -> Path:
    """The results file that a path names, itself or by its folder."""
    return path / "results.json" if path.is_dir() else path


def read(file: Path) -> dict[str, Any]:
    """The JSON object of a results file, its version checked.

    Raises:
        ResultsFileError: The file is missing, no JSON, or of another version.
    """
    try:
        data = parse_json(file.read_text("utf-8"), levels=_LEVELS)
    except OSError as problem:
        raise ResultsFileError(f"{file}: cannot be read ({problem.strerror})") from problem
    except ValueError as problem:
        raise ResultsFileError(f"{file}: no JSON of a comparison ({problem})") from problem
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != FORMAT:
        raise ResultsFileError(f"{file}: format {found!r:.80}, this version reads {FORMAT!r}")
    return data


def _numbers(scores: Mapping[str, float | None]) -> dict[str, float]:
    numbers = {name: math.nan if value is None else value for name, value in scores.items()}
    if not all(map(is_number, numbers.values())):
        raise TypeError(f"scores are {scores!r:.80}")
    return {name: float(value) for name, value in numbers.items()}


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: no tuples, None for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
