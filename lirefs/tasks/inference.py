"""Batched greedy decoding and log-likelihoods; a prefix that prompts share is computed once."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lirefs.errors import TaskError
from lirefs.model.batching import batches_by_tokens
from lirefs.model.guest import accepts, evaluating
from lirefs.model.interrupts import undone
from lirefs.model.intervention import Intervention
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import Prompt, prompt_known, with_prompts
from lirefs.model.traits import Traits, cache_name, quantizes_tokens_together
from lirefs.tasks.items import (
    lengths_of,
    must_fit,
    prompts_and_continuations,
    shared_tokens,
    with_tokens,
)
from lirefs.tasks.recomputed import (
    Advance,
    Recomputed,
    logits_of,
    nll_of,
    padded,
    score_whole,
)
from lirefs.tasks.settings import BATCH_TOKENS

NOT_ON_ENGINE = "an engine runs tasks that say generates = True; compare others without engine"
# A prefix shorter than this costs more to copy into every batch than to compute again.
SHORTEST_SHARED = 8
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
    batch_tokens: int = BATCH_TOKENS,
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
        batch_tokens: Tokens per batch, padding and continuation included.
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
    prompts = with_prompts(lm.model, lm.tokenizer, prompts)
    if (engine := _ENGINE.get()) is not None:
        known = [token for token in lm.end_tokens if stop is not None and stop(token)]
        found = engine.greedy(prompts, max(limits, default=1), known, texts)
        advance(len(prompts))
        return [_cut(row[:limit], ends) for row, limit in zip(found, limits, strict=True)]
    results: dict[int, list[int]] = {}
    totals = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
    traits = lm.traits.within(max(totals, default=0))
    # Prompts of one length belong together where a batch must not be padded.
    lengths = [len(prompt) + max(limits) for prompt in prompts]
    with evaluating(lm.model):
        prefix = _shared_prefix(lm, prompts, traits)
        for rows in traits.groups(lengths, batch_tokens, "left" if traits.cache else None):
            some = [prompts[row] for row in rows]
            batch = _Batch(lm, some, *prefix) if traits.cache else Recomputed(lm, some)
            found = _decode(batch, [limits[row] for row in rows], ends)
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
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = lambda n: None,
) -> list[list[tuple[float, bool]]]:
    """How likely each continuation of each prompt is, and whether it is the greedy one.

    Args:
        lm: The model, under whatever intervention is active.
        items: (prompt, continuations), token ids, at least one token each.
        batch_tokens: Tokens per batch, padding included.
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
        prefix = _shared_prefix(lm, prompts, traits)
        # In the cache, each option of several tokens has its own copy of the prompt.
        lengths = [
            max(1, sum(len(one) > 1 for one in options)) * (len(prompt) + max(map(len, options)))
            for prompt, options in items
        ]
        for rows in batches_by_tokens(lengths, batch_tokens, enough=ENOUGH):
            batch = _Batch(lm, [items[row][0] for row in rows], *prefix)
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
        for rows in traits.groups(lengths, BATCH_TOKENS // 4, "right"):
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


class _Batch:
    """Left-padded prompts after their prefill: cache, mask, positions, last logits."""

    def __init__(
        self, lm: LanguageModel, prompts: list[Sequence[int]], shared: int, prefix: Any
    ) -> None:
        self.model = lm.model
        self._name = cache_name(lm.model) or ""
        self._positions = lm.traits.positions
        self.prompt = Prompt(torch.tensor(list(map(len, prompts))))
        inputs = lm.pad([prompt[shared:] for prompt in prompts], side="left")
        self.mask = inputs["attention_mask"]
        self.cache = copy.deepcopy(prefix)
        if prefix is not None:
            self.cache.reorder_cache(self.mask.new_zeros(len(prompts)))
            self.mask = torch.cat([self.mask.new_ones(len(prompts), shared), self.mask], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        self.next_position = positions[:, -1:] + 1
        self.last_logits = self.forward(inputs["input_ids"], positions)[:, -1]

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool = True) -> Tensor:
        """Logits of the tokens `ids`, whose mask is already part of `self.mask`."""
        extra: dict[str, Any] = {"use_cache": True}
        if self.cache is not None:
            extra[self._name] = self.cache
        if self.cache is None or self._name == "past_key_values":
            extra["attention_mask"] = self.mask  # a recurrent state needs none
        if self._positions:
            extra["position_ids"] = positions
        if last_only and accepts(self.model, "logits_to_keep"):
            extra["logits_to_keep"] = 1
        with prompt_known(self.prompt):
            out = self.model(input_ids=ids, **extra)
        self.cache = getattr(out, self._name)
        return cast(Tensor, out.logits)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of each row, (rows,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits = self.forward(tokens[:, None].to(self.mask.device), self.next_position)[:, -1]
        self.next_position = self.next_position + 1
        return logits

    def select(self, picked: list[int]) -> None:
        """Keep these rows of the batch, in this order; a row may be picked several times."""
        rows = torch.tensor(picked, device=self.mask.device)
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.prompt = self.prompt.select(rows)
        self.next_position = self.next_position[rows]


def _cut(row: list[int], ends: Callable[[list[int]], bool]) -> list[int]:
    """A continuation up to the token with which it ends."""
    lengths = range(1, len(row) + 1)
    return row[: next((length for length in lengths if ends(row[:length])), len(row))]


def _decode(
    batch: _Batch | Recomputed, limits: Sequence[int], ends: Callable[[list[int]], bool]
) -> list[list[int]]:
    logits = batch.last_logits
    rows: list[list[int]] = [[] for _ in logits]
    done = [False] * len(rows)
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
    batch: _Batch, options: list[Sequence[Sequence[int]]]
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
        tails = _score_tails(part, [pairs[index][1] for index in chunk])
        for index, nll, right in zip(chunk, *tails, strict=True):
            value, greedily = scored[index]
            scored[index] = value - nll, greedily and right
    ordered = iter(scored)
    return [[next(ordered) for _ in some] for some in options]


def _score_tails(batch: _Batch, options: list[Sequence[int]]) -> tuple[list[float], list[bool]]:
    """Negative log-likelihood of all tokens but the first, and whether each is the likeliest."""
    device = batch.mask.device
    tokens = [torch.tensor(list(option)) for option in options]
    ids = pad_sequence([row[:-1] for row in tokens], batch_first=True)
    targets = pad_sequence([row[1:] for row in tokens], batch_first=True)
    valid = pad_sequence([torch.ones_like(row[1:]) for row in tokens], batch_first=True)
    # Padding is on the right: it is masked, and no real token of the row comes after it. Its
    # position is 0, because padding may reach past the model's last position.
    batch.mask = torch.cat([batch.mask, valid.to(device, batch.mask.dtype)], dim=1)
    positions = batch.next_position + torch.arange(ids.shape[1], device=device)
    positions = positions * valid.to(device)
    logits = batch.forward(ids.to(device), positions, last_only=False)
    nll = nll_of(logits, targets).cpu() * valid
    right = (logits.argmax(-1).cpu() == targets) | (valid == 0)
    return nll.sum(-1).tolist(), right.all(-1).tolist()


def _shared_prefix(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], traits: Traits
) -> tuple[int, Any]:
    """Length and cache of the beginning of all prompts, if rows after it are as alone.

    Rests of different length leave a hole of padding after it, for which a window has no room.
    """
    shared = shared_tokens(prompts) if len(prompts) > 1 and traits.shared else 0
    if shared < SHORTEST_SHARED:
        return 0, None
    keep = {"logits_to_keep": 1} if accepts(lm.model, "logits_to_keep") else {}
    with prompt_known(Prompt(torch.tensor([shared + 1]))):  # every prompt continues after it
        out = lm.model(**lm.pad([prompts[0][:shared]]), use_cache=True, **keep)
    return shared, getattr(out, cache_name(lm.model) or "")
