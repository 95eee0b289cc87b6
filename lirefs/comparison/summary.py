"""Every number of a report as one plain table, from which page, tables and figures are made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lirefs.comparison.cell import Cell, TaskInfo
from lirefs.comparison.wording import as_number
from lirefs.files import html_table
from lirefs.statistics.intervals import Estimate
from lirefs.tasks.task import CONFLICT

if TYPE_CHECKING:
    import pandas

EQUAL = "equal perplexity"
"""The setting (of a comparison's provenance) that lists the variants, as a dict of lists, which
were set to the perplexity of another one on validation texts."""
_LISTED = 5
"""Most cells that the sentence on scores that are not finite lists."""


@dataclass(frozen=True)
class Summary:
    """What a comparison found, made once by `Comparison.summary`.

    Attributes:
        title: Heading of the report.
        model: Name of the model.
        run: When, for how long and by which command it was run: see `Comparison`.
        notes: Sentences for the top of the report.
        findings: Conclusions in sentences, if the comparison has any; one that ends with a
            question mark is the heading of those after it.
        variants: Names, the unchanged model first.
        controls: Variants that are controls; the others, but for the first, are methods.
        tasks: Name of each task to its group, metric and chance level.
        groups: Task groups with something to retain, to their informative tasks.
        cells: (variant, task) to its numbers; tasks in order, variants within.
        means: (variant, group) to the mean retained share of the group's informative tasks.
        informative: Tasks on which the unchanged model is above chance.
        settings: Provenance and settings of the bootstrap, as plain JSON values.
    """

    title: str
    model: str
    run: Mapping[str, Any]
    notes: tuple[str, ...]
    findings: tuple[str, ...]
    variants: tuple[str, ...]
    controls: frozenset[str]
    tasks: Mapping[str, TaskInfo]
    groups: Mapping[str, tuple[str, ...]]
    cells: Mapping[tuple[str, str], Cell]
    means: Mapping[tuple[str, str], Estimate]
    informative: frozenset[str]
    settings: Mapping[str, Any]

    @property
    def methods(self) -> list[str]:
        """Variants that are neither the unchanged model nor controls, in their order."""
        return [name for name in self.variants[1:] if name not in self.controls]

    @property
    def methods_first(self) -> list[str]:
        """All variants as tables list them: the unchanged model, methods, controls."""
        controls = [name for name in self.variants if name in self.controls]
        return [self.variants[0], *self.methods, *controls]

    @property
    def equal(self) -> dict[str, list[str]]:
        """Variant to those that were set to its perplexity (the setting `EQUAL`), if any."""
        given = self.settings.get(EQUAL)
        if not isinstance(given, Mapping) or self.language is None:
            return {}
        found = {
            name: [one for one in self.variants if one in others]
            for name, others in given.items()
            if name in self.variants and isinstance(others, list)
        }
        return {name: others for name, others in found.items() if others}

    @property
    def language(self) -> str | None:
        """The first task whose metric is perplexity."""
        metrics = ((task, info.metric) for task, info in self.tasks.items())
        return next((task for task, metric in metrics if metric == "perplexity"), None)

    def __repr__(self) -> str:
        return f"Summary({self.title!r}: {', '.join(self.variants)}; {len(self.tasks)} task(s))"

    def _repr_html_(self) -> str:
        rows = []
        for variant in self.variants:
            row = {"variant": variant}
            for group in self.groups:
                mean = self.means[variant, group]
                ends = "" if variant == self.variants[0] else f" [{_percent(mean.low, mean.high)}]"
                n = self.means[self.variants[0], group].n
                row[f"{group}, % (n = {n})"] = _percent(mean.value) + ends
            rows.append(row)
        tasks = f"{len(self.tasks)} tasks by group"
        return html_table(f"{self.title}: share of the unchanged model's score, {tasks}", rows)

    def of_task(self, task: str) -> list[Cell]:
        """Every variant on one task, the unchanged model first."""
        return [self.cells[variant, task] for variant in self.variants]

    def not_finite(self, tasks: Collection[str] | None = None) -> str:
        """A sentence on the cells, of some tasks or all, that are n/a, and why; may be empty."""
        found = [
            f"{cell.not_finite} of {cell.value.n} item{'s' * (cell.value.n != 1)} of {cell.task} "
            f"under {cell.variant}"
            for cell in self.cells.values()
            if cell.not_finite and (tasks is None or cell.task in tasks)
        ]
        if not found:
            return ""
        more = f" and in {len(found) - _LISTED} more cells" if len(found) > _LISTED else ""
        return f"n/a where a score is not finite: {'; '.join(found[:_LISTED])}{more}."

    def note(self, task: str) -> str:
        """What a reader must know to interpret a task's scores; may be empty."""
        info = self.tasks[task]
        notes = [f"chance {as_number(100 * info.chance)} %"] if info.chance else []
        if info.group == CONFLICT:
            notes.append("one of two competing answers, not part of any mean")
        elif self.cells[self.variants[0], task].not_finite:
            notes.append("unchanged model without a finite score, left out of the group's mean")
        elif task not in self.informative:
            notes.append("unchanged model not above chance, left out of the group's mean")
        return "; ".join(notes)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each cell, at full precision; None where a cell has no such number."""
        others = dict.fromkeys(name for cell in self.cells.values() for name in cell.extra)
        rows = []
        for cell in self.cells.values():
            row: dict[str, Any] = {
                **{name: getattr(cell, name) for name in ("variant", "task", "group", "metric")},
                "chance": self.tasks[cell.task].chance,
                "above_chance": int(cell.task in self.informative),
                "n": cell.value.n,
            }
            retained = None if cell.group == CONFLICT else cell.retained
            estimates = {"score": cell.value, "difference": cell.difference, "retained": retained}
            for name, one in estimates.items():
                ends = (None, None, None) if one is None else (one.value, one.low, one.high)
                row |= zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)
            for name in ("p", "p_holm", "detectable", "unparsable", "not_finite"):
                row[name] = getattr(cell, name)
            rows.append(row | {f"other: {name}": cell.extra.get(name) for name in others})
        return rows

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each cell, with the columns of `results.csv`; NaN for missing numbers."""
        import pandas

        return pandas.DataFrame(self.rows())


def _percent(*shares: float) -> str:
    """Shares in percent, with three digits."""
    return ", ".join(f"{100 * one:.3g}" if math.isfinite(one) else "n/a" for one in shares)


def plain_json(value: Any) -> Any:
    """A value as it comes back from JSON: no tuples, None for numbers that are not finite."""
    if isinstance(value, str):  # most values are
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    if isinstance(value, dict | Mapping):
        return {key: plain_json(entry) for key, entry in value.items()}
    return [plain_json(entry) for entry in value] if isinstance(value, list | tuple) else value
