"""Log-likelihoods and greedy decoding without a cache: whole rows, run again for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lirefs.model.guest import evaluating
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import Prompt, prompt_known
from lirefs.tasks.batches.lower_blocks import begun_above
from lirefs.tasks.batches.memory import tokens_that_fit

Advance = Callable[[int], Any]
"""Called with the number of items that were finished since the last call."""


def score_whole(
    lm: LanguageModel,
    items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    advance: Advance,
) -> list[list[tuple[float, bool]]]:
    """`score_continuations` without a cache: each option is run with its whole prompt."""
    pairs = [(prompt, option) for prompt, options in items for option in options]
    step = progress_in_items(advance, len(items), len(pairs))
    scored: dict[int, tuple[float, bool]] = {}
    lengths = [len(prompt) + len(option) - 1 for prompt, option in pairs]
    with evaluating(lm.model):
        traits = lm.traits.within(max(lengths, default=0))
        for rows in traits.groups(lengths, tokens_that_fit(lm, 1.0), "right"):
            texts = [[*pairs[row][0], *pairs[row][1][:-1]] for row in rows]
            logits = logits_of(lm, texts, [len(pairs[row][0]) for row in rows])
            for row, found in zip(rows, logits, strict=True):
                prompt, option = pairs[row]
                part = found[len(prompt) - 1 : lengths[row]]
                goal = torch.tensor([list(option)])
                right = bool((part.argmax(-1).cpu() == goal[0]).all())
                scored[row] = -float(nll_of(part[None], goal).sum()), right
            step(len(rows))
    ordered = iter(scored[row] for row in range(len(pairs)))
    return [[next(ordered) for _ in options] for _, options in items]


def progress_in_items(advance: Advance, items: int, prompts: int) -> Advance:
    """Progress in items, for calls that report how many of their prompts are finished."""
    done = 0

    def step(n: int) -> None:
        nonlocal done
        before, done = done * items // prompts, done + n
        advance(done * items // prompts - before)

    return step


def logits_of(lm: LanguageModel, texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> Tensor:
    """Logits of whole texts, padded on the right, whose prompts have these lengths."""
    inputs = lm.pad(texts, side="right")
    with prompt_known(Prompt(torch.tensor(prompts))):
        run = partial(lm.model, **inputs, use_cache=False)
        out = begun_above(lm.model, run, list(inputs.values()))
    return cast(Tensor, out.logits)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids padded on the right: int64, (rows, tokens)."""
    return pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)


class Recomputed:
    """Prompts of equal length, whose tokens are all computed again at every step."""

    def __init__(self, lm: LanguageModel, prompts: list[Sequence[int]]) -> None:
        self._lm = lm
        self._starts = [len(prompt) for prompt in prompts]
        self._texts = [list(prompt) for prompt in prompts]
        self.last_logits = self._last()

    def _last(self) -> Tensor:
        return logits_of(self._lm, self._texts, self._starts)[:, -1]

    def select(self, picked: list[int]) -> None:
        """Keep these rows of the batch, in this order."""
        self._texts = [self._texts[row] for row in picked]
        self._starts = [self._starts[row] for row in picked]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of each row, (rows,)."""
        for text, token in zip(self._texts, tokens.tolist(), strict=True):
            text.append(token)
        return self._last()


def nll_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, in the shape of the targets."""
    flat = targets.to(logits.device).flatten()
    nll = cross_entropy(logits.float().flatten(0, 1), flat, reduction="none")
    return nll.view(targets.shape)
