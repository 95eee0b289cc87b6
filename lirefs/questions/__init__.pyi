from .question import Question
from .questions import Questions, Split, load_questions

__all__ = ["Question", "Questions", "Split", "load_questions"]
