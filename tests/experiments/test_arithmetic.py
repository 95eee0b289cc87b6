import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from experiments.arithmetic.traces import VERDICTS, arithmetic_errors, compare_traces, read_steps
from lirefs.comparison.comparison import Comparison, TaskInfo
from lirefs.tasks.task import ItemResult

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k.jsonl"
UNCHANGED, WRONG, DIFFERENT, UNREADABLE = VERDICTS


def read(text):
    """(expression, stated, right) of each step."""
    return [(one.expression, one.stated, one.right) for one in read_steps(text)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 * 4 = 14", 14),
        ("(2 + 3) * 4 = 20", 20),
        ("20 - 5 - 3 = 12", 12),
        ("24 / 4 / 2 = 3", 3),
        ("16 \u2212 3 = 13", 13),
        ("3 \u00d7 4 = 12", 12),
        ("12 ÷ 4 = 3", 3),
        ("3 x 4 = 12", 12),
        ("3x4=12", 12),
        ("3 X $4 = $12", 12),
        ("$1,200 * 2 = $2,400", 2400),
        ("€2.50 + €2.50 = €5", 5),
        ("0.1 + 0.2 = 0.3", Fraction(3, 10)),
        (".5 * 4 = 2", 2),
        ("5 - 8 = -3", -3),
        ("-3 + 5 = 2", 2),
        ("2 * (-3) = -6", -6),
        ("2 * -3 = \u22126", -6),
        ("10% of 50 = 5", 5),
        ("200 * 15% = 30", 30),
        ("30% + 20% = 50%", Fraction(1, 2)),
        ("100% - 30% = 70%", Fraction(7, 10)),
        ("20 / 100 = 20%", Fraction(1, 5)),
        ("12 miles / 4 mph = 3 hours", 3),
        ("$20/hour * 35 hours/week = $700/week", 700),
        ("5 apples + 3 apples = 8 apples", 8),
        ("10 / 3 = 3.33", Fraction(333, 100)),
        ("She has (5 + 3 = 8) left", 8),
        ("half, so a profit of 200,000-130,000=$70,000", 70000),
        ("2024-1995 = 29", 29),
        ("1) 3 + 4 = 7", 7),
        ("- 3 + 4 = 7", 7),
        ("x = 3 + 4 = 7", 7),
    ],
)
def test_a_right_step_is_read_as_right(text, value):
    (step,) = read_steps(text)
    assert step.right
    assert step.stated == value


@pytest.mark.parametrize(
    ("text", "stated", "true"),
    [
        ("200 + 60 = 220", 220, 260),
        ("3 * 4 = 13 apples", 13, 12),
        ("10 / 3 = 3", 3, Fraction(10, 3)),
        ("10 / 3 = 3.34", Fraction(334, 100), Fraction(10, 3)),
        ("7 / 2 = 3", 3, Fraction(7, 2)),
        ("5 - 8 = 3", 3, -3),
        ("10% of 50 = 10", 10, 5),
        ("30% + 20% = 60%", Fraction(3, 5), Fraction(1, 2)),
        ("5 / 0 = 0", 0, None),
        ("4 / (2 - 2) = 1", 1, None),
    ],
)
def test_a_wrong_step_is_read_as_wrong(text, stated, true):
    (step,) = read_steps(text)
    assert not step.right
    assert (step.stated, step.true) == (stated, true)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in 2020-2021 there were 5",
        "the season 2020-2021 = 1 year",
        "on 2020-05-03 = Sunday",
        "12/5/2020 = a Monday",
        "x = 5",
        "3x + 5 = 20",
        "2x = 10",
        "3y + 4 = 10",
        "x - 4 * 2 = 10",
        "(a + b) - 4 * 2 = 2",
        "the x axis = 3",
        "3 feet = 36 inches",
        "half of 12 + 3 = 9",
        "2^3 + 1 = 9",
        "50 + 10% = 55",
        "2 hours + 30 minutes = 150 minutes",
        "500,000 * 2 = 1 million",
        "7 / 2 = 3 remainder 1",
        "10 / 4 = 2 1/2",
        "1 1/2 + 2 = 3.5",
        "3 * 4 = ",
        "= 12",
        "3 + = 4",
        "3 + 4 > 6",
        "3 + 4 == 7",
        "1,2 + 3 = 4,2",
        "1.2.3 + 4 = 5",
        "A4 + 3 = 7",
        "((3 + 4) = 7",
        "1 + " * 5000 + "1 = 5001",
        "9" * 5000 + " + 1 = 2",
        "(" * 5000 + "1 + 1" + ")" * 5000 + " = 2",
    ],
)
def test_text_that_is_not_a_step_or_has_two_readings_is_left_out(text):
    assert [one for one in read_steps(text) if not one.right] == []
    if not text.startswith("(("):
        assert read_steps(text) == []


def test_chained_equalities_continue_or_rewrite_the_left_side():
    running = read("3 * 4 = 12 + 5 = 17")
    assert running == [("3 * 4", 12, True), ("12 + 5", 17, True)]
    rewritten = read("2 * (3 + 4) = 2 * 7 = 14")
    assert rewritten == [("2 * (3 + 4)", 14, True), ("2 * 7", 14, True)]
    assert read("3 * 4 = 13 + 5 = 18") == [("3 * 4", 13, False), ("13 + 5", 18, True)]
    assert read("3 + 4 = 7 = 7") == [("3 + 4", 7, True)]


def test_marks_stand_for_the_calculation_around_them():
    once = [("48/2", 24, True)]
    assert read("She sold 48/2 = <<48/2=24>>24 clips.") == once
    assert read("She sold half, <<48/2=24>>24 clips.") == once
    both = read("48 + 24 = <<48+24=72>>72, and 72 / 2 = 36")
    assert both == [("48+24", 72, True), ("72 / 2", 36, True)]
    # A mark that contradicts the text around it is a step of its own.
    assert [right for _, _, right in read("3 + 4 = <<3+4=7>>8")] == [False, True]


def test_random_expressions_agree_with_python():
    rng = random.Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(1, 99))
        inner = f"{expression(depth - 1)} {rng.choice('+-*/')} {expression(depth - 1)}"
        return f"({inner})" if rng.random() < 0.5 else inner

    seen = 0
    for _ in range(500):
        text = expression(3)
        exact = "".join(f"F({part})" if part.isdigit() else part for part in _split(text))
        try:
            value = eval(exact, {"F": Fraction})
        except ZeroDivisionError:
            value = None
        found = read_steps(f"{text} = 0.5")
        if any(sign in text for sign in "+-*/"):
            (step,) = found
            assert step.true == value
            seen += 1
    assert seen > 300


def _split(text):
    import re

    return re.findall(r"\d+|.", text)


BEFORE = "He buys 3 * 4 = 12 apples. Then 12 + 5 = 17 in all."


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (BEFORE, UNCHANGED),
        ("Four times three: 4 * 3 = 12, and 5 + 12 = 17.", UNCHANGED),
        ("He buys 3 * 4 = 13 apples. Then 13 + 5 = 18 in all.", WRONG),
        ("He buys 3 * 4 = 12 apples. Then 12 + 5 = 18 in all.", WRONG),
        ("He buys 3 + 4 = 7 apples. Then 7 + 5 = 12 in all.", DIFFERENT),
        ("He buys 3 * 4 = 13 apples. Then 12 + 6 = 18 in all.", DIFFERENT),
        ("He buys 3 * 4 = 12 apples.", DIFFERENT),
        ("apples apples apples", UNREADABLE),
    ],
)
def test_pairs_of_traces(after, verdict):
    assert compare_traces(BEFORE, after) == verdict


def test_operands_of_differences_keep_their_places():
    assert compare_traces("9 - 4 = 5", "4 - 9 = 5") == DIFFERENT


def test_a_step_that_was_wrong_before_is_not_a_new_error():
    assert compare_traces("2 + 2 = 5", "2 + 2 = 5") == UNCHANGED


def test_arithmetic_errors_count_items_that_were_lost():
    def items(rows):
        return [
            ItemResult(f"i/{n}", {"accuracy": float(right)}, output=text)
            for n, (text, right) in enumerate(rows)
        ]

    before = [(BEFORE, 1)] * 4 + [("nothing", 0)]
    after = [(BEFORE, 1), ("3 * 4 = 13, 13 + 5 = 18", 0), ("3 + 4 = 7", 0), ("no", 0), (BEFORE, 1)]
    comparison = Comparison(
        {"unchanged": {"sums": items(before)}, "edit": {"sums": items(after)}},
        {"sums": TaskInfo("arithmetic", "accuracy")},
    )
    found = arithmetic_errors(comparison, "sums", "edit")
    assert found.lost == 3
    assert found.counts == {UNCHANGED: 0, WRONG: 1, DIFFERENT: 1, UNREADABLE: 1}
    assert [one.id for one in found.examples[WRONG]] == ["i/1"]
    assert found.shares[WRONG].value == pytest.approx(1 / 3)
    assert found.shares[WRONG].n == 3
    nothing = arithmetic_errors(
        Comparison(
            {"unchanged": {"sums": items(before)}, "edit": {"sums": items(before)}},
            {"sums": TaskInfo("arithmetic", "accuracy")},
        ),
        "sums",
        "edit",
    )
    assert (nothing.lost, nothing.shares) == (0, {})


@pytest.mark.skipif(not GSM8K.exists(), reason=f"{GSM8K} is not there")
def test_solutions_of_gsm8k_are_read_and_right():
    import re

    mark = re.compile(r"<<([^<>]*)>>")
    marks = read_plain = wrong = 0
    for line in GSM8K.read_text().splitlines():
        solution = json.loads(line)["answer"]
        marks += len(mark.findall(solution))
        assert all(
            one.right for text in mark.findall(solution) for one in read_steps(f"<<{text}>>")
        )
        found = read_steps(mark.sub("", solution))
        read_plain += len(found)
        wrong += sum(not one.right for one in found)
    assert read_plain > 0.9 * marks
    assert wrong < 0.005 * read_plain
