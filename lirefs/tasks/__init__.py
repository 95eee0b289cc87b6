"""Tasks: a fixed list of items, and how each item is scored."""

from lirefs.tasks.answers import judge
from lirefs.tasks.default_suite import (
    calibration_texts,
    choice_item,
    default_tasks,
    fact_items,
    heldout_texts,
)
from lirefs.tasks.inference import greedy, option_log_likelihoods, score_continuations, token_nlls
from lirefs.tasks.items import ItemTask
from lirefs.tasks.lm_eval import lm_eval_model, lm_eval_tasks
from lirefs.tasks.lm_eval_export import write_lm_eval_task
from lirefs.tasks.mining import Mined, Window, mine
from lirefs.tasks.ndcg import RankAgreement, ndcg, ndcg_task
from lirefs.tasks.papers.build import skill_tasks
from lirefs.tasks.papers.catalogue import SKILLS, Skill
from lirefs.tasks.papers.suite import Suite, suite_tasks
from lirefs.tasks.recitation import (
    Recitation,
    StressTest,
    levenshtein,
    recitation_scores,
    recitation_task,
)
from lirefs.tasks.task import (
    FilledBlank,
    ItemResult,
    MultipleChoice,
    Perplexity,
    ShortAnswer,
    Task,
)

__all__ = [
    "SKILLS",
    "FilledBlank",
    "ItemResult",
    "ItemTask",
    "Mined",
    "MultipleChoice",
    "Perplexity",
    "RankAgreement",
    "Recitation",
    "ShortAnswer",
    "Skill",
    "StressTest",
    "Suite",
    "Task",
    "Window",
    "calibration_texts",
    "choice_item",
    "default_tasks",
    "fact_items",
    "greedy",
    "heldout_texts",
    "judge",
    "levenshtein",
    "lm_eval_model",
    "lm_eval_tasks",
    "mine",
    "ndcg",
    "ndcg_task",
    "option_log_likelihoods",
    "recitation_scores",
    "recitation_task",
    "score_continuations",
    "skill_tasks",
    "suite_tasks",
    "token_nlls",
    "write_lm_eval_task",
]
