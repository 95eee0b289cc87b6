from . import (
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
from .comparison.compare import compare
from .comparison.comparison import Comparison
from .comparison.report.write import write_report
from .comparison.results_file import load_comparison
from .directions.capture import Activations, capture
from .directions.direction import Direction
from .directions.directions import Directions
from .directions.estimators import (
    LogisticDirection,
    MeanDifference,
    PCADirection,
    RidgeDirection,
    WhitenedMeanDifference,
)
from .directions.fitting import fit_directions
from .directions.probe import Probe, fit
from .errors import LirefsError
from .export.bake import bake
from .model.intervention import Intervention, compose
from .model.language_model import LanguageModel, wrap
from .model.layout import Layout
from .model.loading import load
from .model.prompts import Prompted, prompt_lengths
from .organism.planting.plant import plant
from .questions import Question, Questions, Split, load_questions
from .steering import scope
from .steering.gate import Gate
from .steering.scope import Scope
from .steering.shown_tokens import show_tokens
from .steering.steer import Steer
from .steering.strength import Schedule
from .tasks.default_suite import calibration_texts, default_tasks
from .tasks.lm_eval import lm_eval_model, lm_eval_tasks
from .tasks.lm_eval_export import write_lm_eval_task
from .tasks.mining import mine
from .tasks.ndcg import ndcg_task
from .tasks.recitation import Recitation, StressTest, recitation_task
from .tasks.task import MultipleChoice, Perplexity, ShortAnswer
from .version import __version__

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
