"""Reasoning against recitation in language models: directions, steering, one harness.

LiReFs (Hong et al. 2025, arXiv 2503.23084) are linear directions in the residual stream; the sister
package `kfac` removes flat directions of the weights (Merullo et al. 2025, arXiv 2510.24256).
"""

import os
import sys

# `python -m lirefs` looks for modules in the working folder first, and they may be a stranger's
# (even pathlib, which is why it is not used here). A checkout is our own.
if sys.argv[:1] == ["-m"] and sys.path[0] == os.getcwd() not in map(os.path.dirname, __path__):  # noqa: PTH109
    del sys.path[0]

from lirefs import (
    comparison,
    directions,
    errors,
    export,
    model,
    organism,
    statistics,
    steering,
    tasks,
)
from lirefs.comparison.compare import compare
from lirefs.comparison.comparison import Comparison
from lirefs.comparison.report.write import write_report
from lirefs.comparison.results_file import load_comparison
from lirefs.directions.capture import Activations, capture
from lirefs.directions.direction import Direction
from lirefs.directions.directions import Directions
from lirefs.directions.estimators import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)
from lirefs.directions.fitting import fit_directions
from lirefs.directions.probe import Probe, fit
from lirefs.errors import LirefsError
from lirefs.export.bake import bake
from lirefs.model.intervention import Intervention, compose
from lirefs.model.language_model import LanguageModel, wrap
from lirefs.model.layout import Layout
from lirefs.model.loading import load
from lirefs.model.prompts import Prompted, prompt_lengths
from lirefs.organism.planting.plant import plant
from lirefs.questions import Question, Questions, Split, load_questions
from lirefs.steering import scope
from lirefs.steering.gate import Gate
from lirefs.steering.scope import Scope
from lirefs.steering.shown_tokens import show_tokens
from lirefs.steering.steer import Steer
from lirefs.steering.strength import Schedule
from lirefs.tasks.default_suite import calibration_texts, default_tasks
from lirefs.tasks.lm_eval import lm_eval_model, lm_eval_tasks
from lirefs.tasks.lm_eval_export import write_lm_eval_task
from lirefs.tasks.mining import mine
from lirefs.tasks.ndcg import ndcg_task
from lirefs.tasks.recitation import Recitation, StressTest, recitation_task
from lirefs.tasks.task import MultipleChoice, Perplexity, ShortAnswer
from lirefs.version import __version__

__all__ = [
    "Activations",
    "Comparison",
    "Direction",
    "Directions",
    "Gate",
    "Intervention",
    "LanguageModel",
    "Layout",
    "LirefsError",
    "LogisticDirection",
    "MeanDifference",
    "MultipleChoice",
    "PCADirection",
    "Perplexity",
    "Probe",
    "Prompted",
    "Question",
    "Questions",
    "Recitation",
    "RidgeDirection",
    "Schedule",
    "Scope",
    "ShortAnswer",
    "Split",
    "Steer",
    "StressTest",
    "WhitenedMeanDifference",
    "__version__",
    "bake",
    "calibration_texts",
    "capture",
    "compare",
    "comparison",
    "compose",
    "default_tasks",
    "directions",
    "errors",
    "export",
    "fit",
    "fit_directions",
    "lm_eval_model",
    "lm_eval_tasks",
    "load",
    "load_comparison",
    "load_questions",
    "mine",
    "model",
    "ndcg_task",
    "organism",
    "plant",
    "prompt_lengths",
    "recitation_task",
    "scope",
    "show_tokens",
    "statistics",
    "steering",
    "tasks",
    "wrap",
    "write_lm_eval_task",
    "write_report",
]


def __dir__() -> list[str]:
    return __all__
