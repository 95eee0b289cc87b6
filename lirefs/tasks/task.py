"""Tasks: a fixed list of items, and how each item is scored."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from lirefs.errors import TaskError, as_list, must_be, whole_number
from lirefs.model.language_model import LanguageModel
from lirefs.tasks import inference
from lirefs.tasks.answers import AnswerKind, judge, number_at
from lirefs.tasks.batches.recomputed import Advance, progress_in_items
from lirefs.tasks.items import ItemTask, common_prefix, named_text

GROUPS = ("memorization", "arithmetic", "closed-book", "open-book", "reasoning", "language")
CONFLICT = "conflict"
"""Group of tasks whose items have two competing answers: neither score is one to retain."""


@dataclass(frozen=True)
class ItemResult:
    """The result of one item.

    Attributes:
        id: Name of the item, the same under every variant. In `tag/rest` the tag is a class of
            items that analyses distinguish, for instance a relation.
        scores: Metric name to value; perplexity has `nll` (nats, summed) instead. NaN where the
            model overflowed.
        weight: Weight of the item in a mean: its number of tokens where tokens are scored.
        prompt: What was asked.
        expected: What counts as right.
        output: What the model answered.
        parsed: False when no answer could be read from the output.
    """

    id: str
    scores: dict[str, float]
    weight: float = 1.0
    prompt: str = ""
    expected: str = ""
    output: str = ""
    parsed: bool = True


class Task(Protocol):
    """A task: anything with a name, a group, a metric, items, `subset` and `run`.

    The score of an item must not depend on the other items of its batch: comparisons run tasks in
    parts, continue where they were killed, and split parts over processes.
    """

    @property
    def name(self) -> str:
        """Name of the task, unique in a comparison."""

    @property
    def group(self) -> str:
        """One of `GROUPS`, or `CONFLICT`."""

    @property
    def metric(self) -> str:
        """The score that is reported, or `perplexity`."""

    @property
    def chance(self) -> float:
        """Score of guessing; a score that does not exceed it carries no information."""

    @property
    def items(self) -> Sequence[Any]:
        """What is asked; different items must have different `repr`."""

    def __len__(self) -> int:
        """Number of items."""

    def subset(self, rows: Sequence[int]) -> Task:
        """The same task on some of its items."""

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item: one result for each, in their order.

        Args:
            lm: The model, under whatever intervention is attached.
            advance: Called with the number of items finished since the last call.
        """


@dataclass(frozen=True, repr=False)
class Perplexity(ItemTask):
    """Token-weighted perplexity of texts: exp(sum of nll / number of tokens).

    The result of a text holds its summed `nll` in nats; its weight is the number of tokens
    predicted. `run` raises `TaskError` for a text of fewer than two tokens.

    Attributes:
        items: (id, text), or texts alone.
        max_tokens: Longer texts are cut to this length.
        chance: Not used: perplexity is always informative.

    Raises:
        TaskError: As in `ItemTask`, or `max_tokens` is less than 2.
    """

    items: Sequence[Any]
    group: str = "language"
    metric: str = "perplexity"
    max_tokens: int = 512
    chance: float = 0.0

    columns = ("id", "text")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self.max_tokens, f"{self.name}: max_tokens", least=2, error=TaskError)

    def _item(self, index: int, given: Any) -> tuple[str, str]:
        return named_text(self.name, index, given)

    def encoded(self, lm: LanguageModel) -> list[list[int]]:
        """Token ids of each text; TaskError if one has fewer than two, or is too long."""
        ids = [row[: self.max_tokens] for row in lm.encode([text for _, text in self.items])]
        for (item, _), row in zip(self.items, ids, strict=True):
            if len(row) < 2:
                raise TaskError(f"{self.name}: text {item!r} has fewer than two tokens")
        self._fit_positions(lm, map(len, ids))
        return ids

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every text."""
        nlls = inference.token_nlls(lm, self.encoded(lm), advance=advance)
        return [
            ItemResult(item, {"nll": float(nll.double().sum())}, len(nll), prompt=text[:200])
            for (item, text), nll in zip(self.items, nlls, strict=True)
        ]


@dataclass(frozen=True, repr=False)
class MultipleChoice(ItemTask):
    """The option with the highest log-likelihood after the prompt (lm-eval's `acc`).

    Attributes:
        items: (id, prompt, options, index of the right option). Options carry their own
            leading space.

    Raises:
        TaskError: As in `ItemTask`, or the index of an item is out of range.
    """

    items: Sequence[Any]
    group: str = "reasoning"
    metric: str = "accuracy"

    columns = ("id", "prompt", "options", "answer")

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        prompt, options, answer = values
        must_be(prompt, str, f"{where}: prompt", TaskError)
        for index, option in enumerate(as_list(options, f"{where}: options", str, TaskError)):
            if not option:
                raise TaskError(f"{where}: option {index} is empty, so nothing of it can be scored")
        return prompt, options, _index(where, answer, options)

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess: the mean of 1 / number of options."""
        return sum(1 / len(options) for _, _, options, _ in self.items) / len(self.items)

    def encoded(self, lm: LanguageModel) -> list[list[list[int]]]:
        """Token ids of prompt and option, for each option of each item."""
        ids = iter(lm.encode([item[1] + option for item in self.items for option in item[2]]))
        found = [[next(ids) for _ in item[2]] for item in self.items]
        self._fit_positions(lm, (max(map(len, options)) - 1 for options in found))
        return found

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        likelihoods = inference.option_log_likelihoods(lm, self.encoded(lm), advance=advance)
        return [
            _choice(item, prompt, [option.strip() for option in options], answer, values)
            for (item, prompt, options, answer), values in zip(self.items, likelihoods, strict=True)
        ]


@dataclass(frozen=True, repr=False)
class FilledBlank(ItemTask):
    """Which of two fillings of a blank makes the text after it likelier.

    This is the usual scoring of Winogrande; the fillings themselves are not scored.

    Attributes:
        items: (id, the two contexts up to and including the filling, the text after the blank
            with its leading space, index of the right context).

    Raises:
        TaskError: As in `ItemTask`, or an item has other than two contexts.
    """

    items: Sequence[Any]
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.5

    columns = ("id", "contexts", "ending", "answer")

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        contexts, ending, answer = values
        if len(as_list(contexts, f"{where}: contexts", str, TaskError)) != 2:
            raise TaskError(f"{where} has {len(contexts)} contexts; expected two")
        must_be(ending, str, f"{where}: ending", TaskError)
        if not ending:
            raise TaskError(f"{where}: the ending is empty, so nothing of it can be scored")
        return contexts, ending, _index(where, answer, contexts)

    def encoded(self, lm: LanguageModel) -> list[tuple[list[int], list[list[int]]]]:
        """Token ids of each context and of the ending after it, two for each item."""
        pairs = [(context, ending) for _, both, ending, _ in self.items for context in both]
        contexts = lm.encode([context for context, _ in pairs])
        endings = []
        for alone, whole in zip(contexts, lm.encode(list(map("".join, pairs))), strict=True):
            start = min(common_prefix(whole, alone), len(whole) - 1)
            endings.append((whole[:start], [whole[start:]]))
        lengths = [len(context) + len(ending) - 1 for context, (ending,) in endings]
        self._fit_positions(lm, map(max, zip(lengths[::2], lengths[1::2], strict=True)))
        return endings

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        endings = self.encoded(lm)
        step = progress_in_items(advance, len(self.items), len(endings))
        scored = inference.score_continuations(lm, endings, advance=step)
        results = []
        for row, (item, contexts, ending, answer) in enumerate(self.items):
            shown = [context.split("\n")[-1] for context in contexts]
            values = [value for ((value, _),) in scored[2 * row : 2 * row + 2]]
            results.append(_choice(item, contexts[0] + ending, shown, answer, values))
        return results


def _index(where: str, answer: Any, options: Sequence[str]) -> int:
    """The index of the right option."""
    index = whole_number(
        answer, f"{where}: answer, the index of the right option,", error=TaskError
    )
    if not 0 <= index < len(options):
        raise TaskError(f"{where} has no option {index}")
    return index


def _choice(
    item: str, prompt: str, options: Sequence[str], answer: int, values: Sequence[float]
) -> ItemResult:
    """The result of the option with the highest value, the first one of equals; NaN if one is."""
    if any(map(math.isnan, values)):
        return ItemResult(item, {"accuracy": math.nan}, prompt=prompt, expected=options[answer])
    chosen = values.index(max(values))
    scores = {"accuracy": float(chosen == answer)}
    return ItemResult(item, scores, prompt=prompt, expected=options[answer], output=options[chosen])


@dataclass(frozen=True, repr=False)
class ShortAnswer(ItemTask):
    """Greedy answer up to the end of its line, read by a rule.

    An output from which no answer can be read counts as wrong and as unparsable; it is never
    guessed. Worked answers end with their line too: every example in a prompt is one line.

    Attributes:
        items: (id, prompt, accepted answers); one answer may be given as a string.
        kind: How the line is read, see `lirefs.tasks.judge`.
        max_new_tokens: Length limit of the answer.
        chance: Score of guessing, where the prompt itself offers the answers.

    Raises:
        TaskError: As in `ItemTask`, an unknown kind, a limit below 1, an item without an accepted
            answer, or one of a numeric kind that is not a number.
    """

    items: Sequence[Any]
    group: str = "closed-book"
    metric: str = "accuracy"
    kind: AnswerKind = "text"
    max_new_tokens: int = 8
    chance: float = 0.0

    columns = ("id", "prompt", "answers")
    generates = True

    def __post_init__(self) -> None:
        kinds = get_args(AnswerKind)
        if self.kind not in kinds:
            raise TaskError(f"{self.name}: kind is {self.kind!r}; expected {', '.join(kinds)}")
        whole_number(self.max_new_tokens, f"{self.name}: max_new_tokens", least=1, error=TaskError)
        super().__post_init__()

    def _item(self, index: int, given: Any) -> tuple[Any, ...]:
        if isinstance(given, Mapping) and "answer" in given and "answers" not in given:
            given = {"answers" if key == "answer" else key: one for key, one in given.items()}
        return super()._item(index, given)

    def _checked(self, where: str, *values: Any) -> Iterable[Any]:
        prompt, answers = values
        must_be(prompt, str, f"{where}: prompt", TaskError)
        answers = [answers] if isinstance(answers, str) else answers
        if not as_list(answers, f"{where}: answers", str, TaskError):
            raise TaskError(f"{where} has no accepted answer")
        if self.kind in ("number", "worked") and None in map(number_at, answers):
            raise TaskError(f"{where} expects {answers}, which are not all numbers")
        return prompt, answers

    def encoded(self, lm: LanguageModel) -> list[list[int]]:
        """Token ids of each prompt."""
        ids = lm.encode([prompt for _, prompt, _ in self.items])
        self._fit_positions(lm, (len(row) + self.max_new_tokens - 1 for row in ids))
        return ids

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        ids, ends = self.encoded(lm), lm.end_tokens

        @functools.cache
        def stop(token: int) -> bool:
            return token in ends or "\n" in lm.tokenizer.decode([token])

        outputs = inference.greedy(lm, ids, self.max_new_tokens, stop=stop, advance=advance)
        results = []
        for (item, prompt, answers), output in zip(self.items, outputs, strict=True):
            said = lm.tokenizer.decode(lm.before_end(output), skip_special_tokens=True)
            text = said.strip().split("\n")[0]
            parsed, right = judge(text, answers, self.kind)
            accuracy = float(right) if output else math.nan  # no token: the model overflowed
            scores, expected = {"accuracy": accuracy}, " | ".join(answers)
            results.append(ItemResult(item, scores, 1.0, prompt, expected, text, parsed))
        return results
