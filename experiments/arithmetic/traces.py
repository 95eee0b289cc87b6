"""Worked arithmetic in plain text: which steps a text takes, and which of them are wrong.

Merullo et al. 2025 (arXiv 2510.24256, tables 3 and 4) show texts that keep the reasoning and get
the sum wrong. To see whether an edit does that, count answers with the same operations and a wrong
result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

from experiments.arithmetic.expressions import (
    SCALES,
    Expression,
    Token,
    Tree,
    read_expression,
    tokens,
)
from lirefs.comparison import BASELINE, Comparison, Flip, flips
from lirefs.statistics import Estimate, wilson

Verdict = Literal[
    "unchanged", "same operations, wrong calculation", "different operations", "no steps readable"
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

_MARK = re.compile(r"<<([^<>]*)>>")
# After these words, a run of numbers is only the end of a calculation: `half of 12 + 3`.
_OPERATIONS = re.compile(
    r"\w* ?(times|plus|minus|twice|double|\^|√|!)"
    r"|(number|half|thirds?|quarters?|fourths?|fifths?) of|(multiplied|divided) by|(more|less) than"
)
# After these, a minus is a sign and not an operation on a preceding word.
_BEGINNINGS = {"", "\n", ":", ",", ".", ";", "("}
# `= 3 remainder 1`, and units that differ from those of the left side.
_SKIPPED = SCALES | {"cents", "remainder", "r", "k"}


@dataclass(frozen=True)
class Step:
    """One calculation of a text.

    Attributes:
        expression: Its left side as written.
        stated: The result that the text states.
        true: The exact result; None for a division by zero.
        right: Whether the two agree, where `stated` may be `true` rounded to its decimals.
        tree: The expression as nested (operator, left, right).
    """

    expression: str
    stated: Fraction
    true: Fraction | None
    right: bool
    tree: Tree = field(repr=False)


@dataclass(frozen=True)
class ArithmeticErrors:
    """Why items that were right are now wrong.

    Attributes:
        lost: Number of items that were right before and wrong after.
        counts: Number of these items by verdict, for all of `VERDICTS` in order.
        shares: The counts as shares of `lost`, with Wilson intervals; empty if nothing was lost.
        examples: The items by verdict.
    """

    lost: int
    counts: dict[Verdict, int]
    shares: dict[Verdict, Estimate]
    examples: dict[Verdict, list[Flip]]


def read_steps(text: str) -> list[Step]:
    """Read the calculations `a op b ... = c` of a text, with exact evaluation.

    It understands + - * / and their typographic signs, x between numbers, parentheses, decimals,
    thousands commas, currency signs, a unit after a number, percent if it has one meaning, chained
    equalities, and GSM8K's marks `<<a=b>>`. A calculation that has two readings, has a variable or
    adds different units is not a step: it is better to miss steps than to read wrong ones.

    Returns:
        The steps in the order of the text.
    """
    marks, removed, plain = [], 0, _MARK.sub("", text)
    for match in _MARK.finditer(text):
        marks += [(match.start() - removed, step) for _, _, step in _equations(match[1])]
        removed += len(match[0])
    found = [(place, step) for place, step in marks]
    for start, end, step in _equations(plain):
        # A mark repeats the calculation around it.
        marked = any(start < at <= end and one.stated == step.stated for at, one in marks)
        if not marked:
            found.append((start, step))
    return [step for _, step in sorted(found, key=lambda one: one[0])]


def compare_traces(before: str, after: str) -> Verdict:
    """Say how the calculations of two texts differ.

    Operations are the same if there are as many steps and each does the same to the same numbers;
    the terms of sums and products may change places. The result of an earlier step counts as the
    same number in both texts, even if it is wrong in one of them.

    Args:
        before: The first text.
        after: The second text.

    Returns:
        `same operations, wrong calculation` if a step is wrong in the second text and its
        counterpart is not; `unchanged` if no such step exists; `different operations`; or `no
        steps readable` if one of the texts has none.
    """
    first, second = read_steps(before), read_steps(after)
    if not first or not second:
        return "no steps readable"
    if len(first) != len(second):
        return "different operations"
    results: set[tuple[Fraction, Fraction]] = set()
    for one, other in zip(first, second, strict=True):
        if not _same(one.tree, other.tree, results):
            return "different operations"
        results.add((one.stated, other.stated))
    wrong = any(a.right and not b.right for a, b in zip(first, second, strict=True))
    return "same operations, wrong calculation" if wrong else "unchanged"


def arithmetic_errors(comparison: Comparison, task: str, variant: str) -> ArithmeticErrors:
    """Sort the items that a variant makes wrong by what happened to their calculations.

    Args:
        comparison: Results whose outputs are worked solutions.
        task: A task whose metric is 1 for right and 0 for wrong.
        variant: The variant to compare with the unchanged model.
    """
    examples: dict[Verdict, list[Flip]] = {verdict: [] for verdict in VERDICTS}
    for flip in flips(comparison, task, variant):
        if not flip.gained:
            examples[compare_traces(flip.before, flip.after)].append(flip)
    counts = {verdict: len(found) for verdict, found in examples.items()}
    lost = sum(counts.values())
    shares = {verdict: wilson(count, lost) for verdict, count in counts.items()} if lost else {}
    return ArithmeticErrors(lost, counts, shares, examples)


def _same(one: Tree, other: Tree, results: set[tuple[Fraction, Fraction]]) -> bool:
    if isinstance(one, Fraction) or isinstance(other, Fraction):
        return one == other or (one, other) in results
    (sign, a, b), (other_sign, c, d) = one, other
    if sign != other_sign:
        return False
    if _same(a, c, results) and _same(b, d, results):
        return True
    return sign in "+*" and _same(a, d, results) and _same(b, c, results)


def _equations(text: str) -> list[tuple[int, int, Step]]:
    """Steps with the offsets of their start and end in the text."""
    found = []
    for run, previous, following in _runs(tokens(text)):
        segments: list[list[Token]] = [[]]
        for token in run:
            if token.kind == "=":
                segments.append([])
            else:
                segments[-1].append(token)
        for index in range(len(segments) - 1):
            left, right = segments[index : index + 2]
            if not left or not right or (index == 0 and _cut(left, previous)):
                continue
            last = index + 2 == len(segments)
            step = _step(text, left, right, following if last else "")
            if step is not None:
                found.append((left[0].start, right[-1].end, step))
    return found


def _cut(left: list[Token], previous: str) -> bool:
    """Whether a run of numbers is only the end of a calculation."""
    if left[0].kind == "-":
        return previous.split(" ")[-1] not in _BEGINNINGS
    return left[0].kind in ("+", "*", "/") or _OPERATIONS.fullmatch(previous) is not None


def _runs(found: Sequence[Token]) -> list[tuple[list[Token], str, str]]:
    """Runs of numbers and signs with an equality, the two words before and the one after.

    Among the words before a run, an earlier run counts as the word `number`.
    """
    runs: list[tuple[list[Token], str, str]] = []
    current: list[Token] = []
    before = ["", ""]
    for token in [*found, Token("break", "", 0, 0)]:
        if token.kind not in ("break", "bad"):
            current.append(token)
            continue
        if any(one.kind == "=" for one in current):
            runs.append((current, " ".join(before), token.text.lower()))
        # The text after an unreadable number may be a part of it.
        word = "times" if token.kind == "bad" else token.text.lower()
        before = ["number" if current else before[1], word]
        current = []
    return runs


def _step(text: str, left: list[Token], right: list[Token], following: str) -> Step | None:
    expression = read_expression(left)
    if expression is None or isinstance(expression.tree, Fraction):
        return None
    whole, head = read_expression(right), _head(right)
    # `3 * 4 = 12 + 5 = 17` continues from the result, `2 * (3 + 4) = 2 * 7 = 14` rewrites the left
    # side. So the right side is read both as a whole and by its first number.
    if whole is None or following in _SKIPPED:
        return None
    readings = [one for one in (whole, head) if one is not None and one.value is not None]
    written = text[left[0].start : left[-1].end].strip()
    for one in readings:
        stated = _agreeing(expression, one)
        if stated is not None:
            return Step(written, stated, expression.value, True, expression.tree)
    values = [one.value for one in readings if one.value is not None]
    if not values:
        return None
    near = min(values, key=lambda one: abs(one - (expression.value or 0)))
    return Step(written, near, expression.value, False, expression.tree)


def _head(right: list[Token]) -> Expression | None:
    """The first number of a right side, with its sign and percent."""
    length = 1 + (right[0].kind == "-")
    if len(right) > length and right[length].kind == "%":
        length += 1
    return read_expression(right[:length])


def _agreeing(left: Expression, right: Expression) -> Fraction | None:
    """The result that the right side states, if it agrees with the left side."""
    if left.value is None or right.value is None:
        return None
    readings = [Fraction(1)]
    if left.percent != right.percent:  # `30 + 20 = 50%` and `30% + 20% = 50`
        readings.append(Fraction(1, 100) if left.percent else Fraction(100))
    for scale in readings:
        stated = right.value * scale
        if abs(left.value - stated) <= right.rounding * scale:
            return stated
    return None


def arithmetic_lines(comparison: Comparison, variants: Sequence[str]) -> list[str]:
    """Lines about the calculations of worked answers that a variant made wrong."""
    lines = []
    for task, info in comparison.tasks.items():
        outputs = [one.output for one in comparison.results[BASELINE][task]]
        if info.group != "arithmetic" or not any(map(read_steps, outputs)):
            continue
        for variant in variants:
            found = arithmetic_errors(comparison, task, variant)
            if found.lost:
                counts = "; ".join(f"{verdict} {n}" for verdict, n in found.counts.items() if n)
                lines.append(
                    f"Worked answers of {task} that {variant} makes wrong, "
                    f"n = {found.lost}: {counts}."
                )
    return lines
