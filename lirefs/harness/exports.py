"""A comparison for other programs: CSV for spreadsheets, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lirefs.harness.tables import LEVEL, clear
from lirefs.harness.tasks import CONFLICT
from lirefs.statistics import Estimate

if TYPE_CHECKING:
    from lirefs.harness.cells import Cell
from lirefs.harness.comparison import Comparison

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
        row: list[str | float | int | None] = [cell.variant, cell.task, cell.group, cell.metric]
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
    by_group = [
        [escape(variant), *(_share(comparison.retained(variant, group)) for group in groups)]
        for variant in variants
    ]
    by_task: list[list[str] | str] = []
    for group in groups:
        counted = comparison.counted(group)
        if counted:
            by_task.append(rf"\multicolumn{{{len(variants) + 1}}}{{l}}{{\emph{{{escape(group)}}}}}")
        for task in counted:
            cells = [comparison.cell(variant, task) for variant in variants]
            name = f"{escape(task)} ({cells[0].value.n})"
            by_task.append([name, *(_share(one.retained, clear(one)) for one in cells)])
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            *_float(
                "Share of the unchanged model's score that each variant retains, mean over the "
                "tasks of a group, with the 95\\,\\% interval of a paired bootstrap over items.",
                ["", *map(escape, groups)],
                by_group,
            ),
            "",
            *_float(
                "The same for each task on which the unchanged model is above chance (number of "
                f"items). Bold: different from the unchanged model at $p < {LEVEL:g}$ after Holm's "
                "adjustment.",
                ["", *map(escape, variants)],
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


def _share(share: Estimate | None, bold: bool = False) -> str:
    if share is None or not math.isfinite(share.value):
        return "--"
    value = rf"\textbf{{{share.value:.2f}}}" if bold else f"{share.value:.2f}"
    return rf"\shortstack{{{value}\\ \tiny {share.low:.2f}--{share.high:.2f}}}"


def _float(caption: str, head: Sequence[str], rows: Sequence[Sequence[str] | str]) -> list[str]:
    return [
        r"\begin{table*}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(_narrow(name) for name in head) + r" \\",
        r"\midrule",
        *((row if isinstance(row, str) else " & ".join(row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]


def _narrow(name: str) -> str:
    """A heading with a word a line."""
    lines = name.replace(" ", r"\\ ")
    return rf"\shortstack{{{lines}}}" if " " in name else name
