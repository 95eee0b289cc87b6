"""Labelled questions of two classes: prompts, chats and contrast pairs, and their split."""

from lirefs.questions.question import Question
from lirefs.questions.questions import Questions, Split, load_questions

__all__ = ["Question", "Questions", "Split", "load_questions"]
