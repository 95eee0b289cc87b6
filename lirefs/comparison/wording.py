"""Numbers as sentences say them: percentages with two digits, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lirefs.comparison.cell import Cell
from lirefs.statistics.intervals import Estimate


def as_number(value: float, sign: str = "") -> str:
    """A number with two digits, or all digits before the point."""
    return f"{value:{sign}.0f}" if abs(value) >= 9.95 else f"{value:{sign}.2g}"


def as_percent(one: Estimate) -> str:
    """A share as a percentage with its interval."""
    if not math.isfinite(one.value):
        return "n/a"
    return f"{as_number(100 * one.value)} % {percent_interval(one)}"


def percent_interval(one: Estimate) -> str:
    """The interval of a share in percent, in brackets: whole, unless the share were outside."""
    value, low, high = (100 * part for part in (one.value, one.low, one.high))
    whole = f"{low:.0f}", f"{high:.0f}"
    if float(whole[0]) <= float(as_number(value)) <= float(whole[1]):
        return f"[{whole[0]}, {whole[1]}]"
    return f"[{as_number(low)}, {as_number(high)}]"


def as_points(one: Estimate) -> str:
    """A difference between shares in percentage points, with its interval."""
    if not math.isfinite(one.value):
        return "n/a"
    value, low, high = (100 * part for part in (one.value, one.low, one.high))
    return f"{as_number(value, '+')} points [{low:+.0f}, {high:+.0f}]"


def as_p(cell: Cell) -> str:
    """The adjusted p-value of a cell."""
    if cell.p_holm is None or math.isnan(cell.p_holm):
        return "n/a"
    return "< 0.001" if cell.p_holm < 0.001 else f"{cell.p_holm:.3f}"


def as_list_of_words(names: Sequence[str]) -> str:
    """Names as a sentence lists them: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def as_duration(seconds: float) -> str:
    """A time in the two largest units that it has: "3 min 5 s"."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
