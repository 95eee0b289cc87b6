"""Reasoning against recitation in language models: directions, steering, one harness.

LiReFs (Hong et al. 2025, arXiv 2503.23084) are linear directions in the residual stream; the sister
package `kfac` removes flat directions of the weights (Merullo et al. 2025, arXiv 2510.24256).
"""

from lirefs.bake import bake
from lirefs.capture import Activations, capture
from lirefs.direction import Direction
from lirefs.directions import Directions
from lirefs.errors import LirefsError
from lirefs.estimators import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)
from lirefs.fitting import fit_directions
from lirefs.harness.comparison import Comparison
from lirefs.harness.lm_evaluation import lm_eval_model, lm_eval_tasks
from lirefs.harness.lm_evaluation_export import write_lm_eval_task
from lirefs.harness.memorization import Recitation, StressTest, recitation_task
from lirefs.harness.mining import mine
from lirefs.harness.rank_agreement import ndcg_task
from lirefs.harness.running import compare
from lirefs.harness.suite import calibration_texts, default_tasks
from lirefs.harness.tasks import MultipleChoice, Perplexity, ShortAnswer
from lirefs.intervention import Intervention, compose
from lirefs.layout import Layout
from lirefs.loading import load
from lirefs.models import LanguageModel, wrap
from lirefs.positions import prompt_lengths
from lirefs.probe import Probe, fit
from lirefs.questions import Question, Questions, Split, load_questions
from lirefs.scope import Scope
from lirefs.steering import Steer
from lirefs.strength import Gate, Schedule
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
    "compose",
    "default_tasks",
    "fit",
    "fit_directions",
    "lm_eval_model",
    "lm_eval_tasks",
    "load",
    "load_questions",
    "mine",
    "ndcg_task",
    "prompt_lengths",
    "recitation_task",
    "wrap",
    "write_lm_eval_task",
]
