from .answers import judge
from .default_suite import (
    calibration_texts,
    choice_item,
    default_tasks,
    fact_items,
    heldout_texts,
)
from .inference import greedy, option_log_likelihoods, score_continuations, token_nlls
from .items import ItemTask
from .lm_eval import lm_eval_model, lm_eval_tasks
from .lm_eval_export import write_lm_eval_task
from .mining import Mined, Window, mine
from .ndcg import RankAgreement, ndcg, ndcg_task
from .papers.build import skill_tasks
from .papers.catalogue import SKILLS, Skill
from .papers.suite import suite_tasks
from .recitation import (
    Recitation,
    StressTest,
    levenshtein,
    recitation_scores,
    recitation_task,
)
from .settings import Suite
from .task import (
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
