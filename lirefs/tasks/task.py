"""Tasks: a fixed list of items, and how each item is scored."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from lirefs.errors import TaskError
from lirefs.model.language_model import LanguageModel
from lirefs.tasks import inference
from lirefs.tasks.answers import AnswerKind, judge, number_at
from lirefs.tasks.inference import Advance

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


@dataclass(frozen=True)
class ItemTask:
    """Base of the tasks here: name and items; subclasses add the rest of `Task`.

    Raises:
        TaskError: No item.
    """

    name: str
    items: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.items:
            raise TaskError(f"task {self.name!r} has no items")

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, rows: Sequence[int]) -> Self:
        """The same task on some of its items."""
        return replace(self, items=[self.items[row] for row in rows])


def progress_in_items(advance: Advance, items: int, prompts: int) -> Advance:
    """Progress in items, for calls that report how many of their prompts are finished."""
    done = 0

    def step(n: int) -> None:
        nonlocal done
        before, done = done * items // prompts, done + n
        advance(done * items // prompts - before)

    return step


@dataclass(frozen=True)
class Perplexity(ItemTask):
    """Token-weighted perplexity of texts: exp(sum of nll / number of tokens).

    The result of a text holds its summed `nll` in nats; its weight is the number of tokens
    predicted. `run` raises `TaskError` for a text of fewer than two tokens.

    Attributes:
        items: (id, text).
        max_tokens: Longer texts are cut to this length.
        chance: Not used: perplexity is always informative.
    """

    items: Sequence[tuple[str, str]]
    group: str = "language"
    metric: str = "perplexity"
    max_tokens: int = 512
    chance: float = 0.0

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every text."""
        ids = [row[: self.max_tokens] for row in lm.encode([text for _, text in self.items])]
        for (item, _), row in zip(self.items, ids, strict=True):
            if len(row) < 2:
                raise TaskError(f"{self.name}: text {item!r} has fewer than two tokens")
        nlls = inference.token_nlls(lm, ids, advance=advance)
        return [
            ItemResult(item, {"nll": float(nll.double().sum())}, len(nll), prompt=text[:200])
            for (item, text), nll in zip(self.items, nlls, strict=True)
        ]


@dataclass(frozen=True)
class MultipleChoice(ItemTask):
    """The option with the highest log-likelihood after the prompt (lm-eval's `acc`).

    Attributes:
        items: (id, prompt, options, index of the right option). Options carry their own
            leading space.

    Raises:
        TaskError: No item, or the index of one is out of range.
    """

    items: Sequence[tuple[str, str, Sequence[str], int]]
    group: str = "reasoning"
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        for item, _, options, answer in self.items:
            if not 0 <= answer < len(options):
                raise TaskError(f"{self.name}: item {item!r} has no option {answer}")

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess: the mean of 1 / number of options."""
        return sum(1 / len(options) for _, _, options, _ in self.items) / len(self.items)

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        texts = [[item[1] + option for option in item[2]] for item in self.items]
        encoded = list(map(lm.encode, texts))
        likelihoods = inference.option_log_likelihoods(lm, encoded, advance=advance)
        return [
            _choice(item, prompt, [option.strip() for option in options], answer, values)
            for (item, prompt, options, answer), values in zip(self.items, likelihoods, strict=True)
        ]


@dataclass(frozen=True)
class FilledBlank(ItemTask):
    """Which of two fillings of a blank makes the text after it likelier.

    This is the usual scoring of Winogrande; the fillings themselves are not scored.

    Attributes:
        items: (id, the two contexts up to and including the filling, the text after the blank
            with its leading space, index of the right context).
    """

    items: Sequence[tuple[str, tuple[str, str], str, int]]
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.5

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        endings = []
        for _, contexts, ending, _ in self.items:
            for context in contexts:
                whole, alone = lm.encode([context + ending, context])
                start = min(inference.common_prefix(whole, alone), len(whole) - 1)
                endings.append((whole[:start], [whole[start:]]))
        step = progress_in_items(advance, len(self.items), len(endings))
        scored = inference.score_continuations(lm, endings, advance=step)
        results = []
        for row, (item, contexts, ending, answer) in enumerate(self.items):
            shown = [context.split("\n")[-1] for context in contexts]
            values = [value for ((value, _),) in scored[2 * row : 2 * row + 2]]
            results.append(_choice(item, contexts[0] + ending, shown, answer, values))
        return results


def _choice(
    item: str, prompt: str, options: Sequence[str], answer: int, values: Sequence[float]
) -> ItemResult:
    """The result of the option with the highest value, the first one of equals; NaN if one is."""
    if any(map(math.isnan, values)):
        return ItemResult(item, {"accuracy": math.nan}, prompt=prompt, expected=options[answer])
    chosen = values.index(max(values))
    scores = {"accuracy": float(chosen == answer)}
    return ItemResult(item, scores, prompt=prompt, expected=options[answer], output=options[chosen])


@dataclass(frozen=True)
class ShortAnswer(ItemTask):
    """Greedy answer up to the end of its line, read by a rule.

    An output from which no answer can be read counts as wrong and as unparsable; it is never
    guessed. Worked answers end with their line too: every example in a prompt is one line.

    Attributes:
        items: (id, prompt, accepted answers).
        kind: How the line is read, see `lirefs.tasks.judge`.
        max_new_tokens: Length limit of the answer.
        chance: Score of guessing, where the prompt itself offers the answers.

    Raises:
        TaskError: No item, or an accepted answer of a numeric kind is not a number.
    """

    items: Sequence[tuple[str, str, Sequence[str]]]
    group: str = "closed-book"
    metric: str = "accuracy"
    kind: AnswerKind = "text"
    max_new_tokens: int = 8
    chance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for item, _, answers in self.items:
            if isinstance(answers, str):
                raise TaskError(
                    f"{self.name}: item {item!r} needs a list of accepted answers, got one string: "
                    f"use [{answers!r}]"
                )
            if self.kind in ("number", "worked") and None in map(number_at, answers):
                raise TaskError(
                    f"{self.name}: item {item!r} expects {answers}, which are not all numbers"
                )

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        ends = lm.end_tokens

        @functools.cache
        def stop(token: int) -> bool:
            return token in ends or "\n" in lm.tokenizer.decode([token])

        ids = lm.encode([prompt for _, prompt, _ in self.items])
        outputs = inference.greedy(lm, ids, self.max_new_tokens, stop=stop, advance=advance)
        results = []
        for (item, prompt, answers), output in zip(self.items, outputs, strict=True):
            said = lm.tokenizer.decode(lm.before_end(output), skip_special_tokens=True)
            text = said.strip().split("\n")[0]
            parsed, right = judge(text, answers, self.kind)
            scores, expected = {"accuracy": float(right)}, " | ".join(answers)
            results.append(ItemResult(item, scores, 1.0, prompt, expected, text, parsed))
        return results
