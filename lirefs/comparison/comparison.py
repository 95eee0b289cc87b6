"""What a comparison found: values, paired differences and retained shares with intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any

from lirefs.comparison.cell import Cell, Scores, TaskInfo
from lirefs.comparison.controls import is_control
from lirefs.comparison.figures.retained import draw_retained
from lirefs.comparison.figures.strengths import draw_strengths
from lirefs.comparison.summary import Summary, plain_json
from lirefs.errors import MissingError, SettingError, got, must_be
from lirefs.files import html_table
from lirefs.statistics.intervals import Estimate, mean_of_estimates
from lirefs.statistics.resamples import Resampled, Resamples, finished
from lirefs.statistics.significance import holm, paired_p_values
from lirefs.tasks.task import CONFLICT, GROUPS, ItemResult

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure as Canvas

BASELINE = "unchanged"
_SHOWN, _WIDTH = 9, 110
"""Tasks in the text of a comparison, and characters of a line."""
_COLUMNS = 6
"""Tasks in the table of a comparison; of more, the means of task groups are shown."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of every variant on every task, item by item.

    Attributes:
        results: Variant to task to items; the first variant is the unchanged model.
        tasks: Task name to its group, metric and chance level, in order.
        provenance: Hashes of model and data, settings, library versions; optionally `findings`.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        title: Heading of the report; empty for one that names the model.
        notes: Sentences that stand at the top of the report.
        run: When it was run, for how many seconds and by which command: `started` (ISO 8601),
            `seconds`, `command` and whether it was `resumed`, so that earlier work is not in the
            seconds; empty where that is not known.
    """

    results: dict[str, dict[str, list[ItemResult]]]
    tasks: dict[str, TaskInfo]
    provenance: dict[str, Any] = field(default_factory=dict)
    resamples: int = 5000
    seed: int = 0
    title: str = ""
    notes: tuple[str, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)
    _cells: dict[tuple[str, str], Cell] = field(default_factory=dict, init=False, repr=False)

    def __repr__(self) -> str:
        items = sum(map(len, self.results[BASELINE].values())) if self.results else 0
        n = len(self.tasks)
        counts = f"{n} task{'s' * (n != 1)}, {items} item{'s' * (items != 1)}"
        head = f"{', '.join(self.results)}; {counts}"
        lines = [textwrap.shorten(head, _WIDTH, placeholder=" …")]
        for task, info in list(self.tasks.items())[:_SHOWN]:
            found = ((one, self.score(one, task)) for one in self.results)
            scores = ", ".join(f"{v} {'n/a' if math.isnan(x) else f'{x:.4g}'}" for v, x in found)
            line = f"{task} ({info.metric}): {scores}"
            lines.append(textwrap.shorten(line, _WIDTH, placeholder=" …"))
        lines += [f"… and {n - _SHOWN} more tasks"] if n > _SHOWN else []
        return f"Comparison({chr(10).join(lines)})"

    def _repr_html_(self) -> str:
        if len(self.tasks) > _COLUMNS:  # too wide: the means of task groups
            return self.summary()._repr_html_()
        rows = []
        for variant in self.variants:
            row: dict[str, Any] = {"variant": variant}
            for task, info in self.tasks.items():
                value = self.cell(variant, task).value
                row[f"{task} ({info.metric}, n = {value.n})"] = f"{value:.3g}"
            rows.append(row)
        return html_table("Comparison: scores and their 95 % intervals", rows)

    @property
    def variants(self) -> list[str]:
        """Names of the variants, the unchanged model first."""
        return list(self.results)

    @property
    def controls(self) -> list[str]:
        """Names of the variants that are controls, by their names or kinds: see `is_control`."""
        described = self.provenance.get("interventions")
        kinds = described if isinstance(described, Mapping) else {}
        return [name for name in self.variants[1:] if is_control(name, kinds.get(name))]

    def score(self, variant: str, task: str) -> float:
        """A task's value without its interval: the metric over all items, or the perplexity."""
        return self._scores(variant, task).value()

    def cell(self, variant: str, task: str) -> Cell:
        """One variant on one task, with 95 % intervals.

        Its `value` is the score, `difference` the paired difference from the unchanged model, and
        `retained` the share of the unchanged score; each is an `Estimate` with `value`, `low`,
        `high` and `n`, and the last two are None for the unchanged model itself. `p` and `p_holm`
        are the p-values before and after Holm's adjustment, and `clear` says whether the latter is
        below 0.05. The others are `detectable`, `unparsable`, `not_finite` and `extra`: see
        `lirefs.comparison.Cell`.

        The thousands of resamples behind them are made at the first call for a task only, for all
        variants together.

        Raises:
            MissingError: The comparison has no such variant or task (it is also a KeyError).
        """
        self._known(variant, task)
        if (variant, task) not in self._cells:
            p_values = {one: self._p_values[one, task] for one in self.variants[1:]}
            for cell in self._made(task, self.variants, p_values):
                self._cells[cell.variant, task] = cell
        return self._cells[variant, task]

    def unadjusted_cell(self, variant: str, task: str) -> Cell:
        """A cell whose p-value is not adjusted, which needs no other variant or task."""
        self._known(variant, task)
        others = [] if variant == BASELINE else [variant]
        p_values = {one: (p, None) for (one, _), p in self._tested(others, [task]).items()}
        (cell,) = self._made(task, [variant], p_values)
        return cell

    def _made(
        self, task: str, variants: Sequence[str], p_values: Mapping[str, tuple[float, float | None]]
    ) -> list[Cell]:
        """Cells of one task, whose variants share a pass over the resamples."""
        info, base = self.tasks[task], self._scores(BASELINE, task)
        scores = {variant: self._scores(variant, task) for variant in variants}
        asked: list[Resampled[Estimate]] = []
        for variant, one in scores.items():
            asked.append(one.estimate())
            if variant != BASELINE:
                asked += [one.difference(base), one.retained(base)]
        found = iter(finished(self.draws(task), asked))
        cells = []
        for variant, one in scores.items():
            alone, items = variant == BASELINE, self.results[variant][task]
            others = [name for name in items[0].scores if name not in (info.metric, "nll")]
            p, p_holm = p_values.get(variant, (None, None))
            cell = Cell(
                variant=variant,
                task=task,
                group=info.group,
                metric=info.metric,
                value=next(found),
                difference=None if alone else next(found),
                retained=None if alone else next(found),
                unparsable=sum(not item.parsed for item in items),
                not_finite=one.not_finite,
                extra={name: Scores.of(items, name).value() for name in others},
                p=p,
                p_holm=p_holm,
                detectable=None if alone else one.detectable(base),
            )
            cells.append(cell)
        return cells

    def _tested(
        self, variants: Sequence[str], tasks: Collection[str]
    ) -> dict[tuple[str, str], float]:
        """p-values of no difference from the baseline; NaN where an item has no score."""
        pairs = {}
        for task in tasks:
            base = self._scores(BASELINE, task)
            for variant in () if base.not_finite else variants:
                one = self._scores(variant, task)
                if not one.not_finite:
                    pairs[variant, task] = one.values, base.values, one.weights
        found = dict(zip(pairs, paired_p_values(list(pairs.values())), strict=True))
        return {(v, task): found.get((v, task), math.nan) for v in variants for task in tasks}

    @cached_property
    def _p_values(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Plain and adjusted p-values; the family is every variant on every task."""
        found = self._tested(self.variants[1:], self.tasks)
        adjusted = holm({key: p for key, p in found.items() if not math.isnan(p)})
        return {key: (found[key], adjusted.get(key, math.nan)) for key in found}

    def cells(self) -> list[Cell]:
        """Every variant on every task, tasks in order, variants within."""
        return [self.cell(variant, task) for task in self.tasks for variant in self.variants]

    def informative(self, task: str) -> bool:
        """Whether the unchanged model's interval lies above the task's chance level.

        Where it does not, there is nothing to retain, and a share of 1 would mean nothing. Always
        true for perplexity, unless an item has no finite score.
        """
        if self._scores(BASELINE, task).not_finite:
            return False
        if self.tasks[task].metric == "perplexity":
            return True
        value = self.cell(BASELINE, task).value
        return value.value > 0 and value.low > self.tasks[task].chance

    def summary(self) -> Summary:
        """Every number of a report as a plain table, with the mean of each task group."""
        informative = [task for task in self.tasks if self.informative(task)]
        present = [task.group for task in self.tasks.values() if task.group != CONFLICT]
        groups = {
            group: tuple(task for task in informative if self.tasks[task].group == group)
            for group in dict.fromkeys([*(one for one in GROUPS if one in present), *present])
        }
        settings = {key: one for key, one in self.provenance.items() if key != "findings"}
        bootstrap = {"resamples": self.resamples, "seed": self.seed}
        model = str(self.provenance.get("model_name", "a model"))
        return Summary(
            title=self.title or _title(len(self.variants) - 1, model),
            model=model,
            run=dict(self.run),
            notes=tuple(self.notes),
            controls=frozenset(self.controls),
            findings=tuple(map(str, self.provenance.get("findings", []))),
            variants=tuple(self.variants),
            tasks=dict(self.tasks),
            groups=groups,
            cells={(cell.variant, cell.task): cell for cell in self.cells()},
            means={
                (variant, group): self._mean(variant, tasks)
                for variant in self.variants
                for group, tasks in groups.items()
            },
            informative=frozenset(informative),
            settings=plain_json({**settings, "bootstrap": bootstrap}),
        )

    def to_dataframe(self, items: bool = False) -> pandas.DataFrame:
        """One row for each variant and task, with the columns of `results.csv`.

        They are `variant`, `task`, `group`, `metric`, `chance`, `above_chance` (1 where the
        unchanged model is), `n`, `score`, `score_low`, `score_high`, `difference`,
        `difference_low`, `difference_high`, `retained`, `retained_low`, `retained_high`, `p`,
        `p_holm`, `detectable`, `unparsable`, `not_finite`, and `other: NAME` for each further
        metric. See `cell` for what they mean. Numbers that a row does not have are NaN.

        Args:
            items: One row for each item instead: variant, task, group and metric, the fields of
                `ItemResult`, and a column for each of its scores.
        """
        if not items:
            return self.summary().to_dataframe()
        import pandas

        rows = []
        for variant, by_task in self.results.items():
            for task, found in by_task.items():
                info = self.tasks[task]
                place = {"variant": variant, "task": task, "group": info.group}
                for one in found:
                    fields = {name: value for name, value in vars(one).items() if name != "scores"}
                    rows.append({**place, "metric": info.metric, **fields, **one.scores})
        return pandas.DataFrame(rows)

    def plot(self, x: Mapping[str, float] | None = None, *, label: str = "strength") -> Canvas:
        """What each variant retains, by task group; or, with `x`, every task along an axis.

        Args:
            x: For a sweep: the variants to draw, each with its place on the horizontal axis, such
                as `{"-1": -1.0, "+1": 1.0}`. A line for each task shows the scores with their 95 %
                intervals, and the unchanged model's score is a dotted line. Controls among the
                variants have dashed lines of their own, with hollow markers.
            label: What the horizontal axis shows.

        Returns:
            A matplotlib figure to show, restyle or save; pyplot does not know of it.

        Raises:
            SettingError: Nothing but the unchanged model was run, or nothing to retain; or `x` is
                empty, or has something that is not a number.
            MissingError: `x` names an unknown variant (it is also a KeyError).
        """
        summary = self.summary()
        if x is not None:
            must_be(x, Mapping, "x")
            must_be(label, str, "label")
            for name, at in x.items():
                self._known(name, next(iter(self.tasks)))
                if not isinstance(at, Real) or not math.isfinite(at):
                    raise SettingError(f"x[{name!r}] must be a finite number, got {got(at)}")
            if not x:
                raise SettingError("x is empty: name the variants to draw")
            return draw_strengths(summary, x, label)
        if len(summary.variants) < 2 or not any(summary.groups.values()):
            raise SettingError(
                "there is nothing to plot: a comparison needs an intervention, and a task on which "
                "the unchanged model is above chance"
            )
        return draw_retained(summary)

    def _mean(self, variant: str, tasks: Sequence[str]) -> Estimate:
        """Mean retained share on some tasks, n the items of all; not finite without a task."""
        if variant == BASELINE and tasks:
            return Estimate(1.0, 1.0, 1.0, sum(len(self.results[variant][one]) for one in tasks))
        return mean_of_estimates(
            [one for task in tasks if (one := self.cell(variant, task).retained)]
        )

    def draws(self, task: str) -> Resamples:
        """The resamples of a task's items, the same for every variant, which pairs them."""
        self._known(BASELINE, task)
        index = list(self.tasks).index(task)
        n = len(self.results[BASELINE][task])
        return Resamples(n, self.resamples, self.seed * 1000 + index)

    def _known(self, variant: str, task: str) -> None:
        """Raise MissingError unless there are results of this variant on this task."""
        for what, name, names in (("variant", variant, self.results), ("task", task, self.tasks)):
            if not isinstance(name, str) or name not in names:
                raise MissingError(f"no {what} {name!r}; there are {', '.join(names)}")

    def _scores(self, variant: str, task: str) -> Scores:
        self._known(variant, task)
        return Scores.of(self.results[variant][task], self.tasks[task].metric)


def _title(changes: int, model: str) -> str:
    """The heading of a report that was not given one."""
    if changes == 1:
        return f"What one intervention changes in {model}"
    return f"What {changes} interventions change in {model}" if changes else f"Scores of {model}"
