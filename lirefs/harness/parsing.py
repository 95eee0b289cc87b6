"""Reading an answer from generated text, or finding that none can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What may stand between "answer is" and its number: marks of emphasis, quotes, a colon.
_STATED = re.compile(r"\banswer is[\s:*_\"'\u201c\u2018(\[\\]*", re.IGNORECASE)
_NUMBER = re.compile(
    r"([-\u2212\u2013+]?)\s?([$£€¥₹]?)\s?([-\u2212\u2013]?)(\d+(?:,\d+)*(?:\.\d+)?)"
)
# A number followed by one of these is the beginning of an expression, a list, a date or a time.
_GOES_ON = re.compile(r"\s*[-\u2212\u2013+*/=\u00d7\u00f7^:,x]\s*\\?[$£€¥₹]?\d|[.e]\d|\s+\d")
_MINUS = "-\u2212\u2013"


def number_at(text: str) -> float | None:
    """The number with which a text begins.

    A sign, a currency sign and commas between groups of three digits are understood. What is
    only the beginning of an expression (`3 + 5`), a list, a range, a fraction, a date or a time
    is no number, nor is one with commas elsewhere (`3,50`).
    """
    found = _NUMBER.match(text)
    if found is None or _GOES_ON.match(text, found.end()):
        return None
    first, _, second, digits = found.groups()
    whole = digits.split(".")[0]
    if "," in whole and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", whole):
        return None
    if first and second:
        return None
    value = float(digits.replace(",", ""))
    return -value if (first or second) and (first or second) in _MINUS else value


def final_number(text: str) -> float | None:
    """The number N of the last `the answer is N` in a text, None where there is none."""
    found = [number_at(text[match.end() :]) for match in _STATED.finditer(text)]
    readable = [value for value in found if value is not None]
    return readable[-1] if readable else None


def judge_worked(text: str, answers: Sequence[str]) -> tuple[bool, bool]:
    """Whether a worked answer states its number, and whether that is one of `answers`."""
    value = final_number(text)
    if value is None:
        return False, False
    return True, any(value == number_at(answer) for answer in answers)


def judge_words(text: str, answers: Sequence[str]) -> tuple[bool, bool]:
    """Whether a text has words, and whether they are exactly those of an answer.

    Case, spacing and punctuation do not count.
    """
    words = _words(text)
    return bool(words), any(words == _words(answer) for answer in answers)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
