"""The tables of a report, as text and as the numbers that they sort by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lirefs.comparison.cell import Cell
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT

LEVEL = 0.05
"""A difference is clear where its adjusted p value is below this."""
LEGEND = (
    "95 % intervals over items: Wilson's for shares, score intervals for their paired differences "
    "and ratios, bootstraps for other scores. p (Holm): that there is no difference from the "
    "unchanged model, on the same items (McNemar's test where each item is right or wrong, a "
    "sign-flip test otherwise), adjusted over all cells of this report. Clear, and marked *, is "
    f"only what has p (Holm) < {LEVEL:g}. Can see: the smallest true difference that so many items "
    "show with 80 % power."
)
OVERVIEW = (
    "Score over the unchanged model's on the same items, mean over a group's tasks, with its "
    "95 % interval, paired over items; 1 is no change. For language: unchanged perplexity over the "
    "variant's."
)


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: What is shown.
        value: What the cell sorts by; None for its text, NaN for nothing to sort by.
        interval: Its interval, in brackets; may be empty.
    """

    text: str
    value: float | None = None
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: What it is of.
        note: What the reader must know of it; may be empty.
        head: Names of the columns.
        rows: One entry for each column.
        marked: Numbers of the rows that stand out.
    """

    name: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    marked: frozenset[int] = field(default_factory=frozenset)


def clear(cell: Cell) -> bool:
    """Whether a difference from the unchanged model holds among all that were tested."""
    return cell.p_holm is not None and cell.p_holm < LEVEL


def overview(comparison: Comparison) -> Table:
    """Retained share of every variant in every group."""
    head = [
        f"{group} (n\u00a0=\u00a0{comparison.retained(BASELINE, group).n})"
        for group in comparison.groups
    ]
    rows = []
    for variant in comparison.variants:
        if variant == BASELINE:
            kept = [Entry("1", 1.0) for _ in comparison.groups]
        else:
            kept = [_entry(comparison.retained(variant, group)) for group in comparison.groups]
        rows.append([Entry(variant), *kept])
    return Table("Retained share by task group", OVERVIEW, ["variant", *head], rows)


def of_task(comparison: Comparison, task: str) -> Table:
    """Every variant on one task."""
    cells = [comparison.cell(variant, task) for variant in comparison.variants]
    rows = [
        [
            Entry(cell.variant),
            _entry(cell.value),
            _entry(cell.difference, signed=True),
            Entry("-", math.nan) if cell.group == CONFLICT else _entry(cell.retained),
            _p(cell),
            _number(cell.detectable),
            Entry(str(cell.value.n), cell.value.n),
            Entry(str(cell.unparsable), cell.unparsable),
        ]
        for cell in cells
    ]
    head = [
        "variant",
        f"{cells[0].metric} [95 %]",
        "difference [95 %]",
        "retained [95 %]",
        "p (Holm)",
        "can see",
        "n",
        "unparsable",
    ]
    if any(cell.extra for cell in cells):
        head.append("other metrics")
        for row, cell in zip(rows, cells, strict=True):
            other = ", ".join(f"{name} {value:.3f}" for name, value in cell.extra.items())
            row.append(Entry(other or "-"))
    marked = frozenset(row for row, cell in enumerate(cells) if clear(cell))
    return Table(task, _note(comparison, task), head, rows, marked)


def markdown(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    rows = [table.head, *(map(str, row) for row in table.rows)]
    first, *others = ("| " + " | ".join(map(_in_markdown, row)) + " |" for row in rows)
    return [first, "|" + "---|" * len(table.head), *others]


def _note(comparison: Comparison, task: str) -> str:
    info = comparison.tasks[task]
    parts = []
    if info.chance:
        parts.append(f"chance {info.chance:.2f}")
    if info.group == CONFLICT:
        parts.append("one of two competing answers, in no mean")
    elif not comparison.informative(task):
        parts.append("unchanged model not above chance, left out of the group's mean")
    return "; ".join(parts)


def _entry(estimate: Estimate | None, signed: bool = False) -> Entry:
    if estimate is None:
        return Entry("-", math.nan)
    if not math.isfinite(estimate.value):
        return Entry("n/a", math.nan)
    form = f"{'+' if signed else ''}z.{3 if abs(estimate.value) < 10 else 2}f"
    interval = f"[{estimate.low:{form}}, {estimate.high:{form}}]"
    return Entry(f"{estimate.value:{form}}", estimate.value, interval)


def _number(value: float | None) -> Entry:
    if value is None:
        return Entry("-", math.nan)
    return Entry(f"{value:.3f}" if math.isfinite(value) else "n/a", value)


def _p(cell: Cell) -> Entry:
    if cell.p_holm is None:
        return Entry("-", math.nan)
    text = "< 0.001" if cell.p_holm < 0.001 else f"{cell.p_holm:.3f}"
    return Entry(text + (" *" if clear(cell) else ""), cell.p_holm)


def _in_markdown(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
