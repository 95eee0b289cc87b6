"""Tasks that skills need beyond multiple choice and short answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from lirefs.errors import TaskError
from lirefs.harness.engine import Advance, greedy, option_log_likelihoods
from lirefs.harness.parsing import judge_words, judge_worked
from lirefs.harness.tasks import ItemResult
from lirefs.models import LanguageModel

_JUDGES = {"worked": judge_worked, "words": judge_words}


@dataclass(frozen=True)
class GeneratedAnswer:
    """Greedy answer up to the end of its line, read by a rule of its kind.

    The line is the stop rule of worked answers too: every example in the prompt reasons in one
    line. What cannot be read counts as wrong and as unparsable; it is never guessed.

    Attributes:
        items: (id, prompt, accepted answers).
        kind: `worked`: a chain of thought, whose last `The answer is N` counts; `words`: all
            words of the line must be those of an answer.
        max_new_tokens: Length limit of the answer.
    """

    name: str
    items: Sequence[tuple[str, str, Sequence[str]]]
    group: str = "arithmetic"
    kind: Literal["worked", "words"] = "worked"
    max_new_tokens: int = 300
    metric: str = "accuracy"
    chance: float = 0.0

    def __post_init__(self) -> None:
        _nonempty(self.name, self.items)

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, rows: Sequence[int]) -> Self:
        """The same task on some of its items."""
        return replace(self, items=[self.items[row] for row in rows])

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        ends: dict[int, bool] = {}
        eos = lm.tokenizer.eos_token_id

        def stop(token: int) -> bool:
            if token not in ends:
                ends[token] = token == eos or "\n" in lm.tokenizer.decode([token])
            return ends[token]

        ids = lm.encode([prompt for _, prompt, _ in self.items])
        outputs = greedy(lm, ids, self.max_new_tokens, stop=stop, advance=advance)
        results = []
        for (item, prompt, answers), output in zip(self.items, outputs, strict=True):
            text = lm.tokenizer.decode(output, skip_special_tokens=True).strip().split("\n")[0]
            parsed, right = _JUDGES[self.kind](text, answers)
            results.append(
                ItemResult(
                    id=item,
                    scores={"accuracy": float(right)},
                    prompt=prompt,
                    expected=" | ".join(answers),
                    output=text,
                    parsed=parsed,
                )
            )
        return results


@dataclass(frozen=True)
class FilledBlank:
    """Which of two fillings makes the rest of the sentence likelier.

    Partial scoring, as is usual for Winogrande: the log-likelihood of the text after the blank
    is compared between the two contexts; the fillings themselves are not scored.

    Attributes:
        items: (id, the two contexts up to and with the filling, the text after the blank with
            its leading space, index of the right context).
    """

    name: str
    items: Sequence[tuple[str, tuple[str, str], str, int]]
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.5

    def __post_init__(self) -> None:
        _nonempty(self.name, self.items)

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, rows: Sequence[int]) -> Self:
        """The same task on some of its items."""
        return replace(self, items=[self.items[row] for row in rows])

    def run(self, lm: LanguageModel, advance: Advance) -> list[ItemResult]:
        """Score every item."""
        pairs = [
            _scored_from(lm, context, ending)
            for _, contexts, ending, _ in self.items
            for context in contexts
        ]
        done = 0

        def halve(n: int) -> None:
            nonlocal done
            advance((done + n) // 2 - done // 2)
            done += n

        values = [pair[0] for pair in option_log_likelihoods(lm, pairs, advance=halve)]
        results = []
        for row, (item, contexts, ending, answer) in enumerate(self.items):
            chosen = int(values[2 * row + 1] > values[2 * row])
            results.append(
                ItemResult(
                    id=item,
                    scores={"accuracy": float(chosen == answer)},
                    prompt=contexts[0] + ending,
                    expected=contexts[answer].split("\n")[-1],
                    output=contexts[chosen].split("\n")[-1],
                )
            )
        return results


def _scored_from(lm: LanguageModel, context: str, ending: str) -> list[list[int]]:
    """Two options whose first one is scored on the tokens of `ending` alone.

    `option_log_likelihoods` scores what options do not share; the second option shares the
    context and differs from the first token of the ending on.
    """
    whole, alone = lm.encode([context + ending, context])
    start = 0
    while start < min(len(whole) - 1, len(alone)) and whole[start] == alone[start]:
        start += 1
    other = 0 if whole[start] else 1
    return [whole, [*whole[:start], other]]


def _nonempty(name: str, items: Sequence[Any]) -> None:
    if not items:
        raise TaskError(f"task {name!r} has no items")
