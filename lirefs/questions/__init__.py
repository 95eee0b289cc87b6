"""Labelled questions of two classes: prompts, chats and contrast pairs, and their split."""

from lirefs.questions.question import LABELS, PROMPT_FORMAT, SIDES, Question
from lirefs.questions.questions import BUILTIN, Questions, Split, load_questions

__all__ = [
    "BUILTIN",
    "LABELS",
    "PROMPT_FORMAT",
    "SIDES",
    "Question",
    "Questions",
    "Split",
    "load_questions",
]
