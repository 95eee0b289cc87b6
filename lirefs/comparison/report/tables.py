"""The tables of a report: the texts shown, and the numbers that they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lirefs.comparison.cell import LEVEL, Cell
from lirefs.comparison.summary import Summary
from lirefs.comparison.wording import (
    as_duration,
    as_list_of_words,
    as_number,
    as_p,
    as_points,
    percent_interval,
)
from lirefs.files import in_markdown
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT

STATISTICS = (
    "95 % intervals over items: Wilson intervals for shares, score intervals for their paired "
    "differences and ratios, bootstrap intervals for other scores. p (Holm): p-value of no "
    "difference from the unchanged model on the same items (McNemar's test where each item is "
    "right or wrong, a sign-flip test otherwise), adjusted over all cells of this report. A "
    f"difference is clear, and marked *, only where p (Holm) < {LEVEL:g}. Intervals are not "
    "adjusted: one in twenty misses its true value, so an interval may leave out no change where "
    "p (Holm) does not. Detectable: the smallest true difference that this many items detect with "
    "80 % power."
)
ADJUSTED = "Intervals are for one comparison each; p (Holm) is adjusted for all of this report."
OVERVIEW = (
    "Share of the unchanged model's score on the same items that is retained: the mean over a "
    "group's tasks with its 95 % interval, paired over items and not adjusted; 100 % means no "
    "change. For language: perplexity of the unchanged model over the variant's."
)
EQUAL_WITHIN = 0.01
"""Largest difference between perplexities on test texts that are called equal, as a share."""


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, and an interval in brackets, which may be empty.

    `value` is the number to sort by; None to sort by text, NaN if there is nothing to sort by.
    """

    text: str
    value: float | None = None
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


_NONE = Entry("-", math.nan)


@dataclass(frozen=True)
class Table:
    """A table; `note` is what a reader must know.

    `marked` has the rows that stand out, `grey` those of controls.
    """

    name: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    marked: frozenset[int] = frozenset()
    grey: frozenset[int] = frozenset()


def about_run(summary: Summary) -> list[tuple[str, str]]:
    """What a reader asks first: the model, and when, how and for how long it was run."""
    run = summary.run
    time = as_duration(run["seconds"]) if "seconds" in run else ""
    about = {
        "model": summary.model,
        "date": run.get("started", "")[:16].replace("T", " "),
        "command": run.get("command", ""),
        "run time": f"{time} after it was resumed" if time and run.get("resumed") else time,
    }
    return [(name, value) for name, value in about.items() if value]


def legend(summary: Summary) -> list[tuple[str, list[str]]]:
    """Which variants are methods and which are controls; without a kind that has none."""
    controls = [name for name in summary.methods_first if name in summary.controls]
    kinds = {"Methods": summary.methods, "Controls": controls}
    return [(name, some) for name, some in kinds.items() if some]


def overview_table(summary: Summary) -> Table:
    """Retained share of every variant in every group, in percent."""
    base, *variants = summary.methods_first
    head = [f"{group} (n\u00a0=\u00a0{summary.means[base, group].n})" for group in summary.groups]
    rows = [[Entry(base), *(Entry("100\u00a0%", 1.0) for _ in summary.groups)]]
    rows += [[Entry(v), *(_share(summary.means[v, g]) for g in summary.groups)] for v in variants]
    if summary.equal:
        head.append("at the perplexity of")
        for row in rows:
            goals = [goal for goal, some in summary.equal.items() if row[0].text in some]
            row.append(Entry(as_list_of_words(goals) if goals else "-"))
    name = "How much of each group of tasks is retained"
    note = " ".join(filter(None, (OVERVIEW, _guessing(summary), summary.not_finite())))
    return Table(name, note, ["variant", *head], rows, grey=_grey(summary))


def equal_tables(summary: Summary) -> list[Table]:
    """For each variant that others were set to: all of them, at one perplexity."""
    return [_equal_table(summary, goal, some) for goal, some in summary.equal.items()]


def _equal_table(summary: Summary, goal: str, others: Sequence[str]) -> Table:
    language = summary.language or ""
    base = summary.cells[goal, language].value
    rows, unequal, largest = [], [], 0.0
    for name in (goal, *others):
        value = summary.cells[name, language].value
        off = value.value / base.value - 1
        largest = max(largest, abs(off))
        if not abs(off) <= EQUAL_WITHIN:
            unequal.append(name)
        shown = f"{100 * off:+.2f}\u00a0%" if math.isfinite(off) else "n/a"
        apart = Entry("-" if name == goal else shown, off)
        shares = (_share(summary.means[name, group]) for group in summary.groups)
        rows.append([Entry(name), _entry(value), apart, *shares])
    found = f"differ by at most {100 * largest:.2f}\u00a0%"
    if unequal:
        found = (
            f"differ by more than {100 * EQUAL_WITHIN:g}\u00a0% for "
            f"{as_list_of_words(unequal)}, which cannot be compared here"
        )
    note = (
        f"Set to the perplexity of {goal} on validation texts. On the {base.n} test texts of "
        f"{language}, perplexities {found}."
    )
    note = " ".join(filter(None, (note, summary.not_finite())))
    head = ["variant", "perplexity [95 %]", f"over {goal}'s", *summary.groups]
    grey = frozenset(row for row, name in enumerate((goal, *others)) if name in summary.controls)
    return Table(f"Equal damage: at the perplexity of {goal}", note, head, rows, grey=grey)


def _guessing(summary: Summary) -> str:
    """What a variant would retain of each group by guessing, which shares do not correct for."""
    base, shares = summary.variants[0], []
    for group, some in summary.groups.items():
        scores = {task: summary.cells[base, task].value.value for task in some}
        kept = [summary.tasks[task].chance / score for task, score in scores.items() if score > 0]
        if any(kept):
            shares.append(f"{as_number(100 * sum(kept) / len(kept))} % of {group}")
    if not shares:
        return ""
    return f"Shares are not corrected for chance: guessing would retain {as_list_of_words(shares)}."


def task_table(summary: Summary, task: str) -> Table:
    """Every variant on one task."""
    cells = [summary.cells[variant, task] for variant in summary.methods_first]
    share = summary.tasks[task].metric != "perplexity" and all(
        0 <= cell.value.value <= 1 for cell in cells if math.isfinite(cell.value.value)
    )
    score = _share if share else _entry
    points = ", points" if share else ""
    rows = [
        {
            "variant": Entry(cell.variant),
            f"{cell.metric} [95 %]": _missing(cell) if cell.not_finite else score(cell.value),
            f"difference{points} [95 %]": _difference(cell.difference, share),
            "retained [95 %]": _share(None if cell.group == CONFLICT else cell.retained),
            "p (Holm)": _p(cell),
            f"detectable{points}": _number(cell.detectable, 100 if share else 1),
            "n": Entry(str(cell.value.n), cell.value.n),
            "unparsable": Entry(str(cell.unparsable), cell.unparsable),
        }
        for cell in cells
    ]
    if any(cell.extra for cell in cells):
        for row, cell in zip(rows, cells, strict=True):
            other = ", ".join(
                f"{name} {f'{value:.2f}' if math.isfinite(value) else 'n/a'}"
                for name, value in cell.extra.items()
            )
            row["other metrics"] = Entry(other or "-")
    marked = frozenset(row for row, cell in enumerate(cells) if cell.clear)
    entries = [list(row.values()) for row in rows]
    note = "; ".join(filter(None, (summary.note(task), summary.not_finite([task]).rstrip("."))))
    return Table(task, note, list(rows[0]), entries, marked, _grey(summary))


def _missing(cell: Cell) -> Entry:
    return Entry(f"n/a ({cell.not_finite} of {cell.value.n} items not finite)", math.nan)


def _grey(summary: Summary) -> frozenset[int]:
    names = enumerate(summary.methods_first)
    return frozenset(row for row, name in names if name in summary.controls)


def _share(share: Estimate | None) -> Entry:
    """A share as a percentage with two digits."""
    if share is None or not math.isfinite(share.value):
        return _entry(share)
    return Entry(f"{as_number(100 * share.value)}\u00a0%", share.value, percent_interval(share))


def markdown_table(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    rows = [table.head, *(map(str, row) for row in table.rows)]
    first, *others = ("| " + " | ".join(map(in_markdown, row)) + " |" for row in rows)
    return [first, "|" + "---|" * len(table.head), *others]


def _entry(estimate: Estimate | None) -> Entry:
    """A number with four significant digits."""
    if estimate is None:
        return _NONE
    if not math.isfinite(estimate.value):
        return Entry("n/a", math.nan)
    interval = f"[{_digits(estimate.low)}, {_digits(estimate.high)}]"
    return Entry(_digits(estimate.value), estimate.value, interval)


def _difference(estimate: Estimate | None, share: bool) -> Entry:
    """A difference, in points with two digits between shares."""
    if estimate is None:
        return _NONE
    if not math.isfinite(estimate.value):
        return Entry("n/a", math.nan)
    if share:
        text, interval = as_points(estimate).split(" points ")
        return Entry(text, estimate.value, interval)
    text, low, high = (f"{one:+.3f}" for one in (estimate.value, estimate.low, estimate.high))
    return Entry(text, estimate.value, f"[{low}, {high}]")


def _digits(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    if abs(value) >= 1000 or not math.isfinite(value):
        return f"{value:,.0f}"
    return f"{value:.{4 - max(1, len(str(int(abs(value)))))}f}"


def _number(value: float | None, times: int) -> Entry:
    if value is None:
        return _NONE
    return Entry(as_number(times * value) if math.isfinite(value) else "n/a", value)


def _p(cell: Cell) -> Entry:
    if cell.p_holm is None:
        return _NONE
    return Entry(as_p(cell) + (" *" if cell.clear else ""), cell.p_holm)
