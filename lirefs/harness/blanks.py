"""The task of a blank in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lirefs.harness.engine import Advance, option_log_likelihoods
from lirefs.harness.tasks import ItemResult, ItemTask
from lirefs.models import LanguageModel


@dataclass(frozen=True)
class FilledBlank(ItemTask):
    """Which of two fillings makes the rest of the sentence likelier.

    Partial scoring, as is usual for Winogrande: the log-likelihood of the text after the blank
    is compared between the two contexts; the fillings themselves are not scored.

    Attributes:
        items: (id, the two contexts up to and with the filling, the text after the blank with
            its leading space, index of the right context).
    """

    items: Sequence[tuple[str, tuple[str, str], str, int]]
    group: str = "reasoning"
    metric: str = "accuracy"
    chance: float = 0.5

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
