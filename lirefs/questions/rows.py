"""Rows of any source as questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lirefs.errors import QuestionsError, as_list, got
from lirefs.questions.question import PROMPT_FORMAT, SIDES, Question, same_text


def two_labels(labels: Any) -> tuple[str, str]:
    """The two labels as text; QuestionsError if they are not two."""
    names = tuple(map(str, as_list(labels, "labels", error=QuestionsError)))
    if len(names) != 2 or names[0] == names[1] or not all(map(str.strip, names)):
        raise QuestionsError(f"labels must be two different names, got {labels!r:.60}")
    return names[0], names[1]


def expected_labels(names: tuple[str, str]) -> str:
    """Which labels were expected, for messages."""
    return (
        f"expected {names[0]!r} or {names[1]!r}; name labels of your own by labels=(first, second)"
    )


def as_dicts(rows: Any, label: str = "label") -> Iterable[Mapping[str, Any]]:
    """Rows as dicts; those of a DataFrame or a Dataset without their missing values.

    `label` is the name of the field that may hold the numbers of a `ClassLabel`.
    """
    columns = getattr(rows, "features", None)
    if hasattr(rows, "notna"):  # a DataFrame
        rows = rows.convert_dtypes()  # a whole number beside a missing value had become a float
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    elif not isinstance(columns, Mapping):
        return as_list(rows, "rows", Mapping, QuestionsError)
    names = getattr((columns or {}).get(label), "names", None)  # of a ClassLabel
    found = [{key: one for key, one in row.items() if one is not None} for row in rows]
    if names is not None:
        for row in found:
            row |= {label: names[row[label]]} if row.get(label, -1) >= 0 else {}
    return found


def sides_of_pair(pair: Any, where: str) -> tuple[Any, Any]:
    """The positive and the negative side of one pair."""
    if isinstance(pair, list | tuple) and len(pair) == 2:
        return pair[0], pair[1]
    found = pair if isinstance(pair, Mapping) else getattr(pair, "__dict__", {})
    for end in ("", "_str"):
        if {f"positive{end}", f"negative{end}"} <= found.keys():
            return found[f"positive{end}"], found[f"negative{end}"]
    raise QuestionsError(f"{where}: must be (positive, negative), got {got(pair)}")


def question_of(
    row: Mapping[str, Any],
    where: str,
    name: str,
    names: tuple[str, str],
    default_format: str | None,
    chat: bool,
    fields: tuple[str, str],
) -> Question:
    """One row as a question; `name` is its id if it brings none.

    `fields` are the names under which rows have the text and the label.
    """
    text_field, label_field = fields
    prompt_format = row.get("prompt_format", default_format)
    messages = _messages(row.get("messages"), where)
    text = row.get(text_field)
    if messages and text is None:
        text = "\n".join(content for _, content in messages)
    elif messages:
        raise QuestionsError(f"{where}: has both {text_field!r} and 'messages'; give one of them")
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(
            f"{where}: no {text_field!r} text{_fields_of(row, text_field, 'question')}"
        )
    if prompt_format is None and "prompt_format" not in row:
        pass  # the text is the prompt, with the spaces around it
    elif not isinstance(prompt_format, str) or prompt_format.count("{question}") != 1:
        raise QuestionsError(
            f"{where}: 'prompt_format' must be a text that holds {{question}} once"
        )
    else:
        text = text.strip()
    if chat and not messages:
        alone = prompt_format is None or prompt_format == PROMPT_FORMAT
        content = text if alone else str(prompt_format).replace("{question}", text)
        messages = (("user", content),)
    score = row.get("score")
    if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
        raise QuestionsError(f"{where}: 'score' is not a finite number")
    label = row.get(label_field)
    if label is None and score is not None:
        label = names[0] if score > 0.5 else names[1]
    if str(label) not in names:
        found = f"is {label!r}; {expected_labels(names)}"
        if label is None:
            found = f"is missing{_fields_of(row, label_field, 'label')}"
        raise QuestionsError(f"{where}: {label_field!r} {found}")
    options = row.get("options") or ()
    if not isinstance(options, list | tuple) or not all(isinstance(o, str) for o in options):
        raise QuestionsError(f"{where}: 'options' must be a list of texts")
    answer = row.get("answer_index")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(options)):
        raise QuestionsError(f"{where}: 'answer_index' is {answer!r} for {len(options)} options")
    pair = row.get("pair")
    side = row.get("split") or ""
    if side and side not in SIDES:
        raise QuestionsError(f"{where}: 'split' is {side!r}; expected one of {', '.join(SIDES)}")
    return Question(
        text=text,
        label=str(label),
        id=str(row.get("id") or name),
        options=tuple(options),
        answer_index=answer,
        subject=str(row.get("subject") or ""),
        side=side,
        prompt_format=prompt_format,
        score=None if score is None else float(score),
        pair="" if pair is None else str(pair),
        messages=messages,
    )


def refuse_both_labels(items: Sequence[Question], places: Sequence[str]) -> None:
    """Raise QuestionsError if one prompt has both labels, and name its two places.

    With grades, whose labels are the scores' halves, a prompt may have several.
    """
    known: dict[tuple[str, ...], int] = {}
    for index, one in enumerate(items):
        parts = [part for message in one.messages for part in message] or [one.prompt]
        read = tuple(" ".join(same_text(part).split()) for part in parts)
        first = known.setdefault(read, index)
        if items[first].label != one.label and None in (items[first].score, one.score):
            raise QuestionsError(
                f"{places[index]}: the question is labelled {one.label!r} here and "
                f"{items[first].label!r} in {places[first]}; leave one of them out"
            )


def _fields_of(row: Mapping[str, Any], field: str, argument: str) -> str:
    """For messages about a field that a row lacks: what it has, and how to name one of them."""
    if field in row:
        return ""
    return f"; the row has {', '.join(map(repr, row)) or 'no field'}: name the one by {argument}="


def _messages(given: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of each message of a chat."""
    if given is None:
        return ()
    found = []
    for one in as_list(given, f"{where}: 'messages'", Mapping, QuestionsError):
        role, content = one.get("role"), one.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise QuestionsError(f"{where}: each message needs a 'role' and a 'content' of text")
        found.append((role, content))
    if not found:
        raise QuestionsError(f"{where}: 'messages' is empty")
    return tuple(found)
