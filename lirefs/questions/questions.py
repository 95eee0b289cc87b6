"""Labelled question sets and their split into train, validation and test items."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, overload

from lirefs.errors import QuestionsError, as_list, checked_seed, must_be
from lirefs.files import html_table, read_jsonl
from lirefs.questions.question import LABELS, PROMPT_FORMAT, SIDES, Question
from lirefs.questions.rows import (
    as_dicts,
    expected_labels,
    question_of,
    refuse_both_labels,
    sides_of_pair,
    two_labels,
)

BUILTIN = {"default": "questions.jsonl", "organism": "organism_questions.jsonl"}


class Questions(Sequence[Question]):
    """An immutable list of questions with both labels present.

    Args:
        items: The questions.
        source: Where they come from, for messages and provenance.
        labels: The two labels. Directions point to the first one.

    Attributes:
        names: The two labels, in this order.

    Raises:
        QuestionsError: The list is empty, holds only one label or an unknown one, or the same
            prompt under both; or the two labels are equal.
    """

    def __init__(
        self,
        items: Sequence[Question],
        source: str = "questions",
        *,
        labels: Sequence[Any] = LABELS,
    ) -> None:
        self._items = tuple(as_list(items, "questions", Question, QuestionsError))
        self.source = source
        self.names = two_labels(labels)
        if not self._items:
            raise QuestionsError(f"{source}: no questions in it")
        found = {item.label for item in self._items}
        if unknown := found - set(self.names):
            raise QuestionsError(
                f"{source}: label {unknown.pop()!r}; {expected_labels(self.names)}"
            )
        if found != set(self.names):
            first, second = self.names
            raise QuestionsError(
                f"{source}: one class only ({found.pop()!r}); a direction needs questions "
                f"labelled {first!r} and questions labelled {second!r}"
            )
        refuse_both_labels(self._items, [f"{source}: question {one.id!r}" for one in self._items])

    @classmethod
    def from_rows(
        cls,
        rows: Any,
        *,
        question: str = "question",
        label: str = "label",
        labels: Sequence[Any] = LABELS,
        prompt_format: str | None = PROMPT_FORMAT,
        chat: bool = False,
        source: str = "rows",
    ) -> Questions:
        """Make questions of rows: dicts, a pandas DataFrame or a `datasets.Dataset`.

        Args:
            rows: Each has `question` (a text) or `messages` (a list of dicts with `role` and
                `content`, as chat templates take them), and `label` or `score`. It may have `id`,
                `options`, `answer_index`, `subject`, `split` (`"train"`, `"validation"` or
                `"test"`), `pair` and `prompt_format`, as in `Question`.
            question: Name of the field (the column) that holds the text.
            label: Name of the field that holds the label.
            labels: The two labels, of any names: `("harmful", "harmless")`. Directions point to
                the first one. Labels of another type are compared as text, so (1, 0) will do. A
                row without a label, but with a score, has the first label above 0.5.
            prompt_format: The prompt of rows that bring none, with `{question}` for the text.
                None for texts that are prompts themselves, taken verbatim.
            chat: Whether each question is the message of a user, put into the chat template of
                the model's tokenizer. It stands there alone unless a prompt format is given.
            source: Where the rows come from, for messages and provenance.

        Raises:
            QuestionsError: A row lacks a field or has one that cannot be used (the message gives
                the row), there is only one label, or one prompt has both.
        """
        names, fields = two_labels(labels), _fields(question, label)
        items, places = [], []
        for n, row in enumerate(as_dicts(rows, label)):
            places.append(f"{source}, row {n}")
            items.append(
                question_of(row, places[-1], f"row-{n}", names, prompt_format, chat, fields)
            )
        refuse_both_labels(items, places)
        return cls(items, source, labels=names)

    @classmethod
    def from_pairs(
        cls,
        pairs: Any,
        *,
        labels: Sequence[Any] = ("positive", "negative"),
        prompt_format: str | None = None,
        chat: bool = False,
        source: str = "pairs",
    ) -> Questions:
        """Make questions of contrast pairs, which stay together when the questions are split.

        Args:
            pairs: (positive, negative) texts, as steering-vectors and repeng take them: tuples,
                their own classes, or rows with `positive` and `negative`. Messages of a chat may
                stand for a text.
            labels: The label of the positive and of the negative texts.
            prompt_format: As for `from_rows`; by default texts are taken verbatim.
            chat: As for `from_rows`.
            source: Where they come from, for messages and provenance.

        Raises:
            QuestionsError: One is not a pair, or a text is empty.
        """
        names, rows = two_labels(labels), []
        given = pairs if isinstance(pairs, list | tuple) else as_dicts(pairs)
        for n, pair in enumerate(given):
            for label, side in zip(names, sides_of_pair(pair, f"{source}, pair {n}"), strict=True):
                field = "question" if isinstance(side, str) else "messages"
                rows.append({field: side, "label": label, "pair": str(n), "id": f"{n}-{label}"})
        return cls.from_rows(
            rows, labels=names, prompt_format=prompt_format, chat=chat, source=source
        )

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        return self._items[index]

    def __repr__(self) -> str:
        return f"Questions({len(self)} from {self.source!r})"

    def _repr_html_(self) -> str:
        rows = ({"id": one.id, "label": one.label, "text": one.text} for one in self)
        return html_table(repr(self), rows)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each question; QuestionsError for chats (see `Question.prompt`)."""
        return [item.prompt for item in self]

    @property
    def labels(self) -> list[int]:
        """1 for questions of the first label, 0 for those of the second."""
        return [int(item.label == self.names[0]) for item in self]

    def split(self, train: float = 0.5, validation: float = 0.25, seed: int = 0) -> Split:
        """Split into train, validation and test items, stratified by label.

        Duplicates (see `Question.key`) and pairs stay on one side. If every item names its side,
        the set is split accordingly and the arguments are not used.

        Args:
            train: Share of the items to fit on.
            validation: Share of the items to choose layer and strength on; the rest is test.
            seed: Seed of the shuffle.

        Raises:
            QuestionsError: A side would lack one of the labels, a share is not positive or
                leaves nothing for test, or only some items name their side.
        """
        seed = checked_seed(seed, QuestionsError)
        for name, share in (("train", train), ("validation", validation)):
            must_be(share, (float, int), name, QuestionsError)
        sides: dict[str, list[Question]] = {side: [] for side in SIDES}
        named = [item for item in self if item.side]
        if named and len(named) < len(self):
            raise QuestionsError(
                f"{self.source}: {len(named)} of {len(self)} questions name their split; either "
                "all or none must"
            )
        if not named and not (train > 0 and validation > 0 and train + validation < 1):
            raise QuestionsError(
                f"train={train} and validation={validation} must be positive and leave a rest for "
                "test"
            )
        for item in named:
            sides[item.side].append(item)
        groups_of_all = [] if named else _inseparable(self)
        for label in reversed(self.names):  # the order of sets that were split before
            groups = [group for group in groups_of_all if group[0].label == label]
            random.Random(f"{seed} {label}").shuffle(groups)
            ends = round(train * len(groups)), round((train + validation) * len(groups))
            for side, first, last in zip(SIDES, (0, *ends), (*ends, None), strict=True):
                sides[side] += itertools.chain.from_iterable(groups[first:last])
        for name, items in sides.items():
            for label in reversed(self.names):
                if all(item.label != label for item in items):
                    raise QuestionsError(
                        f"{self.source}: too few questions, the {name} side has none labelled "
                        f"{label!r}"
                    )
        names = self.names
        return Split(*(Questions(sides[side], self.source, labels=names) for side in SIDES))


@dataclass(frozen=True)
class Split:
    """Train, validation and test questions that share no item.

    Attributes:
        train: For fitting directions.
        validation: For choosing layers and strengths.
        test: For the numbers to report.

    Raises:
        QuestionsError: Two sides share a question, a duplicate of one or a pair, or have other
            labels.
    """

    train: Questions
    validation: Questions
    test: Questions

    def __post_init__(self) -> None:
        for name, side in self.sides.items():
            must_be(side, Questions, name, QuestionsError)
        for (first, one), (second, other) in itertools.combinations(self.sides.items(), 2):
            if one.names != other.names:
                raise QuestionsError(
                    f"{first} has the labels {one.names}, {second} has {other.names}"
                )
            if shared := {item.key for item in one} & {item.key for item in other}:
                raise QuestionsError(f"{first} and {second} share {len(shared)} question(s)")
            if pairs := ({item.pair for item in one} & {item.pair for item in other}) - {""}:
                raise QuestionsError(f"{first} and {second} share {len(pairs)} pair(s)")

    @property
    def sides(self) -> dict[str, Questions]:
        """The three sides by name."""
        return {side: getattr(self, side) for side in SIDES}


def load_questions(
    name: str | Path = "default",
    *,
    question: str = "question",
    label: str = "label",
    labels: Sequence[Any] = LABELS,
    prompt_format: str | None = PROMPT_FORMAT,
    chat: bool = False,
) -> Questions:
    """Load a question set.

    Args:
        name: `"default"` (written for this project), `"organism"` (in the model organism's
            language, with its own split), or a JSON Lines file with the rows of
            `Questions.from_rows`.
        question: As for `Questions.from_rows`, and so the next four.
        label: Name of the field that holds the label.
        labels: The two labels.
        prompt_format: The prompt of rows that bring none.
        chat: Whether each question is the message of a user.

    Raises:
        QuestionsError: The file is missing, empty, broken (the message gives the line), lacks a
            field, holds only one label, or one prompt under both.

    Examples:
        >>> import lirefs
        >>> questions = lirefs.load_questions()
        >>> len(questions), questions[0].label
        (440, 'reasoning')
        >>> split = questions.split(seed=0)
        >>> len(split.train), len(split.validation), len(split.test)
        (220, 110, 110)
    """
    must_be(name, (str, PathLike), "the name of a question set", QuestionsError)
    path, names, fields = Path(name), two_labels(labels), _fields(question, label)
    if str(name) in BUILTIN:
        path = Path(str(resources.files("lirefs") / "data" / BUILTIN[str(name)]))
    items, places = [], []
    for line, row in read_jsonl(path, error=QuestionsError):
        places.append(f"{path}, line {line}")
        items.append(
            question_of(row, places[-1], f"line-{line}", names, prompt_format, chat, fields)
        )
    refuse_both_labels(items, places)
    return Questions(items, source=str(name), labels=names)


def _fields(question: str, label: str) -> tuple[str, str]:
    """The names of the two fields, if they are names."""
    for name, field in (("question", question), ("label", label)):
        must_be(field, str, f"the name of a field, {name}=", QuestionsError)
    return question, label


def _inseparable(items: Sequence[Question]) -> list[list[Question]]:
    """Groups of questions that share a key or a pair, directly or by way of others."""
    parents: dict[tuple[str, str], tuple[str, str]] = {}

    def root(link: tuple[str, str]) -> tuple[str, str]:
        while (above := parents.setdefault(link, link)) != link:
            parents[link] = link = parents[above]
        return link

    for item in items:
        if item.pair:
            parents[root(("pair", item.pair))] = root(("key", item.key))
    groups: dict[tuple[str, str], list[Question]] = {}
    for item in items:
        groups.setdefault(root(("key", item.key)), []).append(item)
    return list(groups.values())
