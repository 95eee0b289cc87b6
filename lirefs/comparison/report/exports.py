"""A comparison for other programs: CSV for spreadsheets, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from lirefs.comparison.cell import Cell
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.report.tables import LEVEL, clear
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT

_ENDS = ("value", "low", "high")
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line break it would begin an argument
    "]": "{]}",
    "*": "{*}",
}


def csv_text(comparison: Comparison) -> str:
    """One row for each variant on each task, with every number at full precision.

    A field is empty where there is no such number, and `nan` where it is not defined.
    """
    extras = list(dict.fromkeys(name for cell in comparison.cells() for name in cell.extra))
    head = ["variant", "task", "group", "metric", "chance", "above_chance", "n"]
    for name in ("score", "difference", "retained"):
        head += [name if end == "value" else f"{name}_{end}" for end in _ENDS]
    head += ["p", "p_holm", "detectable", "unparsable", *(f"other: {name}" for name in extras)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for cell in comparison.cells():
        names = (cell.variant, cell.task, cell.group, cell.metric)
        row: list[str | float | int | None] = []
        row += [name.replace("\r", " ") for name in names]  # the csv module does not quote it
        row += [comparison.tasks[cell.task].chance, int(comparison.informative(cell.task))]
        row.append(cell.value.n)
        for one in (cell.value, cell.difference, _retained(cell)):
            row += [None if one is None else getattr(one, end) for end in _ENDS]
        row += [cell.p, cell.p_holm, cell.detectable, cell.unparsable]
        row += [cell.extra.get(name) for name in extras]
        writer.writerow(row)
    return text.getvalue()


def latex(comparison: Comparison) -> str:
    """Two tables of retained shares, by group and by task, for a page-wide float of a paper."""
    variants, groups = comparison.variants[1:], comparison.groups
    if not variants:
        return "% No variant: nothing was changed, so there is nothing to retain.\n"
    by_group: list[str] = []
    for variant in variants:
        shares = [comparison.retained(variant, group) for group in groups]
        by_group += _row(escape(variant), shares, [False] * len(shares))
    by_task: list[str] = []
    for group in groups:
        counted = comparison.counted(group)
        if counted:
            width = len(variants) + 1
            by_task.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escape(group)}}}}} \\")
        for task in counted:
            cells = [comparison.cell(variant, task) for variant in variants]
            name = f"{escape(task)} ({cells[0].value.n})"
            by_task += _row(name, [one.retained for one in cells], [clear(one) for one in cells])
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            *_float(
                "Share of the unchanged model's score that each variant retains, mean over the "
                "tasks of a group, with 95\\,\\% intervals, paired over items.",
                groups,
                by_group,
            ),
            "",
            *_float(
                "The same for each task on which the unchanged model is above chance (number of "
                f"items). Bold: different from the unchanged model at $p < {LEVEL:g}$ after Holm's "
                "adjustment.",
                variants,
                by_task,
            ),
            "",
        ]
    )


def escape(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(text.split()))


def _retained(cell: Cell) -> Estimate | None:
    return None if cell.group == CONFLICT else cell.retained


def _row(name: str, shares: Sequence[Estimate | None], bold: Sequence[bool]) -> list[str]:
    """A line of values and, under it, a line of intervals."""
    values, intervals = [name], [""]
    for share, strong in zip(shares, bold, strict=True):
        if share is None or not math.isfinite(share.value):
            values.append("--")
            intervals.append("")
        else:
            value = f"{share.value:.2f}"
            values.append(rf"\textbf{{{value}}}" if strong else value)
            intervals.append(rf"{{\tiny {share.low:.2f}--{share.high:.2f}}}")
    return [" & ".join(values) + r" \\", " & ".join(intervals) + r" \\[2pt]"]


def _float(caption: str, columns: Sequence[str], rows: Sequence[str]) -> list[str]:
    return [
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
        r"\toprule",
        " & ".join(["", *map(_heading, columns)]) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]


def _heading(name: str) -> str:
    """A heading with a word a line."""
    words = [escape(word) for word in name.split()]
    lines = r" \\ ".join(words)
    return rf"\shortstack{{{lines}}}" if len(words) > 1 else lines
