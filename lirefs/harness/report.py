"""The report of a comparison: Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lirefs.files import atomic_write_bytes
from lirefs.harness import plots
from lirefs.harness.comparison import BASELINE, Cell, Comparison
from lirefs.harness.tasks import CONFLICT
from lirefs.statistics import Estimate


@dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
        name: File name without its ending.
        title: Heading.
        caption: What is shown, with n and where the intervals come from.
        png: The picture.
    """

    name: str
    title: str
    caption: str
    png: bytes = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write the picture as `name.png`."""
        atomic_write_bytes(folder / f"{self.name}.png", self.png)

    @property
    def data_uri(self) -> str:
        """The picture as a `data:` address, so that the page needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def default_figures(comparison: Comparison) -> list[Figure]:
    """The chart that every comparison has: retained performance by task group."""
    return [
        Figure(
            "retained",
            "Retained performance by task group",
            "Share of the unchanged model's score, mean over the tasks of a group; for language, "
            "the unchanged perplexity over the variant's. Bars are 95 % intervals of a paired "
            f"bootstrap over items ({comparison.resamples} resamples). Tasks on which the "
            "unchanged model is not above chance are left out; n counts the items of the others.",
            plots.retained_performance(comparison),
        )
    ]


def markdown(comparison: Comparison, figures: Sequence[Figure]) -> str:
    """The report as Markdown; figures are linked as files beside it."""
    lines = [f"# {_title(comparison)}", ""]
    lines += [f"* {finding}" for finding in _findings(comparison)]
    lines += ["", "## Overview: retained share by task group", ""]
    head, *rows = _overview(comparison)
    lines += _markdown_table(head, rows)
    for figure in figures:
        lines += ["", f"## {figure.title}", "", f"![{figure.title}]({figure.name}.png)", ""]
        lines += [figure.caption]
    lines += ["", "## Every task", ""]
    for task in comparison.tasks:
        lines += ["", f"### {_task_title(comparison, task)}", ""]
        lines += _markdown_table(
            _TASK_HEAD, [_task_row(comparison.cell(v, task)) for v in comparison.variants]
        )
    lines += ["", "## Settings", "", "```json"]
    lines += [json.dumps(comparison.provenance, indent=1, default=str), "```", ""]
    return "\n".join(lines)


def html(comparison: Comparison, figures: Sequence[Figure]) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    source = (resources.files("lirefs.harness") / "report.html.j2").read_text("utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    head, *rows = _overview(comparison)
    tasks = []
    for task in comparison.tasks:
        cells = [comparison.cell(variant, task) for variant in comparison.variants]
        rows_of_task = [(_task_row(cell), _clear(cell.difference)) for cell in cells]
        tasks.append({"title": _task_title(comparison, task), "rows": rows_of_task})
    return template.render(
        title=_title(comparison),
        findings=_findings(comparison),
        overview_head=head,
        overview=rows,
        figures=figures,
        task_head=_TASK_HEAD,
        tasks=tasks,
        settings=json.dumps(comparison.provenance, indent=1, default=str),
    )


_TASK_HEAD = [
    "variant",
    "score [95 % interval]",
    "difference [95 % interval]",
    "retained [95 % interval]",
    "n",
    "unparsable",
    "other metrics",
]


def _title(comparison: Comparison) -> str:
    return f"Reasoning against recitation in {comparison.provenance.get('model_name', 'a model')}"


def _findings(comparison: Comparison) -> list[str]:
    return [str(one) for one in comparison.provenance.get("findings", [])]


def _task_title(comparison: Comparison, task: str) -> str:
    info = comparison.tasks[task]
    parts = [info.group, info.metric]
    if info.chance:
        parts.append(f"chance {info.chance:.2f}")
    if info.group == CONFLICT:
        parts.append("one of two competing answers, in no mean")
    elif not comparison.informative(task):
        parts.append("unchanged model not above chance, left out of the group's mean")
    return f"{task} ({'; '.join(parts)})"


def _overview(comparison: Comparison) -> list[list[str]]:
    rows = [["variant", *comparison.groups]]
    for variant in comparison.variants:
        if variant == BASELINE:
            rows.append([variant, *("1" for _ in comparison.groups)])
        else:
            kept = [comparison.retained(variant, group) for group in comparison.groups]
            rows.append([variant, *(f"{_show(one)} (n = {one.n})" for one in kept)])
    return rows


def _task_row(cell: Cell) -> list[str]:
    extra = ", ".join(f"{name} {value:.3f}" for name, value in cell.extra.items())
    return [
        cell.variant,
        _show(cell.value),
        _show(cell.difference, signed=True),
        "-" if cell.group == CONFLICT else _show(cell.retained),
        str(cell.value.n),
        str(cell.unparsable),
        extra,
    ]


def _show(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    if not math.isfinite(estimate.value):
        return "n/a"
    digits = 3 if abs(estimate.value) < 10 else 2
    return format(estimate, f"{'+' if signed else ''}.{digits}f")


def _clear(difference: Estimate | None) -> bool:
    """Whether the interval of a difference excludes 0."""
    return difference is not None and (difference.low > 0 or difference.high < 0)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
