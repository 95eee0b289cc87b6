"""Read an answer from generated text, or find that none can be read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, get_args

from lirefs.errors import TaskError, as_list, must_be

AnswerKind = Literal["text", "words", "number", "worked"]

# Between "answer is" and its number: marks of emphasis, quotes, a colon.
_STATED = re.compile(r"\banswer is[\s:*_\"'\u201c\u2018(\[\\]*", re.IGNORECASE)
_NUMBER = re.compile(
    r"([-\u2212\u2013+]?)\s?([$£€¥₹]?)\s?([-\u2212\u2013]?)(\d+(?:,\d+)*(?:\.\d+)?)"
)
_FIRST = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
# A number followed by one of these begins an expression, a list, a date or a time.
_CONTINUES = re.compile(r"\s*[-\u2212\u2013+*/=\u00d7\u00f7^:,x]\s*\\?[$£€¥₹]?\d|[.e]\d|\s+\d")


def number_at(text: str) -> float | None:
    """The number with which a text begins, None if it does not begin with one.

    It may have a sign, a currency sign, and commas between groups of three digits, not elsewhere
    (`3,50`). The beginning of an expression, list, range, fraction, date or time does not count.
    """
    found = _NUMBER.match(text)
    if found is None or _CONTINUES.match(text, found.end()):
        return None
    first, _, second, digits = found.groups()
    whole = digits.split(".")[0]
    if "," in whole and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", whole):
        return None
    if first and second:
        return None
    value = _value(digits)
    return -value if value and first + second not in ("", "+") else value


def first_number(text: str) -> float | None:
    """The first number in a text, None if there is none; the first of `3 + 5` is 3."""
    found = _FIRST.search(text.replace("\u2212", "-"))
    return None if found is None else _value(found.group())


def final_number(text: str) -> float | None:
    """The number N of the last `the answer is N` in a text, None if there is none."""
    found = [number_at(text[match.end() :]) for match in _STATED.finditer(text)]
    return next((value for value in reversed(found) if value is not None), None)


def judge(text: str, answers: Sequence[str], kind: AnswerKind) -> tuple[bool, bool]:
    """Whether an answer can be read from a text, and whether it is right.

    Args:
        text: One line.
        answers: Accepted answers.
        kind: How an answer is read. `text`: the text begins with the words of an answer, without
            case, punctuation and articles; `words`: its words are exactly those of an answer;
            `number`: its first number is that of an answer; `worked`: the number of its last
            `the answer is N` is that of an answer.
    """
    must_be(text, str, "text", TaskError)
    answers = [answers] if isinstance(answers, str) else as_list(answers, "answers", str, TaskError)
    if kind not in get_args(AnswerKind):
        raise TaskError(f"kind is {kind!r:.60}; expected {', '.join(get_args(AnswerKind))}")
    if kind in ("number", "worked"):
        stated = first_number(text) if kind == "number" else final_number(text)
        return stated is not None, stated is not None and stated in map(number_at, answers)
    if kind == "words":
        words = _words(text)
        return bool(words), bool(words) and words in map(_words, answers)
    words = normalise(text)
    aliases = filter(None, map(normalise, answers))
    return bool(words), any(words[: len(alias)] == alias for alias in aliases)


def normalise(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles."""
    return [word for word in _words(text) if word not in ("a", "an", "the")]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _value(digits: str) -> float | None:
    value = float(digits.replace(",", ""))
    return value if math.isfinite(value) else None  # too large for a float
