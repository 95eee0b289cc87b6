"""What a comparison found: values, paired differences and retained shares with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lirefs.comparison.cell import Cell, Scores, cell_of
from lirefs.files import atomic_write_text
from lirefs.statistics.intervals import Estimate, Floats, resample_counts
from lirefs.statistics.paired import mean_of
from lirefs.statistics.significance import holm
from lirefs.tasks.task import CONFLICT, GROUPS, ItemResult

if TYPE_CHECKING:
    from lirefs.comparison.figures.figure import Figure

BASELINE = "unchanged"


@dataclass(frozen=True)
class TaskInfo:
    """What a comparison remembers of a task: see `Task` for the fields."""

    group: str
    metric: str
    chance: float = 0.0


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
    _tests: dict[tuple[str, str], tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False
    )

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

    def score(self, variant: str, task: str) -> float:
        """A task's value without its interval.

        Args:
            variant: Name of the variant.
            task: Name of the task.

        Returns:
            The metric over all items; the perplexity where that is the metric.
        """
        return float(self._scores(variant, task).value()[0])

    def cell(self, variant: str, task: str) -> Cell:
        """One variant on one task.

        Args:
            variant: Name of the variant.
            task: Name of the task.

        Returns:
            Value, paired difference, retained share and test; computed once.
        """
        # Reports ask for the same cells again and again, and each costs thousands of resamples.
        if (variant, task) not in self._cells:
            info = self.tasks[task]
            base = None if variant == BASELINE else self.results[BASELINE][task]
            items = self.results[variant][task]
            found = cell_of((variant, task), info.group, info.metric, items, base, self.draws(task))
            if base is not None:
                p, p_holm = self._p_values()[variant, task]
                found = replace(found, p=p, p_holm=p_holm)
            self._cells[variant, task] = found
        return self._cells[variant, task]

    def _p_values(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Plain and adjusted p-values; the family is every variant on every task."""
        if not self._tests:
            plain = {
                (variant, task): self._scores(variant, task).p_value(self._scores(BASELINE, task))
                for variant in self.variants[1:]
                for task in self.tasks
            }
            adjusted = holm(plain)
            self._tests.update({key: (plain[key], adjusted[key]) for key in plain})
        return self._tests

    def cells(self) -> list[Cell]:
        """Every variant on every task, tasks in order, variants within.

        Returns:
            `len(tasks) * len(variants)` cells.
        """
        return [self.cell(variant, task) for task in self.tasks for variant in self.variants]

    def informative(self, task: str) -> bool:
        """Whether the unchanged model is above chance: its interval lies above the task's chance.

        Where it is not, there is nothing to retain, and a share of 1 would mean nothing.

        Args:
            task: Name of the task.

        Returns:
            True for perplexity always.
        """
        if self.tasks[task].metric == "perplexity":
            return True
        value = self.cell(BASELINE, task).value
        return value.value > 0 and value.low > self.tasks[task].chance

    def counted(self, group: str) -> list[str]:
        """Tasks of a group that `retained` averages: the informative ones.

        Args:
            group: Name of the group.

        Returns:
            Task names, in order.
        """
        of_group = [task for task, info in self.tasks.items() if info.group == group]
        return [task for task in of_group if self.informative(task)]

    def retained(self, variant: str, group: str) -> Estimate:
        """Mean of the retained shares of a group's informative tasks; not finite without any.

        Args:
            variant: Name of the variant.
            group: Name of the group.

        Returns:
            The mean with its interval, n the items of all counted tasks; not finite without any.
        """
        counted = self.counted(group)
        kept = [self.cell(variant, task).retained for task in counted]
        if variant == BASELINE and counted:
            return Estimate(1.0, 1.0, 1.0, sum(len(self.results[BASELINE][t]) for t in counted))
        return mean_of([one for one in kept if one is not None])

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
        from lirefs.comparison import results_file as storage
        from lirefs.comparison.report import write as report

        folder = Path(folder)
        shown = report.default_figures(self) if figures is None else figures
        atomic_write_text(folder / "results.json", storage.dumps(self, shown))
        return report.write(self, folder, shown)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a comparison that was saved.

        Args:
            path: `results.json`, or the folder that holds it.

        Returns:
            The comparison, items included.

        Raises:
            ResultsFileError: The file is missing, damaged, or of another version.
        """
        from lirefs.comparison import results_file as storage

        return storage.load(Path(path))

    def draws(self, task: str) -> Floats:
        """How often each item is drawn in each bootstrap resample, shape (resamples, items).

        The same for every variant: that is what pairs them.

        Args:
            task: Name of the task.

        Returns:
            float64 counts, shape (resamples, items).
        """
        index = list(self.tasks).index(task)
        n = len(self.results[BASELINE][task])
        return resample_counts(n, self.resamples, seed=self.seed * 1000 + index)

    def _scores(self, variant: str, task: str) -> Scores:
        return Scores.of(self.results[variant][task], self.tasks[task].metric)
