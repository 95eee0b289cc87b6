"""Comparisons of variants of one model on the same items, paired."""

from lirefs.comparison.cell import Cell
from lirefs.comparison.compare import compare
from lirefs.comparison.comparison import BASELINE, Comparison, TaskInfo
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.figures.sweeps import pareto_fronts
from lirefs.comparison.figures.tags import tag_bars
from lirefs.comparison.item_changes import Flip, TagChange, TagChanges, by_tag, flips
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
    "SweepChoice",
    "TagChange",
    "TagChanges",
    "TaskInfo",
    "by_tag",
    "choose_on_validation",
    "compare",
    "damage_of",
    "flips",
    "matched",
    "matched_difference",
    "pareto_front",
    "pareto_fronts",
    "tag_bars",
]
