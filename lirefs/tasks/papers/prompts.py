"""From a row of data to a question: one reader for each form of row.

A reader raises `TaskError` for a row without the fields it needs, and returns None for a row that
the skill does not ask about. In the template of a prompt, `{name}` stands for the text of that
field. `tag` names the field that holds the tag of an item, which may be absent; empty: no tag.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lirefs.errors import TaskError
from lirefs.tasks.answers import normalise, number_at
from lirefs.tasks.papers.skill_data import Row, passage_around

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Example:
    """What a row asks, and what is right; answers and options have their leading space.

    `answer` is shown in an answered example, `accepted` count as right if generated, `right` is the
    index of an option. The `contexts` of a blank are the sentence up to and with either filling.
    """

    prompt: str
    answer: str
    accepted: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    right: int = 0
    contexts: tuple[str, str] = ("", "")
    tag: str = ""


def question_prompt(row: Row, prompt: str, tag: str = "") -> Example | None:
    """`answers`, asked from memory.

    Those without a word to compare ("The The", "?") are left out, since any text would begin with
    them; None if no other is left.
    """
    answers = tuple(answer for answer in _texts(row, "answers") if normalise(answer))
    if not answers:
        return None
    return Example(_filled(prompt, row), f" {answers[0]}", answers, tag=_tag(row, tag))


def passage_question_prompt(row: Row, prompt: str) -> Example | None:
    """`answers`, asked after the part of the `context` that has the answer, None without one."""
    asked = question_prompt(row, prompt)
    passage = asked and passage_around(str(row.get("context") or ""), asked.accepted)
    if asked is None or not passage:
        return None
    return replace(asked, prompt=f"Passage: {passage}\n{asked.prompt}")


def relation_prompt(row: Row) -> Example:
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


def number_prompt(row: Row, prompt: str, answer: str, tag: str = "") -> Example:
    """A number in the field `answer`, after its last `####` if there is one."""
    asked = _filled(prompt, row)
    text = str(row.get(answer, "")).rsplit("####", maxsplit=1)[-1].strip()
    if number_at(text) is None:
        raise TaskError(f"{answer!r} is {text!r}; expected a number")
    return Example(asked, f" {text}", (text,), tag=_tag(row, tag))


def choice_prompt(row: Row, prompt: str, options: Sequence[str] = ()) -> Example:
    """`target`, one of the options; by default one of `(A)`, `(B)` ... before lines of `input`.

    A `Question: ` at the beginning of the input is removed.
    """
    text = _text(row, "input").removeprefix("Question: ")
    options = options or re.findall(r"^(\([A-Z]\)) ", text, re.MULTILINE)
    return _choice(_filled(prompt, row, input=text), options, _text(row, "target"))


def yes_or_no_prompt(row: Row, prompt: str) -> Example:
    """`answer`, true or false, and `question`, whose question mark is removed."""
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise TaskError(f"'answer' is {answer!r}; expected true or false")
    asked = _filled(prompt, row, question=_text(row, "question").rstrip("?"))
    return _choice(asked, ["yes", "no"], "yes" if answer else "no")


def lettered_prompt(row: Row, prompt: str, tag: str = "", space: str = " ") -> Example:
    """`options`, `answer_index`: the `{options}` are shown, their letters scored after `space`."""
    options = _texts(row, "options")
    right = row.get("answer_index")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise TaskError(f"'answer_index' is {right!r} for {len(options)} options")
    if len(options) > len(LETTERS):
        raise TaskError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    lines = [f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False)]
    asked = _filled(prompt, row, options="".join(lines))
    letters = tuple(f"{space}{letter}" for letter in LETTERS[: len(options)])
    return Example(asked, letters[right], options=letters, right=right, tag=_tag(row, tag))


def lettered_fact_prompt(row: Row, prompt: str) -> Example | None:
    """A lettered question with a `fact`; None for a row without one."""
    return lettered_prompt(row, prompt) if row.get("fact") else None


def lettered_category_prompt(row: Row, prompt: str) -> Example:
    """A lettered question whose tag is its `category`, with underscores for spaces."""
    return replace(lettered_prompt(row, prompt), tag=_tag(row, "category").replace(" ", "_"))


def labelled_prompt(row: Row, prompt: str, label: str) -> Example | None:
    """A lettered question whose `label` is the given one, None if it is the other one."""
    found = row.get("label")
    if found not in ("memory", "reasoning"):
        raise TaskError(f"'label' is {found!r}; expected 'reasoning' or 'memory'")
    return lettered_prompt(row, prompt) if found == label else None


def category_prompt(row: Row, prompt: str, category: str) -> Example | None:
    """A lettered question whose `category` is the given one, None if it is another one."""
    return lettered_prompt(row, prompt) if _text(row, "category") == category else None


def blank_prompt(row: Row) -> Example:
    """`sentence` with one `_`, `option1`, `option2`, `answer` (`1` or `2`)."""
    sentence = _text(row, "sentence")
    answer = str(row.get("answer"))
    if sentence.count("_") != 1 or answer not in ("1", "2"):
        raise TaskError("'sentence' must hold one _, and 'answer' must be 1 or 2")
    before, after = sentence.split("_")
    if not after.strip():
        raise TaskError("'sentence' has nothing after its _ that could be scored")
    right = int(answer) - 1
    contexts = (before + _text(row, "option1"), before + _text(row, "option2"))
    return Example("", contexts[right] + after, (after,), right=right, contexts=contexts)


def _choice(prompt: str, options: Sequence[str], target: str) -> Example:
    if target not in options:
        raise TaskError(f"'target' is {target!r}; expected one of {', '.join(options) or 'none'}")
    shown = tuple(f" {option}" for option in options)
    return Example(prompt, f" {target}", options=shown, right=options.index(target))


def _filled(prompt: str, row: Row, **ready: str) -> str:
    """A template of a prompt, filled with texts that are given or else with fields of the row."""
    return re.sub(r"\{(\w+)\}", lambda name: ready.get(name[1]) or _text(row, name[1]), prompt)


def _tag(row: Row, field: str) -> str:
    return str(row.get(field) or "")


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
