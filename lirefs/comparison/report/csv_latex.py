"""A comparison for other programs: CSV for spreadsheets, LaTeX for papers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from lirefs.comparison.cell import LEVEL
from lirefs.comparison.summary import Summary
from lirefs.errors import visible
from lirefs.statistics.intervals import Estimate

_NAMES = ("backslash", "asciicircum", "asciitilde", "less", "greater", "bar")
_ESCAPES = str.maketrans(
    {one: rf"\text{name}{{}}" for one, name in zip("\\^~<>|", _NAMES, strict=True)}
    | {one: rf"\{one}" for one in "{}$&#%_"}
    | {one: f"{{{one}}}" for one in "[]*"}  # after a line break they would begin an argument
)


def csv_text(summary: Summary) -> str:
    """`Summary.rows` as CSV: empty without a number, `nan` where it is undefined."""
    rows = summary.rows()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (rows[0], *(one.values() for one in rows)):
        writer.writerow(_csv_cell(one) if isinstance(one, str) else one for one in row)
    return text.getvalue()


def _csv_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    text = visible(text)  # a carriage return too, which the csv module does not quote
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


def latex_tables(summary: Summary) -> str:
    """Two tables of retained shares, by group and by task, for a page-wide float of a paper."""
    variants, groups = summary.variants[1:], list(summary.groups)
    if not variants:
        return "% No variant: nothing was changed, so there is nothing to retain.\n"
    by_group: list[str] = []
    for variant in variants:
        by_group += _row(
            escape_latex(variant), [(summary.means[variant, one], False) for one in groups]
        )
    by_task: list[str] = []
    for group, tasks in summary.groups.items():
        if tasks:
            width = len(variants) + 1
            by_task.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{escape_latex(group)}}}}} \\")
        for task in tasks:
            _, *cells = summary.of_task(task)
            shares = [(one.retained, one.clear) for one in cells]
            by_task += _row(f"{escape_latex(task)} ({cells[0].value.n})", shares)
    missing = escape_latex(summary.not_finite())
    missing = f" {missing}" if missing else ""
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            *_float(
                "Share of the unchanged model's score that each variant retains, mean over the "
                "tasks of a group, with 95\\,\\% intervals, paired over items."
                f"{missing.replace('n/a', '--')}",
                groups,
                by_group,
            ),
            "",
            *_float(
                "The same for each task on which the unchanged model is above chance (number of "
                f"items). Bold: different from the unchanged model at $p < {LEVEL:g}$ after Holm's "
                f"adjustment.{missing.replace('n/a', '--')}",
                variants,
                by_task,
            ),
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """A text as LaTeX prints it."""
    return " ".join(visible(text).split()).translate(_ESCAPES)


def _row(name: str, shares: Sequence[tuple[Estimate | None, bool]]) -> list[str]:
    """A line of values, bold where the flag says so, and a line of intervals below it."""
    values, intervals = [name], [""]
    for share, strong in shares:
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
    """A heading with one word per line."""
    lines = r" \\ ".join(map(escape_latex, name.split()))
    return rf"\shortstack{{{lines}}}" if " " in lines else lines
