"""What a model reads of a question, and how the token at its end is called."""

from __future__ import annotations

from collections.abc import Iterable

from lirefs.model.language_model import LanguageModel
from lirefs.questions import Question


def prompts_of(lm: LanguageModel, questions: Iterable[Question]) -> list[str]:
    """The text of each question as this model reads it: a chat in its template (`lm.chat`).

    Raises:
        SettingError: A question is a chat, and the tokenizer has no template, or refuses it.
    """
    return [
        lm.chat([{"role": role, "content": content} for role, content in one.messages])
        if one.messages
        else one.prompt
        for one in questions
    ]


def token_text(lm: LanguageModel, token: int) -> str:
    """The text of one token; its name in the vocabulary where it has none of its own."""
    text = str(lm.tokenizer.decode([token]))
    return text if text.strip("\ufffd") else str(lm.tokenizer.convert_ids_to_tokens(token))
