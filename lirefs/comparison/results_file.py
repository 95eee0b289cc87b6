"""A comparison as a JSON file, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from lirefs.comparison.cell import TaskInfo
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.summary import plain_json
from lirefs.errors import ResultsFileError, must_be
from lirefs.files import parse_json, read_regular
from lirefs.tasks.task import ItemResult

FORMAT = "lirefs-comparison-2"
MOST_RESAMPLES = 100_000
_LEVELS = 300  # what can be read can be written again, which takes two calls per level
_MOST_BYTES = 2 << 30
_OUTER = 4  # down to the items, of which each has a line
_FIGURE_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,199}")
_ASKED = ("id", "weight", "prompt", "expected")
_GIVEN = ("scores", "output", "parsed")


def results_json(
    comparison: Comparison, figures: Sequence[Figure] = (), run: Mapping[str, Any] | None = None
) -> str:
    """A comparison as JSON text: settings, every cell, every item.

    The prompts stand once for each task; the outputs of each variant follow in the same order.
    Only `run`, which a report takes from the comparison, differs from one run to the next.
    """
    named = {"title": comparison.title, "notes": comparison.notes, "run": run}
    value = {
        "format": FORMAT,
        "provenance": comparison.provenance,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        **{key: one for key, one in named.items() if one},
        "figures": [
            {
                "name": one.name,
                "title": one.title,
                "caption": one.caption,
                "sha256": one.sha256,
            }
            for one in figures
        ],
        "cells": [asdict(cell) for cell in comparison.cells()],
        "tasks": {
            name: {
                **asdict(info),
                "informative": comparison.informative(name),
                "items": _fields(comparison.results[BASELINE][name], _ASKED),
            }
            for name, info in comparison.tasks.items()
        },
        "results": {
            variant: {task: _fields(items, _GIVEN) for task, items in by_task.items()}
            for variant, by_task in comparison.results.items()
        },
    }
    return _by_lines(plain_json(value), _OUTER)


def _by_lines(value: Any, levels: int) -> str:
    """JSON whose outer levels have a line for each entry; what lies deeper stands on one line."""
    if levels == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, list):
        return "[\n" + ",\n".join(_by_lines(one, levels - 1) for one in value) + "\n]"
    entries = (f"{json.dumps(key)}: {_by_lines(one, levels - 1)}" for key, one in value.items())
    return "{\n" + ",\n".join(entries) + "\n}"


def _fields(items: Sequence[ItemResult], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: getattr(item, name) for name in names} for item in items]


def load_comparison(path: str | Path) -> Comparison:
    """Read a comparison, with all its items, from its `results.json` or the folder of that.

    Raises:
        ResultsFileError: The file is missing, damaged, or of another version.
    """
    file = results_path(path)
    data = _read(file)
    try:
        tasks = {name: _task_info(one) for name, one in data["tasks"].items()}
        results = {
            variant: {name: _items(data["tasks"][name]["items"], by_task[name]) for name in tasks}
            for variant, by_task in data["results"].items()
        }
        _check_settings(data)
        comparison = Comparison(
            results,
            tasks,
            data["provenance"],
            data["resamples"],
            data["seed"],
            data.get("title", ""),
            tuple(data.get("notes", [])),
            data.get("run", {}),
        )
        if next(iter(results), None) != BASELINE or not all(results[BASELINE].values()):
            raise ValueError(f"the first variant is not {BASELINE!r}, or one of its tasks is empty")
        comparison.cells()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as problem:
        raise ResultsFileError(
            f"{file}: damaged ({type(problem).__name__}: {str(problem)[:200]}); run the comparison "
            "again"
        ) from problem
    return comparison


def _items(asked: Sequence[Any], given: Sequence[Any]) -> list[ItemResult]:
    return [item_of_results({**one, **other}) for one, other in zip(asked, given, strict=True)]


def item_of_results(row: Mapping[str, Any]) -> ItemResult:
    """An item from a row of a results file or of a journal; KeyError or TypeError if damaged."""
    scores = {name: math.nan if one is None else one for name, one in row["scores"].items()}
    if not all(map(_is_number, scores.values())):
        raise TypeError(f"scores are {scores!r:.80}")
    weight = row.get("weight", 1.0)
    weight = math.nan if weight is None or weight == math.inf else weight
    scores = {name: float(one) for name, one in scores.items()}
    item = ItemResult(**{**row, "scores": scores, "weight": weight})
    texts = (item.id, item.prompt, item.expected, item.output)
    if not all(isinstance(one, str) for one in texts) or not isinstance(item.parsed, bool):
        raise TypeError(f"a field of item {item.id!r:.80} has the wrong type")
    if not _is_number(weight) or weight <= 0:
        raise TypeError(f"item {item.id!r:.80} has weight {weight!r:.80}")
    return item


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _task_info(row: Mapping[str, Any]) -> TaskInfo:
    group, metric, chance = row["group"], row["metric"], row["chance"]
    if not isinstance(group, str) or not isinstance(metric, str):
        raise TypeError(f"group {group!r:.80} or metric {metric!r:.80} is not a string")
    if not _is_number(chance) or not 0 <= chance <= 1:
        raise ValueError(f"chance is {chance!r:.80}")
    return TaskInfo(group, metric, float(chance))


def _check_settings(data: Mapping[str, Any]) -> None:
    resamples, seed, provenance = (data[key] for key in ("resamples", "seed", "provenance"))
    if type(resamples) is not int or not 1 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples is {resamples!r:.80}, expected 1 to {MOST_RESAMPLES}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed is {seed!r:.80}")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("findings", []), list):
        raise TypeError("provenance is not an object, or its findings are not a list")
    title, notes, run = data.get("title", ""), data.get("notes", []), data.get("run", {})
    if not isinstance(notes, list) or not all(isinstance(one, str) for one in (title, *notes)):
        raise TypeError("the title or a note is not a string")
    texts = [run.get(key, "") for key in ("started", "command")] if isinstance(run, dict) else [0]
    if not all(isinstance(one, str) for one in texts) or not _is_number(run.get("seconds", 0)):
        raise TypeError("started, command or seconds of the run has the wrong type")
    if not 0 <= run.get("seconds", 0) < math.inf:
        raise ValueError(f"seconds of the run is {run['seconds']!r:.80}")


def figures_in_results(file: Path) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Name, title and caption of each saved figure, and the SHA-256 of its files by extension.

    Reports of earlier versions have no SHA-256.
    """
    try:
        figures = _read(file)["figures"]
        texts = [{key: one[key] for key in ("name", "title", "caption")} for one in figures]
        found = [(text, one.get("sha256", {})) for text, one in zip(texts, figures, strict=True)]
        for one, digests in found:
            if not all(isinstance(text, str) for text in (*one.values(), *digests.values())):
                raise TypeError("a name, title, caption or digest is not a string")
            if not _FIGURE_NAME.fullmatch(one["name"]):
                raise ValueError(f"{one['name']!r:.80} is not the name of a figure file")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ResultsFileError(
            f"{file}: its list of figures is damaged ({type(problem).__name__}: {problem})"
        ) from problem
    return found


def results_path(path: str | Path) -> Path:
    """The results file that a path names, directly or by its folder."""
    must_be(path, (str, PathLike), "path", ResultsFileError)
    path = Path(path)
    return path / "results.json" if path.is_dir() else path


def _read(file: Path) -> dict[str, Any]:
    """The JSON object of a results file of this version."""
    try:
        data = parse_json(read_regular(file, _MOST_BYTES).decode("utf-8"), levels=_LEVELS)
    except OSError as problem:
        absent = isinstance(problem, FileNotFoundError)
        if file.name == "results.json" and file.parent.is_dir() and absent:
            raise ResultsFileError(
                f"{file.parent}: holds no results.json, so its run is unfinished; continue it with "
                f"`lirefs compare ... --out {file.parent} --resume`"
            ) from problem
        raise ResultsFileError(f"{file}: cannot be read ({problem.strerror})") from problem
    except ValueError as problem:
        raise ResultsFileError(f"{file}: not the JSON of a comparison ({problem})") from problem
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != FORMAT:
        raise ResultsFileError(f"{file}: format {found!r:.80}, this version reads {FORMAT!r}")
    return data
