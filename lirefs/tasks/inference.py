"""Batched greedy decoding and log-likelihoods; a prefix that prompts share is computed once."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lirefs.errors import TaskError
from lirefs.model.batching import batches_by_tokens
from lirefs.model.guest import evaluating
from lirefs.model.interrupts import undone
from lirefs.model.intervention import Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import with_prompts
from lirefs.model.traits import Traits, quantizes_tokens_together
from lirefs.tasks.batches.cached import Batch, by_beginning, score_tails
from lirefs.tasks.batches.memory import tokens_that_fit
from lirefs.tasks.batches.recomputed import (
    Advance,
    Recomputed,
    logits_of,
    nll_of,
    padded,
    score_whole,
)
from lirefs.tasks.items import (
    lengths_of,
    must_fit,
    prompts_and_continuations,
    shared_tokens,
    with_tokens,
)

NOT_ON_ENGINE = "an engine runs tasks that say generates = True; compare others without engine"
# A forward pass of fewer tokens takes hardly less time, so padding up to here is free.
ENOUGH = 256
# A batch drops its finished rows once at most this share of its rows is unfinished. Copying the
# cache of those is cheap compared with a step on a CPU, less so on an accelerator.
UNFINISHED = 0.9


class Engine(Protocol):
    """Another runtime that generates for `lm.model`, such as `lirefs.export.vllm.Engine`."""

    def check(self, lm: LanguageModel) -> None:
        """Raise an error unless it runs the same model."""

    def describe(self) -> dict[str, Any]:
        """What decides its numbers, as JSON values."""

    def steered(self, intervention: Intervention) -> AbstractContextManager[Any]:
        """The engine under an intervention, inside a `with`."""

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Collection[int],
        until: Sequence[str],
    ) -> list[list[int]]:
        """Greedy continuations; it may end them at these tokens and texts, which are kept."""


_ENGINE: ContextVar[Engine | None] = ContextVar("engine", default=None)


@contextmanager
def generating_on(engine: Engine | None) -> Iterator[None]:
    """Let `greedy` run on an engine inside the `with`; None for the model itself."""
    with undone() as steps:
        steps.append(partial(_ENGINE.set, _ENGINE.get()))
        _ENGINE.set(engine)
        yield


def greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    stop: Callable[[int], bool] | None = None,
    until: Sequence[str] = (),
    drafts: Sequence[Sequence[int]] = (),
    batch_tokens: int | None = None,
    advance: Advance = lambda n: None,
) -> list[list[int]]:
    """Greedy continuations.

    Args:
        lm: The model, under whatever intervention is active.
        prompts: Token ids of each prompt, at least one token each.
        max_new_tokens: Length of each continuation, unless it is stopped; one number, or one for
            each prompt.
        stop: Whether a row ends after a token id; that token is kept. None: never.
        until: Texts after which a row ends; the tokens that hold them are kept.
        drafts: What each continuation may well be, as long as it is to be. One that is right costs
            one pass, as when a text is recited, in place of one for each of its tokens.
        batch_tokens: Tokens per batch, padding and continuation included; None: as many as an
            eighth of the device's memory holds, from 256 to 8,192 on a CPU, to 65,536 elsewhere.
        advance: Called with the number of prompts finished.

    Returns:
        The new token ids of each prompt, in their order; none where the model overflowed.
    """
    texts = list(filter(None, until))
    # A token has at least one byte, so this many tokens hold any text that the last one completes;
    # two more, because decoding may begin inside a character or drop a space.
    reach = max((len(text.encode()) for text in texts), default=0) + 2

    def ends(row: list[int]) -> bool:
        tail = lm.tokenizer.decode(row[-reach:]) if texts else ""
        stopped = stop is not None and stop(row[-1])
        return stopped or any(text in tail for text in texts)

    must_fit(lm, prompts, len)
    limits = lengths_of(max_new_tokens, len(prompts))
    must_fit(lm, list(zip(prompts, limits, strict=True)), lambda one: len(one[0]) + one[1] - 1)
    if drafts and limits != list(map(len, drafts)):
        raise TaskError("drafts must be as long as the continuations, one for each prompt")
    prompts = with_prompts(lm.model, lm.tokenizer, prompts)
    if (engine := _ENGINE.get()) is not None:
        known = [token for token in lm.end_tokens if stop is not None and stop(token)]
        found = engine.greedy(prompts, max(limits, default=1), known, texts)
        advance(len(prompts))
        return [_cut(row[:limit], ends) for row, limit in zip(found, limits, strict=True)]
    results: dict[int, list[int]] = {}
    totals = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    traits = lm.traits.within(max(totals, default=0))
    if not (traits.causal and traits.continued):
        drafts = ()
    # Prompts of one length belong together where a batch must not be padded.
    lengths = [len(prompt) + max(limits) for prompt in prompts]
    budget = batch_tokens
    if budget is None:
        budget = tokens_that_fit(lm, sum(limits) / max(1, sum(totals)) if drafts else 0.0)
    with evaluating(lm.model):
        for group, prefix in by_beginning(lm, prompts, traits, max(limits, default=1)):
            among = [lengths[row] for row in group]
            side = "left" if traits.cache else None
            for rows in _picked(group, traits.groups(among, budget, side)):
                some = [prompts[row] for row in rows]
                batch = Batch(lm, some, *prefix) if traits.cache else Recomputed(lm, some)
                said: list[list[int]] = [[] for _ in rows]
                if drafts and isinstance(batch, Batch):
                    tried = _recited(batch, [drafts[row] for row in rows])
                    said = [_cut(one, ends) for one in tried]
                found = _decode(batch, [limits[row] for row in rows], ends, said)
                results |= zip(rows, found, strict=True)
                advance(len(rows))
    return [results[row] for row in range(len(prompts))]


def option_log_likelihoods(
    lm: LanguageModel,
    items: Sequence[Sequence[Sequence[int]]],
    *,
    advance: Advance = lambda n: None,
) -> list[list[float]]:
    """Log-likelihood of each option of each item, in nats.

    Args:
        lm: The model, under whatever intervention is active.
        items: For each item, the token ids of prompt + option for every option.
        advance: Called with the number of items finished.

    Returns:
        For each option, the log-probability of its tokens after the beginning that all options
        of the item share, which counts as the prompt and runs once.
    """
    split = []
    for options in with_tokens(items):
        start = shared_tokens(options)
        split.append((options[0][:start], [option[start:] for option in options]))
    scored = score_continuations(lm, split, advance=advance)
    return [[value for value, _ in values] for values in scored]


def score_continuations(
    lm: LanguageModel,
    items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    batch_tokens: int | None = None,
    advance: Advance = lambda n: None,
) -> list[list[tuple[float, bool]]]:
    """How likely each continuation of each prompt is, and whether it is the greedy one.

    Args:
        lm: The model, under whatever intervention is active.
        items: (prompt, continuations), token ids, at least one token each.
        batch_tokens: Tokens per batch, padding included; None: see `greedy`.
        advance: Called with the number of items finished.

    Returns:
        For each continuation its log-likelihood in nats, and whether all of its tokens are those
        of greedy decoding.
    """
    items = prompts_and_continuations(lm, items)
    must_fit(lm, items, lambda item: len(item[0]) + max(map(len, item[1])) - 1)
    prompts = with_prompts(lm.model, lm.tokenizer, [prompt for prompt, _ in items])
    items = [(prompt, options) for prompt, (_, options) in zip(prompts, items, strict=True)]
    results: dict[int, list[tuple[float, bool]]] = {}
    longest = [len(prompt) + max(map(len, options)) for prompt, options in items]
    traits = _causal_traits(lm).within(max(longest, default=0))
    if not traits.continued:
        return score_whole(lm, items, advance)
    with evaluating(lm.model):
        # In the cache, each option of several tokens has its own copy of the prompt.
        lengths = [
            max(1, sum(len(one) > 1 for one in options)) * (len(prompt) + max(map(len, options)))
            for prompt, options in items
        ]
        budget = batch_tokens
        if budget is None:
            tails = sum(len(option) for _, options in items for option in options)
            budget = tokens_that_fit(lm, tails / max(1, sum(lengths)))
        for group, prefix in by_beginning(lm, prompts, traits):
            among = [lengths[row] for row in group]
            for rows in _picked(group, batches_by_tokens(among, budget, enough=ENOUGH)):
                batch = Batch(lm, [items[row][0] for row in rows], *prefix)
                found = _score_options(batch, [items[row][1] for row in rows])
                results |= zip(rows, found, strict=True)
                advance(len(rows))
    return [results[row] for row in range(len(items))]


def token_nlls(
    lm: LanguageModel, texts: Sequence[Sequence[int]], *, advance: Advance = lambda n: None
) -> list[Tensor]:
    """Negative log-likelihood of every token but the first of each text.

    For steering in scopes, the first half of a text counts as its prompt, with all that a
    `Prompted` puts before it.

    Args:
        lm: The model, under whatever intervention is active.
        texts: Token ids of each text, at least two tokens each.
        advance: Called with the number of texts finished.

    Returns:
        For each text a float32 tensor on the CPU, shape (tokens - 1,), in nats.
    """
    must_fit(lm, texts, len)
    results: dict[int, Tensor] = {}
    whole = with_prompts(lm.model, lm.tokenizer, texts, chats=False)
    before = [len(all_of) - len(text) for all_of, text in zip(whole, texts, strict=True)]
    with evaluating(lm.model):  # in smaller batches, because the logits of a whole one are held
        lengths = list(map(len, whole))
        traits = _causal_traits(lm).within(max(lengths, default=0))
        for rows in traits.groups(lengths, tokens_that_fit(lm, 1.0), "right"):
            some = [whole[row] for row in rows]
            prompts = [before[row] + max(1, len(texts[row]) // 2) for row in rows]
            nll = nll_of(logits_of(lm, some, prompts)[:, :-1], padded(some)[:, 1:]).cpu()
            for index, row in enumerate(rows):
                results[row] = nll[index, before[row] : lengths[row] - 1].clone()
            advance(len(rows))
    return [results[row] for row in range(len(texts))]


def _causal_traits(lm: LanguageModel) -> Traits:
    """The traits of a model whose log-likelihoods mean something; TaskError for others."""
    if _ENGINE.get() is not None:
        raise TaskError(NOT_ON_ENGINE)
    if not lm.traits.causal:
        reason, remedy = "tokens see later ones in this model", "use tasks that generate"
        if quantizes_tokens_together(lm.model):
            reason = "LLM.int8() with outliers quantizes the tokens of a batch together"
            remedy = "load the model with llm_int8_threshold=0.0, or use tasks that generate"
        raise TaskError(
            f"{lm.name}: {reason}, so the likelihood of a text cannot be scored; {remedy} their "
            "answer (ShortAnswer, Recitation)"
        )
    return lm.traits


def _picked(group: Sequence[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """Batches of indices into a group, as batches of its members."""
    return [[group[index] for index in batch] for batch in batches]


def _cut(row: list[int], ends: Callable[[list[int]], bool]) -> list[int]:
    """A continuation up to the token with which it ends."""
    lengths = range(1, len(row) + 1)
    return row[: next((length for length in lengths if ends(row[:length])), len(row))]


def _recited(batch: Batch, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The drafts that are the greedy continuations of their rows; of other rows, nothing."""
    best = batch.last_logits.argmax(-1).tolist()
    tried = [[one] if one[0] == token else [] for one, token in zip(drafts, best, strict=True)]
    found = [
        any(right and math.isfinite(value) for value, right in one)
        for one in _score_options(batch, tried)
    ]
    return [list(one if right else ()) for one, right in zip(drafts, found, strict=True)]


def _decode(
    batch: Batch | Recomputed,
    limits: Sequence[int],
    ends: Callable[[list[int]], bool],
    rows: list[list[int]],
) -> list[list[int]]:
    """Continue each row up to its limit or its end; those that hold a text are finished."""
    logits = batch.last_logits
    done = list(map(bool, rows))
    held = list(range(len(rows)))  # those that the batch still holds
    # A row beyond its own limit could be beyond the model's last position.
    share = UNFINISHED if len(set(limits)) == 1 else 1.0
    while True:
        tokens, known = logits.argmax(-1), logits.amax(-1).isfinite().tolist()
        for row, token, finite in zip(held, tokens.tolist(), known, strict=True):
            if not done[row]:
                rows[row] = [*rows[row], token] if finite else []
                done[row] = not finite or len(rows[row]) == limits[row] or ends(rows[row])
        going = [index for index, row in enumerate(held) if not done[row]]
        if not going:
            return rows
        if len(going) < len(held) and len(going) <= share * len(held):
            batch.select(going)
            tokens = tokens[going]
            held = [held[index] for index in going]
        logits = batch.step(tokens)


def _score_options(
    batch: Batch, options: Sequence[Sequence[Sequence[int]]]
) -> list[list[tuple[float, bool]]]:
    pairs = [(row, option) for row, some in enumerate(options) for option in some]
    first = torch.log_softmax(batch.last_logits.float(), dim=-1).cpu()
    best = first.argmax(-1).tolist()
    scored = [(float(first[row, option[0]]), best[row] == option[0]) for row, option in pairs]
    chunks: dict[int, list[int]] = defaultdict(list)
    for index, (_, option) in enumerate(pairs):
        if len(option) > 1:  # rests of similar length together, within a factor of two
            chunks[(len(option) - 2).bit_length()].append(index)
    for chunk in chunks.values():
        part = copy.copy(batch)
        part.cache = copy.deepcopy(batch.cache)
        part.select([pairs[index][0] for index in chunk])
        tails = score_tails(part, [pairs[index][1] for index in chunk])
        for index, nll, right in zip(chunk, *tails, strict=True):
            value, greedily = scored[index]
            scored[index] = value - nll, greedily and right
    ordered = iter(scored)
    return [[next(ordered) for _ in some] for some in options]
