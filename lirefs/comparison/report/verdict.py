"""The verdict of a report: at most three sentences, each with one number and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lirefs.comparison.cell import Cell
from lirefs.comparison.summary import Summary
from lirefs.comparison.wording import as_list_of_words, as_percent
from lirefs.statistics.intervals import Estimate

RECITED = "memorization"


def verdict(summary: Summary) -> list[str]:
    """The sentences of `_found`, and one on scores that are not finite, if there are any."""
    return [*_found(summary), *filter(None, [summary.not_finite()])]


def _found(summary: Summary) -> list[str]:
    """What the methods do to recitation, what that costs, and whether controls do the same.

    All methods and all tasks on which the unchanged model is above chance are looked at. The
    method of the cost lowers memorization most; of those that lower it equally, it is the one
    whose least retained other task retains most; another method that retains less of some task is
    named too. Where nothing is recited, the verdict names what is retained least and what is
    raised most.
    """
    controls = [name for name in summary.variants if name in summary.controls]
    tasks = [task for some in summary.groups.values() for task in some]
    if not summary.methods:
        return []
    if not tasks:
        return ["The unchanged model is above chance on no task, so there is nothing to retain."]
    if summary.groups.get(RECITED):
        return _of_recitation(summary, controls)
    least = _least(summary, summary.methods, tasks)
    most = _most(summary, summary.methods, tasks)
    lines = []
    if least is not None:
        lines.append(
            f"{_of_all(tasks)}{least.task} is retained least, under {least.variant}: "
            f"{_kept(least)}."
        )
    if most is not None:
        lines.append(
            f"{most.variant} raises {most.task} most, to {_percent(most.retained)} of the "
            "unchanged model's score."
        )
    if not controls:
        return [*lines, _NO_CONTROL]
    rival = _least(summary, controls, tasks)
    if rival is not None:
        lines.append(
            f"Under the controls, {rival.task} is retained least, by {rival.variant}: "
            f"{_kept(rival)}."
        )
    return lines


_NOT_ALONE = "so what tells a method from them is how much else it keeps"
_NO_CONTROL = "No control was run, so a random change of the same size may do the same."


def _of_recitation(summary: Summary, controls: Sequence[str]) -> list[str]:
    """The verdict where the unchanged model recites something."""
    others = [task for group, some in summary.groups.items() if group != RECITED for task in some]
    lowest = _lowest(summary, summary.methods, others)
    if not lowest:
        return []
    share = summary.means[lowest[0], RECITED]
    names = as_list_of_words(lowest)
    if share.high < 1:
        verb = "lowers" if len(lowest) == 1 else "lower"
        lines = [f"{names} {verb} {RECITED} to {_percent(share)} of the unchanged model's score."]
    else:
        lines = [f"No method clearly lowers {RECITED}: {names}, the lowest, at {_percent(share)}."]
    cost = _least(summary, lowest[:1], others)
    if cost is not None:
        among = f"of the {len(others)} other tasks" if len(others) > 1 else "of another task"
        line = f"What {cost.variant} keeps least {among} is {cost.task}, {_kept(cost)}"
        worst = _least(summary, summary.methods, others)
        if worst is not None and _value(worst) < _value(cost):
            line += f"; of all methods, {worst.variant} costs most, in {worst.task}"
        lines.append(f"{line}.")
    rivals = _lowest(summary, controls, others)
    if not rivals:
        return lines if controls else [*lines, _NO_CONTROL]
    reached, share = share.high, summary.means[rivals[0], RECITED]
    names = as_list_of_words(rivals)
    if share.high < 1:
        verb = "lowers" if len(rivals) == 1 else "lower"
        line = f"Of the controls, {names} {verb} {RECITED} to {_percent(share)}"
        return [*lines, f"{line}, {_NOT_ALONE}." if share.value <= reached else f"{line}."]
    return [
        *lines,
        f"No control clearly lowers {RECITED}: {names}, the lowest, at {_percent(share)}.",
    ]


def _lowest(summary: Summary, variants: Sequence[str], others: Sequence[str]) -> list[str]:
    """The variants with the lowest memorization; first the one that keeps most of the others."""
    shares = {name: summary.means[name, RECITED].value for name in variants}
    shares = {name: share for name, share in shares.items() if math.isfinite(share)}
    lowest = [name for name, share in shares.items() if share == min(shares.values())]

    def worst(name: str) -> float:
        found = _least(summary, [name], others)
        return 0.0 if found is None or found.retained is None else -found.retained.value

    return sorted(lowest, key=worst)


def _least(summary: Summary, variants: Sequence[str], tasks: Sequence[str]) -> Cell | None:
    """The cell of some variants and tasks that retains least."""
    return min(_cells(summary, variants, tasks), key=_value, default=None)


def _most(summary: Summary, variants: Sequence[str], tasks: Sequence[str]) -> Cell | None:
    """The cell that retains most, if it is clearly more than the unchanged model's score."""
    found = max(_cells(summary, variants, tasks), key=_value, default=None)
    return found if found is not None and found.clear and _value(found) > 1 else None


def _cells(summary: Summary, variants: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    cells = [summary.cells[variant, task] for task in tasks for variant in variants]
    return [one for one in cells if math.isfinite(_value(one))]


def _value(cell: Cell) -> float:
    return math.nan if cell.retained is None else cell.retained.value


def _kept(cell: Cell) -> str:
    return f"{_percent(cell.retained)}{'' if cell.clear else ', not a clear change'}"


def _percent(share: Estimate | None) -> str:
    """A share with its interval, kept together in a line."""
    return "" if share is None else as_percent(share).replace(" ", "\u00a0")


def _of_all(tasks: Sequence[str]) -> str:
    return f"Of the {len(tasks)} tasks, " if len(tasks) > 1 else ""
