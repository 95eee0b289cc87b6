"""What a comparison found: values, paired differences and retained shares with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lirefs.files import atomic_write_text
from lirefs.harness.tasks import CONFLICT, GROUPS, ItemResult
from lirefs.statistics import Estimate, Floats, interval, resample_counts, wilson

if TYPE_CHECKING:
    from lirefs.harness.report import Figure

BASELINE = "unchanged"


@dataclass(frozen=True)
class TaskInfo:
    """What a comparison remembers of a task: see `Task` for the fields."""

    group: str
    metric: str
    chance: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One variant on one task.

    Attributes:
        value: The task's metric; Wilson interval for shares, bootstrap otherwise.
        difference: Value minus the baseline's, paired bootstrap over items; None for the
            baseline itself.
        retained: Value over the baseline's, for perplexity the inverse, so that less than 1 is
            always worse; None for the baseline, not finite where the baseline is 0.
        unparsable: Number of items whose output held no answer.
        extra: The task's other metrics.
        p: Of no difference from the baseline, on the same items: McNemar's test where every score
            is 0 or 1, a paired sign-flip test otherwise; None for the baseline.
        p_holm: `p` after Holm's adjustment over all cells of the comparison.
        detectable: Smallest true difference that this many items show with 80 % power.
    """

    variant: str
    task: str
    group: str
    metric: str
    value: Estimate
    difference: Estimate | None
    retained: Estimate | None
    unparsable: int
    extra: dict[str, float]
    p: float | None = None
    p_holm: float | None = None
    detectable: float | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of every variant on every task, item by item.

    Attributes:
        results: Variant to task to items; the first variant is the unchanged model.
        tasks: Task name to what is known of it, in order.
        provenance: What made it.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
    """

    results: dict[str, dict[str, list[ItemResult]]]
    tasks: dict[str, TaskInfo]
    provenance: dict[str, Any] = field(default_factory=dict)
    resamples: int = 5000
    seed: int = 0
    _cells: dict[tuple[str, str], Cell] = field(default_factory=dict, init=False, repr=False)
    _retained: dict[tuple[str, str], Estimate] = field(default_factory=dict, init=False, repr=False)

    @property
    def variants(self) -> list[str]:
        """Names of the variants, the unchanged model first."""
        return list(self.results)

    @property
    def groups(self) -> list[str]:
        """Task groups with something to retain that occur, in their usual order."""
        present = list(dict.fromkeys(task.group for task in self.tasks.values()))
        others = [group for group in present if group not in (*GROUPS, CONFLICT)]
        return [group for group in GROUPS if group in present] + others

    def cell(self, variant: str, task: str) -> Cell:
        """One variant on one task."""
        # Reports ask for the same cells again and again, and each costs thousands of resamples.
        if (variant, task) not in self._cells:
            self._cells[variant, task] = self._cell(variant, task)
        return self._cells[variant, task]

    def _cell(self, variant: str, task: str) -> Cell:
        group, metric = self.tasks[task].group, self.tasks[task].metric
        items, base = self.results[variant][task], self.results[BASELINE][task]
        draws = self._draws(task)
        if metric == "perplexity":
            value, samples = _perplexity(items, draws)
            base_value, base_samples = _perplexity(base, draws)
            ratio, ratios = base_value / value, base_samples / samples
        else:
            value, samples = _mean(items, metric, draws)
            base_value, base_samples = _mean(base, metric, draws)
            ratio = value / base_value if base_value else math.nan
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = samples / base_samples
        n = len(items)
        scores = [item.scores.get(metric, math.nan) for item in items]
        if set(scores) <= {0.0, 1.0}:
            estimate = wilson(int(sum(scores)), n)
        else:
            estimate = Estimate(value, *interval(samples), n)
        baseline = variant == BASELINE
        names = [name for name in items[0].scores if name not in (metric, "nll")]
        return Cell(
            variant=variant,
            task=task,
            group=group,
            metric=metric,
            value=estimate,
            difference=None
            if baseline
            else Estimate(value - base_value, *interval(samples - base_samples), n),
            retained=None if baseline else Estimate(ratio, *interval(ratios), n),
            unparsable=sum(not item.parsed for item in items),
            extra={name: float(np.mean([i.scores[name] for i in items])) for name in names},
        )

    def cells(self) -> list[Cell]:
        """Every variant on every task, tasks in order, variants within."""
        return [self.cell(variant, task) for task in self.tasks for variant in self.variants]

    def informative(self, task: str) -> bool:
        """Whether the unchanged model is above chance: its interval lies above the task's chance.

        Where it is not, there is nothing to retain, and a share of 1 would mean nothing.
        """
        if self.tasks[task].metric == "perplexity":
            return True
        value = self.cell(BASELINE, task).value
        return value.value > 0 and value.low > self.tasks[task].chance

    def counted(self, group: str) -> list[str]:
        """Tasks of a group that `retained` averages: the informative ones."""
        of_group = [task for task, info in self.tasks.items() if info.group == group]
        return [task for task in of_group if self.informative(task)]

    def retained(self, variant: str, group: str) -> Estimate:
        """Mean of the retained shares of a group's informative tasks; not finite without any.

        The interval resamples the items of each task, paired with the baseline.
        """
        if (variant, group) not in self._retained:
            self._retained[variant, group] = self._mean_retained(variant, group)
        return self._retained[variant, group]

    def _mean_retained(self, variant: str, group: str) -> Estimate:
        values, samples, n = [], [], 0
        for task in self.counted(group):
            cell, metric = self.cell(variant, task), self.tasks[task].metric
            one = cell.retained.value if cell.retained else 1.0
            draws = self._draws(task)
            items, base = self.results[variant][task], self.results[BASELINE][task]
            if metric == "perplexity":
                ratios = _perplexity(base, draws)[1] / _perplexity(items, draws)[1]
            else:
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratios = _mean(items, metric, draws)[1] / _mean(base, metric, draws)[1]
            values.append(one)
            samples.append(ratios)
            n += len(items)
        if not values:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return Estimate(float(np.mean(values)), *interval(np.mean(samples, axis=0)), n)

    def save(self, folder: str | Path, figures: Sequence[Figure] | None = None) -> Path:
        """Write the report: `report.html`, `report.md`, `results.json`, CSV, LaTeX and figures.

        The page needs no other file. `results.json` has every item; `results.csv` a row for each
        cell; `overview.tex` tables for a paper; figures are PNG and SVG.

        Args:
            folder: Made when missing; files of these names in it are replaced.
            figures: Figures to show; None for retained performance by group and by task.

        Returns:
            The path of `report.html`.
        """
        from lirefs.harness import report, storage

        folder = Path(folder)
        shown = report.default_figures(self) if figures is None else figures
        atomic_write_text(folder / "results.json", storage.dumps(self, shown))
        return report.write(self, folder, shown)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a comparison that was saved.

        Args:
            path: `results.json`, or the folder that holds it.

        Raises:
            ResultsFileError: The file is missing, damaged, or of another version.
        """
        from lirefs.harness import storage

        return storage.load(Path(path))

    def _draws(self, task: str) -> Floats:
        # The same resamples for every variant: that is what pairs them.
        index = list(self.tasks).index(task)
        n = len(self.results[BASELINE][task])
        return resample_counts(n, self.resamples, seed=self.seed * 1000 + index)


def _mean(items: list[ItemResult], metric: str, draws: Floats) -> tuple[float, Floats]:
    weights = np.array([item.weight for item in items], dtype=float)
    scores = np.array([item.scores[metric] for item in items]) * weights
    return float(scores.sum() / weights.sum()), (draws @ scores) / (draws @ weights)


def _perplexity(items: list[ItemResult], draws: Floats) -> tuple[float, Floats]:
    nll = np.array([item.scores["nll"] for item in items])
    tokens = np.array([item.weight for item in items])
    with np.errstate(over="ignore"):
        return float(np.exp(nll.sum() / tokens.sum())), np.exp((draws @ nll) / (draws @ tokens))
