"""A comparison as a JSON file, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirefs.errors import ResultsFileError
from lirefs.harness.comparison import BASELINE, Comparison, TaskInfo
from lirefs.harness.tasks import ItemResult

if TYPE_CHECKING:
    from lirefs.harness.report import Figure

FORMAT = "lirefs-comparison-2"
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
            name: TaskInfo(one["group"], one["metric"], float(one["chance"]))
            for name, one in data["tasks"].items()
        }
        results = {
            variant: {
                task: [
                    ItemResult(**asked, **given | {"scores": _numbers(given["scores"])})
                    for asked, given in zip(
                        data["tasks"][task]["items"], by_task[task], strict=True
                    )
                ]
                for task in tasks
            }
            for variant, by_task in data["results"].items()
        }
        comparison = Comparison(
            results, tasks, data["provenance"], int(data["resamples"]), int(data["seed"])
        )
        if BASELINE not in results or not all(results[BASELINE].values()):
            raise ValueError(f"no items of {BASELINE!r}")
        comparison.cells()
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ResultsFileError(
            f"{file}: damaged ({type(problem).__name__}: {problem}); run the comparison again"
        ) from problem
    return comparison


def listed_figures(file: Path) -> list[dict[str, str]]:
    """Name, title and caption of each figure that was saved with a comparison.

    Raises:
        ResultsFileError: The list is damaged, or the file cannot be read.
    """
    try:
        found = [
            {key: str(one[key]) for key in ("name", "title", "caption")}
            for one in read(file)["figures"]
        ]
    except (KeyError, TypeError) as problem:
        raise ResultsFileError(
            f"{file}: its list of figures is damaged ({type(problem).__name__}: {problem})"
        ) from problem
    for one in found:
        if Path(one["name"]).name != one["name"]:
            raise ResultsFileError(f"{file}: {one['name']!r} is not the name of a file beside it")
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
        data = json.loads(file.read_text("utf-8"))
    except OSError as problem:
        raise ResultsFileError(f"{file}: cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise ResultsFileError(f"{file}: no JSON of a comparison ({problem})") from problem
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != FORMAT:
        raise ResultsFileError(f"{file}: format {found!r}, this version reads {FORMAT!r}")
    return data


def _numbers(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in scores.items()}


def plain(value: Any) -> Any:
    """A value as it comes back from JSON: no tuples, None for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
