"""From a row of data to a question: one reader for each form of prompt.

A reader raises `TaskError` for a row without the fields it needs, and returns None for a row that
the skill does not ask about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lirefs.errors import TaskError
from lirefs.tasks.answers import normalise, number_at
from lirefs.tasks.papers.loading import Row, passage_around

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
        contexts: For a blank: the beginning of the sentence with either filling.
        tag: Class of the item that analyses distinguish, for instance its relation.
    """

    prompt: str
    answer: str
    accepted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = 0
    contexts: tuple[str, str] = ("", "")
    tag: str = ""


def question(row: Row) -> Example | None:
    """`question`, `answers`, optional `relation`: asked from memory.

    Aliases without a word to compare ("The The", "?") are left out, since any text would begin
    with them; None if no other alias is left.
    """
    answers = tuple(answer for answer in _texts(row, "answers") if normalise(answer))
    if not answers:
        return None
    prompt = f"Q: {_text(row, 'question')}\nA:"
    return Example(prompt, f" {answers[0]}", answers, tag=str(row.get("relation") or ""))


def question_with_passage(row: Row) -> Example | None:
    """`question`, `answers`, `context`: asked with the part of the context that has the answer.

    None if no answer occurs in the context.
    """
    asked = question(row)
    passage = asked and passage_around(str(row.get("context") or ""), asked.accepted)
    if asked is None or not passage:
        return None
    return replace(asked, prompt=f"Passage: {passage}\n{asked.prompt}", tag="")


def relation(row: Row) -> Example:
    r"""`relation`, `prompt` with `{}`, `subject`, `object`.

    The published set writes some characters as `\u00ed`; they are decoded.
    """
    template = _text(row, "prompt")
    if template.count("{}") != 1:
        raise TaskError("'prompt' must hold {} once, for the subject")
    answer = _unescaped(_text(row, "object"))
    if not normalise(answer):
        raise TaskError(f"'object' is {answer!r}, which has no word to compare")
    prompt = template.replace("{}", _unescaped(_text(row, "subject")))
    return Example(prompt, f" {answer}", (answer,), tag=_text(row, "relation"))


def word_problem(row: Row) -> Example:
    """`question`, `answer` (its number after the last `####`, if there is one), `language`."""
    return _number(row, "question", "answer", str(row.get("language") or ""))


def bbh_number(row: Row) -> Example:
    """`input` and `target`, a number."""
    return _number(row, "input", "target")


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


def yes_or_no(row: Row) -> Example:
    """`passage`, `question` without its question mark, `answer`, true or false."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise TaskError(f"'answer' is {answer!r}; expected true or false")
    asked = f"Passage: {_text(row, 'passage')}\nQ: {_text(row, 'question').rstrip('?')}?\nA:"
    return _choice(asked, ["yes", "no"], "yes" if answer else "no")


def lettered(row: Row, tag: str = "") -> Example:
    """`question`, `options`, `answer_index`: the options are shown, their letters scored.

    Args:
        row: The row.
        tag: Field whose text is the tag, for instance `category`; empty: no tag.
    """
    found = str(row.get(tag) or "").replace(" ", "_")
    return replace(_lettered(row, "Question: ", "Answer:", " "), tag=found)


def lettered_with_fact(row: Row) -> Example | None:
    """A lettered question after its `fact`; None for a row without a fact."""
    if not row.get("fact"):
        return None
    return _lettered(row, f"Fact: {_text(row, 'fact')}\nQuestion: ", "Answer:", " ")


def lettered_chinese(row: Row) -> Example:
    """A lettered question in Chinese, with its `subject`."""
    asked = _lettered(row, "问题：", "答案：", "")  # noqa: RUF001 (Chinese punctuation)
    return replace(asked, tag=str(row.get("subject") or ""))


def labelled(row: Row, label: str) -> Example | None:
    """A lettered question whose `label` is the given one, None if it is the other one."""
    found = row.get("label")
    if found not in ("memory", "reasoning"):
        raise TaskError(f"'label' is {found!r}; expected 'reasoning' or 'memory'")
    return lettered(row) if found == label else None


def in_category(row: Row, category: str) -> Example | None:
    """A lettered question whose `category` is the given one, None if it is another one."""
    return lettered(row) if _text(row, "category") == category else None


def blank(row: Row) -> Example:
    """`sentence` with one `_`, `option1`, `option2`, `answer` (`1` or `2`)."""
    sentence = _text(row, "sentence")
    names = (_text(row, "option1"), _text(row, "option2"))
    answer = str(row.get("answer"))
    if sentence.count("_") != 1 or answer not in ("1", "2"):
        raise TaskError("'sentence' must hold one _, and 'answer' must be 1 or 2")
    before, after = sentence.split("_")
    if not after.strip():
        raise TaskError("'sentence' has nothing after its _ that could be scored")
    right = int(answer) - 1
    contexts = (before + names[0], before + names[1])
    return Example("", contexts[right] + after, (after,), right=right, contexts=contexts)


def _number(row: Row, asked: str, answer: str, tag: str = "") -> Example:
    prompt = f"Q: {_text(row, asked)}\nA:"
    text = str(row.get(answer, "")).rsplit("####", maxsplit=1)[-1].strip()
    if number_at(text) is None:
        raise TaskError(f"{answer!r} is {text!r}; expected a number")
    return Example(prompt, f" {text}", (text,), tag=tag)


def _choice(prompt: str, options: Sequence[str], target: str) -> Example:
    if target not in options:
        raise TaskError(f"'target' is {target!r}; expected one of {', '.join(options) or 'none'}")
    shown = tuple(f" {option}" for option in options)
    return Example(prompt, f" {target}", options=shown, right=options.index(target))


def _lettered(row: Row, before: str, after: str, space: str) -> Example:
    options = _texts(row, "options")
    right = row.get("answer_index")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise TaskError(f"'answer_index' is {right!r} for {len(options)} options")
    if len(options) > len(LETTERS):
        raise TaskError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    lines = [f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False)]
    prompt = f"{before}{_text(row, 'question')}\n{''.join(lines)}{after}"
    letters = tuple(f"{space}{letter}" for letter in LETTERS[: len(options)])
    return Example(prompt, letters[right], options=letters, right=right)


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"has no {field!r} text")
    return value.strip()


def _texts(row: Row, field: str) -> tuple[str, ...]:
    values = row.get(field)
    if not isinstance(values, list | tuple) or not values:
        raise TaskError(f"has no list of texts {field!r}")
    if not all(isinstance(value, str) for value in values):
        raise TaskError(f"{field!r} holds something that is not a text")
    return tuple(values)


def _unescaped(text: str) -> str:
    halves = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    try:  # a character beyond four digits is written as two halves
        return halves.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise TaskError(f"{text!r:.80} holds half of a character") from None
