"""Comparisons of one kind on several models, such as seeds of one recipe, pooled and by run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lirefs.comparison.cell import Cell
from lirefs.comparison.report.tables import Entry, Table
from lirefs.comparison.summary import Summary
from lirefs.comparison.wording import as_number, as_points, percent_interval
from lirefs.errors import SettingError, must_be
from lirefs.statistics.intervals import Estimate, exponential_of_estimate
from lirefs.statistics.pooling import pool_estimates

NOTE = (
    "Mean over {runs} runs with its 95 % interval, for runs that have not been made (Student's, "
    "from the spread of the runs, which holds the luck of run and items; of the items alone where "
    "runs agree far more closely than those allow); then the value of each run: {names}."
)


@dataclass(frozen=True)
class PooledEstimate:
    """An estimate over runs, and that of each run, in their order."""

    pooled: Estimate
    by_run: tuple[Estimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        runs = [one.to_dict() for one in self.by_run]
        return {"pooled": self.pooled.to_dict(), "by_run": runs}


@dataclass(frozen=True)
class Pooled:
    """What several comparisons found together: see `pool`.

    Attributes:
        runs: Names of the runs.
        variants: The variants that all runs have, the unchanged model first.
        values: (variant, task) to its score or perplexity.
        changes: (variant, task) to the difference from the unchanged model; of perplexities, the
            ratio.
        means: (variant, group) to the mean retained share of the group's tasks.
        equal: Variant to those that were set to its perplexity in all runs.
        language: Name of the task that measures perplexity, if there is one.
        left_out: Variants that only some runs have.
    """

    runs: tuple[str, ...]
    variants: tuple[str, ...]
    values: Mapping[tuple[str, str], PooledEstimate]
    changes: Mapping[tuple[str, str], PooledEstimate]
    means: Mapping[tuple[str, str], PooledEstimate]
    equal: Mapping[str, Sequence[str]]
    language: str | None
    left_out: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Pooled({', '.join(self.runs)}: {', '.join(self.variants)})"

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object: for each variant its values and changes by task, and its means."""
        kinds = {"values": self.values, "changes": self.changes, "means": self.means}
        found = {
            kind: {
                variant: {name: one.to_dict() for (v, name), one in some.items() if v == variant}
                for variant in self.variants
            }
            for kind, some in kinds.items()
        }
        return {"runs": self.runs, "left out": self.left_out, **found}

    def tables(self) -> list[Table]:
        """Retained shares by group, the same at equal perplexity, and the changes by task."""
        note = NOTE.format(runs=len(self.runs), names=", ".join(self.runs))
        groups = list(dict.fromkeys(group for _, group in self.means))
        tasks = list(dict.fromkeys(task for _, task in self.changes))
        overview = [
            [Entry(one), *(_share(self.means[one, group]) for group in groups)]
            for one in self.variants[1:]
        ]
        found = [Table("Retained of each group of tasks", note, ["variant", *groups], overview)]
        for goal, others in self.equal.items():
            rows = []
            for one in (goal, *others):
                shares = (_share(self.means[one, group]) for group in groups)
                rows.append([Entry(one), _value(self.values[one, str(self.language)]), *shares])
            head = ["variant", "perplexity", *groups]
            found.append(Table(f"Equal damage: at the perplexity of {goal}", note, head, rows))
        changes = [
            [Entry(task), *(_change(self.changes[one, task]) for one in self.variants[1:])]
            for task in tasks
            if task != self.language
        ]
        head = ["task", *self.variants[1:]]
        return [*found, Table("Change of each task, in points", note, head, changes)]


def pool(summaries: Mapping[str, Summary]) -> Pooled:
    """Pool comparisons of the same variants on the same tasks, made on several models.

    Args:
        summaries: Name of each run to its `Comparison.summary()`, at least two. They must have the
            same tasks; variants that are not in all of them are left out.

    Raises:
        SettingError: There is one run only, tasks differ, or no variant is in all runs.

    Examples:
        >>> import lirefs
        >>> folders = ["report-0", "report-1", "report-2"]
        >>> runs = {one: lirefs.load_comparison(one).summary() for one in folders}  # doctest: +SKIP
        >>> lirefs.comparison.pool(runs).means["K-FAC", "memorization"].pooled  # doctest: +SKIP
    """
    must_be(summaries, Mapping, "summaries")
    for name, one in summaries.items():
        must_be(one, Summary, f"run {name!r}")
    if len(summaries) < 2:
        raise SettingError("pooling needs the reports of at least two runs")
    first, *others = runs = list(summaries.values())
    for name, one in summaries.items():
        tasks = {*one.tasks, *first.tasks}
        if other := sorted(t for t in tasks if one.tasks.get(t) != first.tasks.get(t)):
            raise SettingError(
                f"run {name!r} has other tasks than {next(iter(summaries))!r}: {', '.join(other)}"
            )
    variants = [v for v in first.variants if all(v in one.variants for one in others)]
    if len(variants) < 2:
        raise SettingError("no variant but the unchanged model is in all runs")
    every = dict.fromkeys(v for one in runs for v in one.variants)
    cells = {
        (variant, task): [one.cells[variant, task] for one in runs]
        for variant in variants
        for task in first.tasks
    }
    groups = [g for g in first.groups if all(one.groups.get(g) for one in runs)]
    equal = {
        goal: [v for v in some if all(v in one.equal.get(goal, ()) for one in others)]
        for goal, some in first.equal.items()
        if goal in variants
    }
    return Pooled(
        runs=tuple(summaries),
        variants=tuple(variants),
        values={key: _pooled([c.value for c in some], _logs(some)) for key, some in cells.items()},
        changes={
            key: _pooled(list(map(_change_of, some)), _logs(some))
            for key, some in cells.items()
            if key[0] != variants[0]
        },
        means={
            (variant, group): _pooled([one.means[variant, group] for one in runs], False)
            for variant in variants[1:]
            for group in groups
        },
        equal={goal: some for goal, some in equal.items() if some},
        language=first.language,
        left_out=tuple(v for v in every if v not in variants),
    )


def _logs(cells: Sequence[Cell]) -> bool:
    return cells[0].metric == "perplexity"


def _change_of(cell: Cell) -> Estimate:
    """The difference from the unchanged model; of perplexities, their ratio."""
    assert cell.difference is not None
    assert cell.retained is not None
    if cell.metric != "perplexity":
        return cell.difference
    one = cell.retained  # unchanged over changed
    return Estimate(1 / one.value, 1 / one.high, 1 / one.low, one.n)


def _pooled(estimates: Sequence[Estimate], logs: bool) -> PooledEstimate:
    """Estimates and their mean, which for `logs` is that of their logarithms."""
    if not logs:
        return PooledEstimate(pool_estimates(estimates), tuple(estimates))
    table = np.array([(one.value, one.low, one.high) for one in estimates])
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = zip(np.log(table).tolist(), estimates, strict=True)
    on_logs = [Estimate(value, low, high, one.n) for (value, low, high), one in rows]
    return PooledEstimate(exponential_of_estimate(pool_estimates(on_logs)), tuple(estimates))


def _entry(one: PooledEstimate, text: str, interval: str, by_run: Sequence[str]) -> Entry:
    if not math.isfinite(one.pooled.value):
        text, interval = "n/a", ""
    return Entry(text, one.pooled.value, f"{interval} ({', '.join(by_run)})".strip())


def _share(one: PooledEstimate) -> Entry:
    by_run = [_percent(each.value) for each in one.by_run]
    text = f"{_percent(one.pooled.value)}\u00a0%"
    return _entry(one, text, percent_interval(one.pooled), by_run)


def _change(one: PooledEstimate) -> Entry:
    text, _, interval = as_points(one.pooled).partition(" points ")
    return _entry(one, text, interval, [_percent(each.value, "+") for each in one.by_run])


def _value(one: PooledEstimate) -> Entry:
    text, low, high = (f"{x:.4g}" for x in (one.pooled.value, one.pooled.low, one.pooled.high))
    return _entry(one, text, f"[{low}, {high}]", [f"{each.value:.4g}" for each in one.by_run])


def _percent(value: float, sign: str = "") -> str:
    return as_number(100 * value, sign) if math.isfinite(value) else "n/a"
