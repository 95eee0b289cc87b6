"""Labelled question sets and their split into train, validation and test items."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, overload

from lirefs.errors import QuestionsError, as_list, must_be, whole_number
from lirefs.files import read_jsonl

LABELS = ("memory", "reasoning")
SIDES = ("train", "validation", "test")
PROMPT_FORMAT = "Q: {question}\nA: "
_MARKS = ".,;:!?'\"\u2018\u2019\u201c\u201d"
BUILTIN = {"default": "questions.jsonl", "organism": "organism_questions.jsonl"}


@dataclass(frozen=True)
class Question:
    """One labelled question.

    Attributes:
        text: The question itself, without options.
        label: `"reasoning"` (the answer must be computed) or `"memory"` (it must be recalled).
        id: Name of the item, unique in its set.
        options: Answer options, if any.
        answer_index: Index of the right option, None if unknown.
        subject: Free text.
        side: `"train"`, `"validation"` or `"test"` if the set comes with a split, else empty.
        prompt_format: The prompt, with `{question}` for the text; the default is that of the
            official LiReF code.
    """

    text: str
    label: str
    id: str
    options: tuple[str, ...] = ()
    answer_index: int | None = None
    subject: str = ""
    side: str = ""
    prompt_format: str = PROMPT_FORMAT

    @property
    def prompt(self) -> str:
        """The text a model reads."""
        return self.prompt_format.replace("{question}", self.text)

    @property
    def key(self) -> str:
        """The text without case, spaces and punctuation: equal keys are duplicates.

        Signs and brackets stay, as they make another question of the same numbers.
        """
        return "".join(one for one in "".join(self.text.casefold().split()) if one not in _MARKS)


class Questions(Sequence[Question]):
    """An immutable list of questions with both labels present.

    Args:
        items: The questions.
        source: Where they come from, for messages and provenance.

    Raises:
        QuestionsError: The list is empty or holds only one label.
    """

    def __init__(self, items: Sequence[Question], source: str = "questions") -> None:
        self._items = tuple(as_list(items, "questions", Question, QuestionsError))
        self.source = source
        if not self._items:
            raise QuestionsError(f"{source}: no questions in it")
        found = {item.label for item in self._items}
        if unknown := found - set(LABELS):
            raise QuestionsError(
                f"{source}: label {unknown.pop()!r}; expected 'reasoning' or 'memory'"
            )
        if found != set(LABELS):
            raise QuestionsError(
                f"{source}: one class only ({found.pop()!r}); a direction needs questions "
                "labelled 'reasoning' and questions labelled 'memory'"
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

    @property
    def prompts(self) -> list[str]:
        """The prompt of each question."""
        return [item.prompt for item in self]

    @property
    def labels(self) -> list[int]:
        """1 for reasoning, 0 for memory."""
        return [LABELS.index(item.label) for item in self]

    def split(self, train: float = 0.5, validation: float = 0.25, seed: int = 0) -> Split:
        """Split into train, validation and test items, stratified by label.

        Duplicates (see `Question.key`) stay on one side. If every item names its side, the set is
        split accordingly and the arguments are not used.

        Args:
            train: Share of the items to fit on.
            validation: Share of the items to choose layer and strength on; the rest is test.
            seed: Seed of the shuffle.

        Raises:
            QuestionsError: A side would lack one of the labels, a share is not positive or
                leaves nothing for test, or only some items name their side.
        """
        whole_number(seed, "seed", error=QuestionsError)
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
        by_key: dict[str, list[Question]] = defaultdict(list)
        for item in self:
            (sides[item.side] if item.side else by_key[item.key]).append(item)
        for label in LABELS:
            groups = [group for group in by_key.values() if group[0].label == label]
            random.Random(f"{seed} {label}").shuffle(groups)
            ends = round(train * len(groups)), round((train + validation) * len(groups))
            for side, first, last in zip(SIDES, (0, *ends), (*ends, None), strict=True):
                sides[side] += itertools.chain.from_iterable(groups[first:last])
        for name, items in sides.items():
            for label in LABELS:
                if all(item.label != label for item in items):
                    raise QuestionsError(
                        f"{self.source}: too few questions, the {name} side has none labelled "
                        f"{label!r}"
                    )
        return Split(**{name: Questions(items, self.source) for name, items in sides.items()})


@dataclass(frozen=True)
class Split:
    """Train, validation and test questions that share no item.

    Attributes:
        train: For fitting directions.
        validation: For choosing layers and strengths.
        test: For the numbers to report.

    Raises:
        QuestionsError: Two sides share a question or a duplicate of one.
    """

    train: Questions
    validation: Questions
    test: Questions

    def __post_init__(self) -> None:
        for name, side in self.sides.items():
            must_be(side, Questions, name, QuestionsError)
        keys = {name: {item.key for item in side} for name, side in self.sides.items()}
        for first, second in itertools.combinations(keys, 2):
            if shared := keys[first] & keys[second]:
                raise QuestionsError(f"{first} and {second} share {len(shared)} question(s)")

    @property
    def sides(self) -> dict[str, Questions]:
        """The three sides by name."""
        return {side: getattr(self, side) for side in SIDES}


def load_questions(name: str | Path = "default") -> Questions:
    """Load a question set.

    Args:
        name: `"default"` (written for this project), `"organism"` (in the model organism's
            language, with its own split), or a JSON Lines file whose rows have `question` and
            `label` (`"reasoning"` or `"memory"`) and may have `id`, `options`, `answer_index`,
            `subject`, `split` (`"train"`, `"validation"` or `"test"`) and `prompt_format`, which
            holds `{question}` once, where the question goes.

    Raises:
        QuestionsError: The file is missing, empty, broken (the message gives the line), lacks a
            field, or holds only one label.

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
    path = Path(name)
    if str(name) in BUILTIN:
        path = Path(str(resources.files("lirefs") / "data" / BUILTIN[str(name)]))
    rows = read_jsonl(path, error=QuestionsError)
    items = [_question(row, f"{path}, line {line}", line) for line, row in rows]
    return Questions(items, source=str(name))


def _question(row: dict[str, Any], where: str, line: int) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{where}: no 'question' text")
    label = row.get("label")
    if label not in LABELS:
        found = "is missing" if label is None else f"is {label!r}"
        raise QuestionsError(f"{where}: 'label' {found}; expected 'reasoning' or 'memory'")
    options = row.get("options") or ()
    if not isinstance(options, list | tuple) or not all(isinstance(o, str) for o in options):
        raise QuestionsError(f"{where}: 'options' must be a list of texts")
    answer = row.get("answer_index")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(options)):
        raise QuestionsError(f"{where}: 'answer_index' is {answer!r} for {len(options)} options")
    side = row.get("split") or ""
    if side and side not in SIDES:
        raise QuestionsError(f"{where}: 'split' is {side!r}; expected one of {', '.join(SIDES)}")
    prompt_format = row.get("prompt_format", PROMPT_FORMAT)
    if not isinstance(prompt_format, str) or prompt_format.count("{question}") != 1:
        raise QuestionsError(
            f"{where}: 'prompt_format' must be a text that holds {{question}} once"
        )
    return Question(
        text=text.strip(),
        label=label,
        id=str(row.get("id") or f"line-{line}"),
        options=tuple(options),
        answer_index=answer,
        subject=str(row.get("subject") or ""),
        side=side,
        prompt_format=prompt_format,
    )
