from .cell import Cell, TaskInfo
from .compare import compare
from .comparison import BASELINE, Comparison
from .figures.figure import Figure
from .figures.sweeps import pareto_fronts
from .figures.tags import tag_bars
from .item_changes import Flip, TagChange, TagChanges, changes_by_tag, flips
from .pooled import Pooled, PooledEstimate, pool
from .report.write import write_report
from .results_file import load_comparison
from .summary import Summary
from .sweeps import (
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
