import re

import pytest

from lirefs.tasks.answers import final_number, judge, number_at
from lirefs.tasks.papers.catalogue import WORKED_EXAMPLES


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-7", -7),
        ("\u22127.", -7),
        ("+7", 7),
        ("$1,250.50 a month", 1250.5),
        ("-$5", -5),
        ("$-5", -5),
        ("$ 18.", 18),
        ("€3", 3),
        ("1,450,000", 1450000),
        ("0.5", 0.5),
        ("15%", 15),
        ("20km", 20),
        ("18. She has 7 left.", 18),
        ("18.0", 18),
        ("১৮", 18),
    ],
)
def test_numbers(text, value):
    assert number_at(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eighteen",
        "x = 5",
        "3 + 5 = 8",
        "18-20",
        "18 - 20",
        "1/2",
        "5 1/2",
        "12:30",
        "3,50",
        "1,2",
        "1,00,000",
        "5, 6 and 7",
        "1.2.3",
        "2e5",
        "2 x 3",
        "2 * 3",
        "--5",
        "-$-5",
        ".",
        "$",
    ],
)
def test_what_is_no_single_number(text):
    assert number_at(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 3 = 5. The answer is 5.", 5),
        ("The final answer is: **$1,200**.", 1200),
        ("THE ANSWER IS (-4)", -4),
        ("The answer is \\$18.", 18),
        ('The answer is "7"', 7),
        ("The answer is 5. No: the answer is 7.", 7),  # the last one counts
        ("The answer is 5. The answer is unknown.", 5),  # the last one with a number
        ("The answer is -10 degrees", -10),
    ],
)
def test_final_numbers(text, value):
    assert final_number(text) == value
    assert judge(text, [str(value)], "worked") == (True, True)
    assert judge(text, [str(value + 1)], "worked") == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "So it is 18.",
        "5 + 6 = 11",
        "The answer is",
        "The answer is eighteen.",
        "The answer is not 18.",
        "The answer is 3 + 5.",
        "#### 18",
        "The answers is 18",
    ],
)
def test_what_states_no_answer_is_unparsable_and_never_guessed(text):
    assert final_number(text) is None
    assert judge(text, ["18"], "worked") == (False, False)


def test_gold_answers_are_read_by_the_same_rule():
    assert judge("The answer is 1450000.", ["1,450,000"], "worked") == (True, True)
    assert judge("The answer is $70,000.00", ["70000"], "worked") == (True, True)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("airch", (True, False)),
        ("Eengreb  abletteb.", (True, True)),
        ("eengreb abletteb and more", (True, False)),
        ("eengreb", (True, False)),
        ("abletteb eengreb", (True, False)),
        ("", (False, False)),
        ("...", (False, False)),
    ],
)
def test_words_must_be_exactly_those(text, result):
    assert judge(text, ["eengreb abletteb"], "words") == result


@pytest.mark.parametrize(("name", "n"), [("word_problems", 8), ("arithmetic", 3), ("counting", 3)])
def test_worked_examples_calculate_right_and_end_in_their_answer(name, n):
    examples = WORKED_EXAMPLES[name]
    assert examples.endswith("\n\n")
    parts = examples.strip().split("\n\n")
    assert len(parts) == n
    for part in parts:
        question, answer = re.fullmatch(r"Q: (.*)\nA: (.*)", part).groups()  # one line each
        chains = re.findall(r"(-?[\d.]+(?: (?:[-+*/]|=) -?[\d.]+)* = -?\d+(?:\.\d+)?)", answer)
        assert chains
        for chain in chains:
            values = [eval(side) for side in chain.rstrip(".").split(" = ")]
            assert values == pytest.approx([values[0]] * len(values)), chain
        stated = final_number(answer)
        assert stated == pytest.approx(eval(chains[-1].split(" = ")[-1].rstrip(".")))
        assert re.search(r"The answer is -?\d+\.$", answer)
        if question.endswith("="):
            assert eval(question.removesuffix("=")) == stated
