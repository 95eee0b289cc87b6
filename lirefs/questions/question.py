"""One labelled question and its prompt."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from lirefs.errors import QuestionsError

LABELS = ("reasoning", "memory")
"""The labels where no others are given; directions point to the first one."""
SIDES = ("train", "validation", "test")
PROMPT_FORMAT = "Q: {question}\nA: "
_SHOWN = 60
"""Characters of a text that its `repr` shows."""
# Zero-width, joining and direction marks, soft hyphens, fillers and variation selectors.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]"
)
_MARKS = ".,;:!?'\"\u2018\u2019\u201c\u201d"


def same_text(text: str) -> str:
    """A text with composed characters (NFC), without those that nobody sees."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _UNSEEN.sub("", text))


@dataclass(frozen=True)
class Question:
    """One labelled question.

    Attributes:
        text: The question itself, without options.
        label: One of the two labels of its set, by default `"reasoning"` (the answer must be
            computed) or `"memory"` (it must be recalled).
        id: Name of the item, unique in its set.
        options: Answer options, if any.
        answer_index: Index of the right option, None if unknown.
        subject: Free text.
        side: `"train"`, `"validation"` or `"test"` if the set comes with a split, else empty.
        prompt_format: The prompt, with `{question}` for the text; the default is that of the
            official LiReF code. None: the text is the prompt, taken verbatim.
        score: How much of the first label it has, in [0, 1]; None without grades.
        pair: Name of the contrast pair that it belongs to, if any.
        messages: (role, content) of each message of a chat, which takes the place of the prompt.
    """

    text: str
    label: str
    id: str
    options: tuple[str, ...] = ()
    answer_index: int | None = None
    subject: str = ""
    side: str = ""
    prompt_format: str | None = PROMPT_FORMAT
    score: float | None = None
    pair: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else f"{self.text[: _SHOWN - 1]}…"
        return f"Question({self.label!r}, {text!r}, id={self.id!r})"

    @property
    def prompt(self) -> str:
        """The text a model reads; QuestionsError for a chat, which needs the model's template."""
        if self.messages:
            raise QuestionsError(
                f"question {self.id!r} is a chat, and its prompt depends on the model: use "
                "lirefs.directions.prompts_of(lm, questions)"
            )
        if self.prompt_format is None:
            return self.text
        return self.prompt_format.replace("{question}", self.text)

    @property
    def key(self) -> str:
        """The text without case, spaces and punctuation: equal keys are duplicates.

        So are texts that differ only in how Unicode writes them: composed or in parts, with or
        without characters that nobody sees. Signs and brackets stay, as they make another question
        of the same numbers.
        """
        visible = same_text(same_text(self.text).casefold())
        return "".join(one for one in "".join(visible.split()) if one not in _MARKS)
