"""Labelled question sets and their split into train, validation and test items."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, overload

from lirefs.errors import QuestionsError
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
        options: Answer options, empty when the set has none.
        answer_index: Index of the right option, None when unknown.
        subject: Free text.
        side: `"train"`, `"validation"` or `"test"` where the set says so itself, else empty.
        prompt_format: What the model reads; `Q: ...`, newline, `A: ` as in the official LiReF code.
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
        """Question text without case, spacing and the marks of prose: equal keys are duplicates.

        Signs and brackets stay: they make another question of the same numbers.
        """
        return "".join(
            one for one in self.text.casefold() if not one.isspace() and one not in _MARKS
        )


class Questions(Sequence[Question]):
    """An immutable list of questions with both labels present.

    Args:
        items: The questions.
        source: Where they come from, for messages and provenance.

    Raises:
        QuestionsError: If the list is empty or holds one label only.
    """

    def __init__(self, items: Sequence[Question], source: str = "questions") -> None:
        self._items = tuple(items)
        self.source = source
        if not self._items:
            raise QuestionsError(f"{source}: no questions in it")
        found = {item.label for item in self._items}
        if found != set(LABELS):
            raise QuestionsError(
                f"{source}: one class only ({found.pop()!r}); a direction needs questions "
                "labelled 'reasoning' and questions labelled 'memory'"
            )

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._items)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        return self._items[index]

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

        Duplicate questions (equal up to case, marks of prose and spacing) stay on one side. A set
        whose items all say their side is split so, and the arguments are not used.

        Args:
            train: Share of the items to fit on.
            validation: Share of the items to choose layer and strength on; the rest is test.
            seed: Seed of the shuffle.

        Returns:
            Three sides that share no question.

        Raises:
            QuestionsError: If a side would lack one of the labels, the shares are not positive
                with a rest for test, or some items say their side and others do not.
        """
        sides: dict[str, list[Question]] = {side: [] for side in SIDES}
        told = sum(bool(item.side) for item in self)
        if told == len(self):
            for item in self:
                sides[item.side].append(item)
            return self._sides(sides)
        if told:
            raise QuestionsError(
                f"{self.source}: {told} of {len(self)} questions name their split; all or none must"
            )
        if not (train > 0 and validation > 0 and train + validation < 1):
            raise QuestionsError(
                f"train={train} and validation={validation} must be positive and leave a rest for "
                "test"
            )
        by_key: dict[str, list[Question]] = defaultdict(list)
        for item in self:
            by_key[item.key].append(item)
        for label in LABELS:
            groups = [group for group in by_key.values() if group[0].label == label]
            random.Random(f"{seed} {label}").shuffle(groups)
            first = round(train * len(groups))
            second = round((train + validation) * len(groups))
            sides["train"] += [item for group in groups[:first] for item in group]
            sides["validation"] += [item for group in groups[first:second] for item in group]
            sides["test"] += [item for group in groups[second:] for item in group]
        return self._sides(sides)

    def _sides(self, sides: dict[str, list[Question]]) -> Split:
        for name, items in sides.items():
            missing = set(LABELS) - {item.label for item in items}
            if missing:
                raise QuestionsError(
                    f"{self.source}: too few questions, the {name} side has none labelled "
                    f"{missing.pop()!r}"
                )
        return Split(**{name: Questions(items, self.source) for name, items in sides.items()})


@dataclass(frozen=True)
class Split:
    """Train, validation and test questions that share no item.

    Attributes:
        train: What directions are fitted on.
        validation: What chooses layers and strengths.
        test: What is reported.

    Raises:
        QuestionsError: If two sides share a question or a duplicate of one.
    """

    train: Questions
    validation: Questions
    test: Questions

    def __post_init__(self) -> None:
        keys = {name: {item.key for item in side} for name, side in self.sides.items()}
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = keys[first] & keys[second]
            if shared:
                raise QuestionsError(f"{first} and {second} share {len(shared)} question(s)")

    @property
    def sides(self) -> dict[str, Questions]:
        """The three sides by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_questions(name: str | Path = "default") -> Questions:
    """Load a question set.

    Args:
        name: `"default"` (written for this project), `"organism"` (in the model organism's
            language, with splits of its own), or a JSON Lines file whose rows have
            `question` and `label` (`"reasoning"` or `"memory"`) and may have `id`, `options`,
            `answer_index`, `subject`, `split` (`"train"`, `"validation"` or `"test"`) and
            `prompt_format`, in which `{question}` stands for the question.

    Returns:
        The questions, both labels among them.

    Raises:
        QuestionsError: If the file is missing, empty, broken (with the line number), lacks a
            field, or holds one class only.
    """
    if str(name) in BUILTIN:
        path = Path(str(resources.files("lirefs") / "data" / BUILTIN[str(name)]))
    else:
        path = Path(name)
    rows = read_jsonl(path, error=QuestionsError)
    items = [_question(row, f"{path}, line {line}", line) for line, row in rows]
    return Questions(items, source=str(name))


def _question(row: dict[str, Any], where: str, line: int) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise QuestionsError(f"{where}: no 'question' text in it")
    label = row.get("label")
    if label not in LABELS:
        found = "is missing" if label is None else f"is {label!r}"
        raise QuestionsError(f"{where}: 'label' {found}; expected 'reasoning' or 'memory'")
    options = row.get("options") or ()
    answer = row.get("answer_index")
    if not isinstance(options, list | tuple) or not all(isinstance(o, str) for o in options):
        raise QuestionsError(f"{where}: 'options' must be a list of texts")
    valid_answer = isinstance(answer, int) and not isinstance(answer, bool)
    if answer is not None and not (valid_answer and 0 <= answer < len(options)):
        raise QuestionsError(f"{where}: 'answer_index' is {answer!r} for {len(options)} options")
    side = row.get("split") or ""
    if side and side not in SIDES:
        raise QuestionsError(f"{where}: 'split' is {side!r}; expected one of {', '.join(SIDES)}")
    prompt_format = row.get("prompt_format", PROMPT_FORMAT)
    if not isinstance(prompt_format, str) or prompt_format.count("{question}") != 1:
        raise QuestionsError(f"{where}: 'prompt_format' must hold {{question}} once")
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
