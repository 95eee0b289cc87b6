"""The base of the tasks: items as tuples, checked when the task is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import Any, ClassVar, Self

from lirefs.errors import LirefsError, TaskError, as_list, got, must_be, whole_number
from lirefs.files import html_table
from lirefs.model.batching import check_length, checked_ids
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import tokens_before


def as_row(
    where: str,
    index: int,
    given: Any,
    columns: Sequence[str],
    error: type[LirefsError] = TaskError,
) -> tuple[Any, ...]:
    """The values of an item: a sequence in the order of the columns, or a mapping with their names.

    The first is the id; without one, a mapping is called after its index. `error` begins with
    `where`.
    """
    wanted = ", ".join(columns)
    if isinstance(given, Mapping):
        if unknown := [str(key) for key in given if key not in columns]:
            raise error(f"{where} has the unknown key(s) {', '.join(unknown)}; expected {wanted}")
        if missing := [key for key in columns[1:] if key not in given]:
            raise error(f"{where} lacks {', '.join(missing)}; expected {wanted}")
        given = [given.get(key, f"item-{index}") for key in columns]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise error(f"{where} must be a tuple or a mapping of {wanted}, got {got(given)}")
    if len(given) != len(columns):
        raise error(f"{where} has {len(given)} value(s); expected {wanted}")
    must_be(given[0], (str, int), f"the id of {where}", error)
    return str(given[0]), *given[1:]


def named_texts(
    what: str, texts: Any, error: type[LirefsError] = TaskError
) -> list[tuple[str, str]]:
    """(id, text) of each text: given like this, as a mapping of `id` and `text`, or alone."""
    return [named_text(what, *one, error) for one in enumerate(as_list(texts, what, error=error))]


def named_text(
    what: str, index: int, given: Any, error: type[LirefsError] = TaskError
) -> tuple[str, str]:
    """The same for one text, number `index` of `what`."""
    named = {"text": given} if isinstance(given, str) else given
    name, text = as_row(f"{what}: item {index}", index, named, ("id", "text"), error)
    must_be(text, str, f"{what}: text {name!r}", error)
    return name, text


def must_fit(lm: LanguageModel, items: Any, tokens: Callable[[Any], int]) -> None:
    """Raise TaskError if `lm` is not a model, or lacks positions for a prompt and an item."""
    must_be(lm, LanguageModel, "lm", TaskError)
    more = tokens_before(lm.model, lm.tokenizer)
    for index, item in enumerate(as_list(items, "items", Sequence, TaskError)):
        check_length(lm.model, tokens(item) + more, f"item {index}", TaskError)


def lengths_of(max_new_tokens: int | Sequence[int], prompts: int) -> list[int]:
    """The length of each of so many continuations."""
    if not isinstance(max_new_tokens, Sequence):
        return [whole_number(max_new_tokens, "max_new_tokens", least=1, error=TaskError)] * prompts
    if len(max_new_tokens) != prompts:
        raise TaskError(f"max_new_tokens has {len(max_new_tokens)} numbers for {prompts} prompts")
    return [
        whole_number(one, f"max_new_tokens[{index}]", least=1, error=TaskError)
        for index, one in enumerate(max_new_tokens)
    ]


def common_prefix(*sequences: Sequence[Any]) -> int:
    """Number of leading elements that sequences have in common."""
    columns = enumerate(zip(*sequences, strict=False))
    differing = (index for index, column in columns if len(set(column)) > 1)
    return next(differing, min(map(len, sequences)))


def shared_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the common beginning that leaves at least one token of each sequence."""
    return min(common_prefix(*sequences), *(len(sequence) - 1 for sequence in sequences))


def grouped_by_beginning(
    sequences: Sequence[Sequence[int]], longer: int, saved: int
) -> list[list[int]]:
    """Indices of sequences that share a beginning, such as the examples of one subject.

    Those that share `longer` tokens more than all of a group do become a group of their own, if
    that saves `saved` tokens: their beginning is then computed once, and as a whole.
    """
    rows = [tuple(one) for one in sequences]

    def shared_by(some: Sequence[int]) -> int:  # sorted, so the first and the last differ most
        return shared_tokens([rows[some[0]], rows[some[-1]]])

    groups: list[list[int]] = []
    # Rows that begin alike, the group that they are in so far, and what all of that group share.
    waiting: list[tuple[list[int], list[int], int]] = []

    def begin(some: list[int]) -> None:
        groups.append([])
        waiting.append((some, groups[-1], shared_by(some)))

    if rows:
        begin(sorted(range(len(rows)), key=rows.__getitem__))
    while waiting:
        some, group, shared = waiting.pop()
        most = max(len(rows[row]) for row in some) - 1 - shared
        if most < longer or most * (len(some) - 1) - shared < saved:
            group += some
            continue
        here = shared_by(some)
        group += [row for row in some if len(rows[row]) == here + 1]
        going_on = (row for row in some if len(rows[row]) > here + 1)
        for _, found in groupby(going_on, key=lambda row: rows[row][here]):
            part = list(found)
            more = shared_by(part) - shared
            if more >= longer and more * (len(part) - 1) - shared >= saved:
                begin(part)
            else:
                waiting.append((part, group, shared))
    return sorted(sorted(group) for group in groups if group)


def prompts_and_continuations(
    lm: LanguageModel, items: Any
) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, each with its continuations, as token ids; TaskError unless the model knows all."""
    must_be(lm, LanguageModel, "lm", TaskError)
    found = []
    for index, item in enumerate(as_list(items, "items", error=TaskError)):
        parts = as_list(item, f"item {index}", error=TaskError)
        if len(parts) != 2:
            raise TaskError(
                f"item {index} has {len(parts)} part(s), not a prompt and continuations"
            )
        prompt = checked_ids(lm.model, parts[0], f"item {index}: its prompt", TaskError)
        options = as_list(parts[1], f"item {index}: its continuations", error=TaskError)
        if not options:
            raise TaskError(f"item {index} has no continuation")
        names = (f"item {index}: continuation {number}" for number in range(len(options)))
        ids = map(checked_ids, repeat(lm.model), options, names, repeat(TaskError))
        found.append((prompt, list(ids)))
    return found


def with_tokens(items: Any) -> list[Sequence[Sequence[int]]]:
    """Items of options that all have tokens; TaskError for others."""
    found = as_list(items, "items", Sequence, TaskError)
    for index, options in enumerate(found):
        if not as_list(options, f"item {index}", Sequence, TaskError) or not all(map(len, options)):
            raise TaskError(f"item {index} has no option, or one without a token")
    return found


@dataclass(frozen=True, repr=False)
class ItemTask:
    """Base of the tasks here: name and items; subclasses add the rest of `Task`.

    An item is a tuple, or a mapping with the names that its task gives (`columns`), such as a row
    of a JSON Lines file; one without an `id` is called after its index.

    Raises:
        TaskError: No item, a malformed one, or two with one id.
    """

    name: str
    items: Sequence[Any]

    columns: ClassVar[tuple[str, ...]] = ()
    """Names of the values of an item; none for tasks that keep their items as they are."""

    def __post_init__(self) -> None:
        must_be(self.name, str, "the name of a task", TaskError)
        if not self.columns:
            items = self.items
        else:
            given = as_list(self.items, f"{self.name}: items", error=TaskError)
            items = [self._item(index, one) for index, one in enumerate(given)]
            for item, times in Counter(one[0] for one in items).items():
                if times > 1:
                    raise TaskError(f"{self.name}: {times} items have the id {item!r}")
        if not items:
            raise TaskError(f"task {self.name!r} has no items")
        object.__setattr__(self, "items", items)

    def _item(self, index: int, given: Any) -> tuple[Any, ...]:
        """An item as a tuple of its columns, checked."""
        name, *values = as_row(f"{self.name}: item {index}", index, given, self.columns)
        return name, *self._checked(f"{self.name}: item {name!r}", *values)

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        """The values of an item after its id, or a TaskError that begins with `where`."""
        return values

    @property
    def generates(self) -> bool:
        """Whether it asks the model by `lirefs.tasks.greedy` alone, as an engine needs it."""
        return False

    def encoded(self, lm: LanguageModel) -> Any:
        """What `run` needs as token ids; TaskError if an item is too long for the model.

        A comparison calls it for every task before it begins.
        """

    def _fit_positions(self, lm: LanguageModel, lengths: Iterable[int]) -> None:
        """Raise TaskError if the model has no positions for a prompt and the tokens of an item."""
        more = tokens_before(lm.model, lm.tokenizer)
        for item, tokens in zip(self.items, lengths, strict=True):
            check_length(lm.model, tokens + more, f"{self.name}: item {item[0]!r}", TaskError)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self.items)} item(s))"

    def _repr_html_(self) -> str:
        columns = self.columns or ("item",)
        values = (one if self.columns else (one,) for one in self.items)
        return html_table(repr(self), (dict(zip(columns, one, strict=True)) for one in values))

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, rows: Sequence[int]) -> Self:
        """The same task on some of its items."""
        return replace(self, items=[self.items[row] for row in rows])
