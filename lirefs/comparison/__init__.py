"""Comparisons of variants of one model on the same items, paired."""

from lirefs.comparison.cell import Cell, TaskInfo
from lirefs.comparison.compare import compare
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.sweeps import pareto_fronts
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.item_changes import Flip, TagChange, TagChanges, changes_by_tag, flips
from lirefs.comparison.pooled import Pooled, PooledEstimate, pool
from lirefs.comparison.report.write import write_report
from lirefs.comparison.results_file import load_comparison
from lirefs.comparison.summary import Summary
from lirefs.comparison.sweeps import (
    SweepChoice,
    choose_on_validation,
    damage_of,
    matched,
    matched_difference,
    pareto_front,
)

__all__ = [
    "BASELINE",
    "Cell",
    "Comparison",
    "Figure",
    "Flip",
    "Pooled",
    "PooledEstimate",
    "Summary",
    "SweepChoice",
    "TagChange",
    "TagChanges",
    "TaskInfo",
    "changes_by_tag",
    "choose_on_validation",
    "compare",
    "damage_of",
    "flips",
    "load_comparison",
    "matched",
    "matched_difference",
    "pareto_front",
    "pareto_fronts",
    "pool",
    "tag_bars",
    "write_report",
]
