"""Arithmetic expressions in plain text: their tokens and exact values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

Tree: TypeAlias = Fraction | tuple[str, "Tree", "Tree"]
"""A number, or (operator, left, right)."""

LONGEST_NUMBER = 100
LONGEST_EXPRESSION = 400
DEEPEST = 40
"""Limits for characters of a number, tokens of an expression and open parentheses. Sensible text
stays far below them, but a model that repeats itself may not."""

# Minus, en dash; times, dots, asterisk; division sign; almost equal.
_SIGNS = str.maketrans("\u2212\u2013\u00d7\u00b7\u22c5\u2217\u00f7\u2248", "--****/=")
# Not calculations: the number or bullet of a list entry, dates, and spans of years.
_LIST = re.compile(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+", re.MULTILINE)
_DATE = re.compile(r"\b(?:\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([/-])\d{1,2}\1\d{4})\b")
_YEARS = re.compile(r"(?<![\d.,])(1[5-9]\d\d|20\d\d)-(1[5-9]\d\d|20\d\d)(?![\d.,]*\d)")
_TOKEN = re.compile(
    r"(?P<number>(?:\d[\d,]*\d|\d)(?:\.\d+)*|\.\d+)"
    r"|(?P<compare>[=!<>]=|=>|[<>])|(?P<sign>[-+*/=()%])"
    r"|(?P<currency>[$€£¥])|(?P<word>[^\W\d_]+)|(?P<space>[^\S\n]+)|(?P<other>.|\n)"
)
# A unit between a number and a sign: `12 miles / 4 mph = 3`, `$20/hour * 8 = $160`. It has two
# letters or more; a single letter would be a variable.
_UNIT = re.compile(
    r"(?: ?(?P<name>[^\W\d_]{2,}))?(?:(?: ?/ ?| per )[^\W\d_]{2,}"
    r"|(?=[ \t]*(?:[-+*/=)]|[xX][ \t]*[\d$€£¥(.])))"
)
_NO_UNITS = {
    *("and", "as", "at", "by", "for", "from", "if", "in", "is", "are", "was", "were", "of", "on"),
    *("or", "per", "plus", "minus", "so", "than", "then", "times", "to", "we", "with", "which"),
}
SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "dozens", "percent"}
"""A number before one of these words is only a part of the number that is meant."""

_NUMBER = re.compile(r"(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|\.\d+")


@dataclass(frozen=True)
class Token:
    """A piece of a text.

    Attributes:
        kind: `number`, a sign of `+-*/()%=`, `break` for anything that is not arithmetic, or `bad`
            for a number that cannot be read.
        text: The piece as written.
        start: Offset of its first character.
        end: Offset after its last character, or after its unit.
        unit: Unit of a number, in the singular; empty if there is none.
    """

    kind: str
    text: str
    start: int
    end: int
    unit: str = ""


@dataclass(frozen=True)
class Expression:
    """An expression and its value.

    Attributes:
        tree: Its operations; a single number has none.
        value: Its exact value; None for a division by zero.
        percent: Whether the value is a percentage.
        rounding: Half of the last decimal place of a single number with decimals, else 0.
        unit: Unit of a sum or of a single number; empty for products.
    """

    tree: Tree
    value: Fraction | None
    percent: bool = False
    rounding: Fraction = Fraction(0)
    unit: str = ""


def tokens(text: str) -> list[Token]:
    """Split a text into tokens; spaces and currency signs are left out."""
    text = text.translate(_SIGNS)
    for pattern in (_LIST, _DATE):
        text = pattern.sub(lambda match: "\n" * len(match[0]), text)
    text = _YEARS.sub(lambda m: "\n" * len(m[0]) if m[1] < m[2] else m[0], text)
    found: list[Token] = []
    end = 0
    while match := _TOKEN.match(text, end):
        kind, piece, unit, end = str(match.lastgroup), match[0], "", match.end()
        if kind in ("space", "currency"):
            continue
        if kind == "sign":
            kind = piece
        elif kind == "number":
            glued = match.start() > 0 and text[match.start() - 1].isalpha()
            after_x = bool(found) and found[-1].kind == "*"
            readable = _NUMBER.fullmatch(piece) and len(piece) <= LONGEST_NUMBER
            kind = "number" if readable and (after_x or not glued) else "bad"
            unit, end = _unit(text, end)
        elif kind == "word" and _multiplies(text, match, found):
            kind = "*"
        else:
            kind = "break"
        found.append(Token(kind, piece, match.start(), end, unit))
    return _grouped(found)


def read_expression(found: Sequence[Token]) -> Expression | None:
    """Read all tokens as one expression; None if they are not an expression, or ambiguous."""
    if len(found) > LONGEST_EXPRESSION:
        return None
    parser = _Parser(found)
    try:
        expression = parser.sum()
    except _UnreadableError:
        return None
    return expression if parser.place == len(found) else None


def _unit(text: str, end: int) -> tuple[str, int]:
    """The unit after a number that ends at `end`, and the offset where the unit ends."""
    match = _UNIT.match(text, end)
    name = (match["name"] or "").lower() if match else ""
    if match is None or name in _NO_UNITS or name in SCALES:
        return "", end
    return name.removesuffix("s"), match.end()


def _multiplies(text: str, match: re.Match[str], found: Sequence[Token]) -> bool:
    """Whether a word means multiplication: `x` between numbers, or `of` after a percentage."""
    if not found:
        return False
    if match[0] == "of":
        return found[-1].kind == "%"
    following = text[match.end() :].lstrip(" \t$€£¥")[:1]
    between = found[-1].kind in ("number", ")", "%") and (following.isdigit() or following in "(.")
    return match[0] in ("x", "X") and between and following != ""


def _grouped(found: list[Token]) -> list[Token]:
    """Turn useless parentheses into breaks: unmatched ones, and those around an equality."""
    result = list(found)
    opened: list[tuple[int, bool]] = []

    def to_break(place: int) -> None:
        one = found[place]
        result[place] = Token("break", one.text, one.start, one.end)

    for place, token in enumerate(found):
        if token.kind == "(":
            opened.append((place, False))
        elif token.kind in ("=", "break", "bad"):
            opened = [(one, True) for one, _ in opened]
        elif token.kind == ")":
            start, useless = opened.pop() if opened else (place, True)
            if useless:
                to_break(start)
                to_break(place)
    for place, _ in opened:
        to_break(place)
    return result


class _UnreadableError(Exception):
    """The tokens are not an expression, or have two meanings."""


class _Parser:
    """Recursive descent: sums of products of signed numbers and parentheses."""

    def __init__(self, found: Sequence[Token]) -> None:
        self.found = found
        self.place = 0
        self.depth = 0

    def kind(self) -> str:
        return self.found[self.place].kind if self.place < len(self.found) else ""

    def sum(self) -> Expression:
        left = self.product()
        while (sign := self.kind()) in ("+", "-"):
            self.place += 1
            right = self.product()
            # `50 + 10%` may mean 55 or 50.1; 2 hours + 30 minutes is not 32.
            if left.percent != right.percent or len({left.unit, right.unit} - {""}) > 1:
                raise _UnreadableError
            left = _combined(sign, left, right, left.percent, left.unit or right.unit)
        return left

    def product(self) -> Expression:
        left = self.signed()
        while (sign := self.kind()) in ("*", "/"):
            self.place += 1
            right = self.signed()
            # A percentage of a percentage, or divided by a number, is a percentage.
            percent = left.percent and right.percent == (sign == "*")
            left = _combined(sign, left, right, percent)
        return left

    def signed(self) -> Expression:
        if self.kind() != "-":
            return self.atom()
        self.place += 1
        one = self.atom()
        value = None if one.value is None else -one.value
        tree: Tree = ("-", Fraction(0), one.tree)
        if isinstance(one.tree, Fraction):
            tree = -one.tree
        return Expression(tree, value, one.percent, one.rounding, one.unit)

    def atom(self) -> Expression:
        kind = self.kind()
        if kind == "number":
            digits = self.found[self.place].text.replace(",", "")
            self.place += 1
            decimals = len(digits.partition(".")[2])
            rounding = Fraction(1, 2 * 10**decimals) if decimals else Fraction(0)
            unit = self.found[self.place - 1].unit
            one = Expression(Fraction(digits), Fraction(digits), False, rounding, unit)
        elif kind == "(" and self.depth < DEEPEST:
            self.place, self.depth = self.place + 1, self.depth + 1
            one = self.sum()
            if self.kind() != ")":
                raise _UnreadableError
            self.place, self.depth = self.place + 1, self.depth - 1
        else:
            raise _UnreadableError
        if self.kind() != "%":
            return one
        self.place += 1
        value = None if one.value is None else one.value / 100
        tree: Tree = ("/", one.tree, Fraction(100))
        if isinstance(one.tree, Fraction):
            tree = one.tree / 100
        return Expression(tree, value, True, one.rounding / 100)


def _combined(
    sign: str, left: Expression, right: Expression, percent: bool, unit: str = ""
) -> Expression:
    tree = (sign, left.tree, right.tree)
    a, b = left.value, right.value
    if a is None or b is None or (sign == "/" and b == 0):
        return Expression(tree, None, percent, unit=unit)
    value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
    return Expression(tree, value, percent, unit=unit)
