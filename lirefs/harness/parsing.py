"""Reading an answer from generated text, or finding that none can be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Kind = Literal["text", "words", "number", "worked"]

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


def judge(text: str, answers: Sequence[str], kind: Kind) -> tuple[bool, bool]:
    """Whether an answer can be read from a text, and whether it is right.

    Args:
        text: One line.
        answers: Accepted answers.
        kind: `text`: the text begins with the words of an answer (no case, punctuation or
            articles); `words`: it has exactly the words of an answer; `number`: its first number
            is that of an answer; `worked`: it reasons, and the number of its last `the answer is
            N` counts.
    """
    if kind == "worked":
        stated = final_number(text)
        return stated is not None, any(stated == number_at(answer) for answer in answers)
    if kind == "number":
        found = re.search(r"-?\d[\d,]*(?:\.\d+)?", text.replace("\u2212", "-"))
        if found is None:
            return False, False
        number = float(found.group().replace(",", ""))
        return True, any(number == float(answer) for answer in answers)
    if kind == "words":
        words = re.findall(r"\w+", text.casefold())
        return bool(words), any(words == re.findall(r"\w+", one.casefold()) for one in answers)
    words = normalise(text)
    aliases = [alias for alias in map(normalise, answers) if alias]
    return bool(words), any(words[: len(alias)] == alias for alias in aliases)


def normalise(text: str) -> list[str]:
    """Words of a text without case, punctuation and articles."""
    words = re.findall(r"\w+", text.casefold())
    return [word for word in words if word not in ("a", "an", "the")]
