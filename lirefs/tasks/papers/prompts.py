"""From a row of data to what is asked: one function for each form of prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lirefs.errors import TaskError
from lirefs.tasks.answers import normalise, number_at
from lirefs.tasks.papers.rows import Row, passage_around

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Example:
    """What a row asks and what is right.

    Attributes:
        prompt: Text up to where the answer begins.
        answer: The right answer as an answered example shows it, with its leading space.
        accepted: Texts that count as right, for generated answers.
        options: Texts to choose from, each with its leading space.
        right: Index of the right option.
        contexts: For a blank: the two beginnings of the sentence, filled.
        tag: Class of the item that analyses tell apart, a relation say.
    """

    prompt: str
    answer: str
    accepted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = 0
    contexts: tuple[str, str] = ("", "")
    tag: str = ""


def question(row: Row) -> Example | None:
    """`question`, `answers` and perhaps `relation`: asked from memory.

    Aliases without a word that is compared ("The The", "?") are left out, since any text would
    begin with them; None if no other is left.
    """
    answers = tuple(answer for answer in _texts(row, "answers") if normalise(answer))
    if not answers:
        return None
    return Example(
        f"Q: {_text(row, 'question')}\nA:",
        f" {answers[0]}",
        accepted=answers,
        tag=str(row.get("relation") or ""),
    )


def question_with_passage(row: Row) -> Example | None:
    """`question`, `answers`, `context`: asked with the passage that says the answer.

    None if no answer occurs in the context.
    """
    asked = question(row)
    if asked is None:
        return None
    passage = passage_around(str(row.get("context") or ""), list(asked.accepted))
    if not passage:
        return None
    return Example(f"Passage: {passage}\n{asked.prompt}", asked.answer, asked.accepted)


def relation(row: Row) -> Example:
    r"""`relation`, `prompt` with `{}`, `subject`, `object`.

    Texts of the published set spell some letters as `\u00ed`; they are put right.
    """
    template = _text(row, "prompt")
    if template.count("{}") != 1:
        raise TaskError("'prompt' must hold {} once, for the subject")
    answer = _unescaped(_text(row, "object"))
    if not normalise(answer):
        raise TaskError(f"'object' is {answer!r}, which has no word to compare")
    return Example(
        template.replace("{}", _unescaped(_text(row, "subject"))),
        f" {answer}",
        accepted=(answer,),
        tag=_text(row, "relation"),
    )


def word_problem(row: Row) -> Example:
    """`question`, `answer` (its number after the last `####`, if there is one), `language`."""
    return _number(
        f"Q: {_text(row, 'question')}\nA:", row, "answer", str(row.get("language") or "")
    )


def bbh_number(row: Row) -> Example:
    """`input` and `target`, a number."""
    return _number(f"Q: {_text(row, 'input')}\nA:", row, "target")


def bbh_options(row: Row) -> Example:
    """`input`, whose lines `(A) ...` are the options, and `target`, one of `(A)`, `(B)` ..."""
    text = _text(row, "input")
    options = re.findall(r"^(\([A-Z]\)) ", text, re.MULTILINE)
    return _choice(f"Q: {text}\nA:", options, _text(row, "target"))


def boolean_expression(row: Row) -> Example:
    """`input`, which ends in `is`, and `target`, `True` or `False`."""
    return _choice(_text(row, "input"), ["True", "False"], _text(row, "target"))


def web_of_lies(row: Row) -> Example:
    """`input`, which may begin with `Question: `, and `target`, `Yes` or `No`."""
    text = _text(row, "input").removeprefix("Question: ")
    return _choice(f"Q: {text}\nA:", ["Yes", "No"], _text(row, "target"))


def lettered(row: Row, tag: str = "") -> Example:
    """`question`, `options`, `answer_index`: the options are shown, their letters scored.

    Args:
        row: The row.
        tag: Field whose text is the tag, `category` say; empty: none.
    """
    return _lettered(row, "Question: ", "Answer:", " ", str(row.get(tag) or "").replace(" ", "_"))


def lettered_with_fact(row: Row) -> Example | None:
    """`fact` before a lettered question, None for a row without a fact."""
    if not row.get("fact"):
        return None
    return _lettered(row, f"Fact: {_text(row, 'fact')}\nQuestion: ", "Answer:", " ")


def lettered_chinese(row: Row) -> Example:
    """A lettered question in Chinese, with its `subject`."""
    tag = str(row.get("subject") or "")
    return _lettered(row, "问题：", "答案：", "", tag)  # noqa: RUF001 (as Chinese writes it)


def labelled(row: Row, label: str) -> Example | None:
    """A lettered question with a `label`, None if its label is the other one."""
    found = row.get("label")
    if found not in ("memory", "reasoning"):
        raise TaskError(f"'label' is {found!r}; expected 'reasoning' or 'memory'")
    return lettered(row) if found == label else None


def in_category(row: Row, category: str) -> Example | None:
    """A lettered question with a `category`, None if it is another one."""
    return lettered(row) if _text(row, "category") == category else None


def yes_or_no(row: Row) -> Example:
    """`passage`, `question` without its question mark, `answer`, true or false."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise TaskError(f"'answer' is {answer!r}; expected true or false")
    asked = f"Passage: {_text(row, 'passage')}\nQ: {_text(row, 'question').rstrip('?')}?\nA:"
    return _choice(asked, ["yes", "no"], "yes" if answer else "no")


def blank(row: Row) -> Example:
    """`sentence` with one `_`, `option1`, `option2`, `answer` (`1` or `2`)."""
    sentence = _text(row, "sentence")
    names = (_text(row, "option1"), _text(row, "option2"))
    answer = str(row.get("answer"))
    if sentence.count("_") != 1 or answer not in ("1", "2"):
        raise TaskError("'sentence' must hold one _, and 'answer' be 1 or 2")
    before, after = sentence.split("_")
    if not after.strip():
        raise TaskError("'sentence' has nothing after its _ that could be scored")
    right = int(answer) - 1
    return Example(
        "",
        before + names[right] + after,
        accepted=(after,),
        right=right,
        contexts=(before + names[0], before + names[1]),
    )


def _number(prompt: str, row: Row, field: str, tag: str = "") -> Example:
    text = str(row.get(field, "")).rsplit("####", maxsplit=1)[-1].strip()
    if number_at(text) is None:
        raise TaskError(f"{field!r} is {text!r}; expected a number")
    return Example(prompt, f" {text}", accepted=(text,), tag=tag)


def _choice(prompt: str, options: list[str], target: str) -> Example:
    if target not in options:
        raise TaskError(f"'target' is {target!r}; expected one of {', '.join(options) or 'none'}")
    return Example(
        prompt,
        f" {target}",
        options=tuple(f" {option}" for option in options),
        right=options.index(target),
    )


def _lettered(row: Row, before: str, after: str, space: str, tag: str = "") -> Example:
    options = _texts(row, "options")
    right = row.get("answer_index")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise TaskError(f"'answer_index' is {right!r} for {len(options)} options")
    if len(options) > len(LETTERS):
        raise TaskError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    lines = [f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False)]
    return Example(
        f"{before}{_text(row, 'question')}\n{''.join(lines)}{after}",
        f"{space}{LETTERS[right]}",
        options=tuple(f"{space}{letter}" for letter in LETTERS[: len(options)]),
        right=right,
        tag=tag,
    )


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"no {field!r} text in it")
    return value.strip()


def _texts(row: Row, field: str) -> tuple[str, ...]:
    values: Any = row.get(field)
    if not isinstance(values, list | tuple) or not values:
        raise TaskError(f"no list of texts {field!r} in it")
    if not all(isinstance(value, str) for value in values):
        raise TaskError(f"{field!r} holds something that is not a text")
    return tuple(values)


def _unescaped(text: str) -> str:
    halves = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    try:  # a character beyond four digits is spelled as two halves
        return halves.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise TaskError(f"{text!r:.80} spells half of a character") from None


WORD_PROBLEMS = """\
Q: A bakery bakes 12 trays of rolls with 8 rolls on each tray. It sells 70 rolls before noon. \
How many rolls are left?
A: The bakery bakes 12 * 8 = 96 rolls. After selling 70 of them, 96 - 70 = 26 rolls are left. \
The answer is 26.

Q: Nora has 45 stamps. Her uncle gives her 3 sheets of 10 stamps, and she loses 6 stamps. How \
many stamps does she have now?
A: The sheets hold 3 * 10 = 30 stamps. With them Nora has 45 + 30 = 75 stamps. She loses 6, so \
she has 75 - 6 = 69 stamps. The answer is 69.

Q: A ticket for the museum costs $14 for an adult and half as much for a child. What do 2 adults \
and 5 children pay in dollars?
A: A child pays 14 / 2 = 7 dollars. The adults pay 2 * 14 = 28 dollars and the children pay \
5 * 7 = 35 dollars. Together they pay 28 + 35 = 63 dollars. The answer is 63.

Q: Ravi walks 4 km to work and 4 km back on each of 5 days a week. How many kilometres does he \
walk in 3 weeks?
A: Each day Ravi walks 4 + 4 = 8 km. In a week he walks 8 * 5 = 40 km. In 3 weeks he walks \
40 * 3 = 120 km. The answer is 120.

Q: A tank holds 200 litres. It is 30% full, and then 25 litres are taken out. How many litres are \
in the tank?
A: At first the tank holds 200 * 0.30 = 60 litres. After 25 litres are taken out, 60 - 25 = 35 \
litres are left. The answer is 35.

Q: Lena is three times as old as Max. In 6 years their ages will sum to 52. How old is Max now?
A: In 6 years both together are 6 + 6 = 12 years older than now, so now their ages sum to \
52 - 12 = 40. Lena's age is 3 times Max's, so 40 is 3 + 1 = 4 times Max's age. Max is 40 / 4 = 10. \
The answer is 10.

Q: A printer prints 15 pages a minute. How many minutes does it need for 6 copies of a report of \
50 pages?
A: The copies have 6 * 50 = 300 pages. The printer needs 300 / 15 = 20 minutes. The answer is 20.

Q: Tom saves $1,250 and buys a bicycle for $480 and two helmets for $35 each. How much money in \
dollars does he have left?
A: The helmets cost 2 * 35 = 70 dollars. Tom spends 480 + 70 = 550 dollars. He has \
1250 - 550 = 700 dollars left. The answer is 700.

"""


ARITHMETIC = """\
Q: ((2 + 3 * 4 - 5) + (7 - -1 * 2 + 6)) =
A: The left bracket is 2 + 3 * 4 - 5 = 2 + 12 - 5 = 9. The right bracket is \
7 - -1 * 2 + 6 = 7 + 2 + 6 = 15. So the whole is 9 + 15 = 24. The answer is 24.

Q: ((-4 - 6 * -2 + 1) * (3 - 8 + 2 - 5)) =
A: The left bracket is -4 - 6 * -2 + 1 = -4 + 12 + 1 = 9. The right bracket is \
3 - 8 + 2 - 5 = -8. So the whole is 9 * -8 = -72. The answer is -72.

Q: ((9 * 2 * -1 + 7) - (-3 + 4 - -6 - 2)) =
A: The left bracket is 9 * 2 * -1 + 7 = -18 + 7 = -11. The right bracket is \
-3 + 4 - -6 - 2 = -3 + 4 + 6 - 2 = 5. So the whole is -11 - 5 = -16. The answer is -16.

"""


COUNTING = """\
Q: I have a spoon, two forks, a ladle, and three knives. How many utensils do I have?
A: The utensils are 1 spoon, 2 forks, 1 ladle and 3 knives. Together they are \
1 + 2 + 1 + 3 = 7. The answer is 7.

Q: I have a hammer, a radish, two onions, a drill, a beetroot, and four leeks. How many \
vegetables do I have?
A: The vegetables are 1 radish, 2 onions, 1 beetroot and 4 leeks; a hammer and a drill are none. \
Together they are 1 + 2 + 1 + 4 = 8. The answer is 8.

Q: I have a goose, a stool, a donkey, five hens, a bench, and two mules. How many animals do I \
have?
A: The animals are 1 goose, 1 donkey, 5 hens and 2 mules; a stool and a bench are none. Together \
they are 1 + 1 + 5 + 2 = 9. The answer is 9.

"""
