"""A batch of prompts with its cache; the beginning that prompts share is computed once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lirefs.model.guest import accepts
from lirefs.model.language_model import LanguageModel
from lirefs.model.prompts import Prompt, prompt_known
from lirefs.model.traits import Traits, cache_name
from lirefs.tasks.batches.lower_blocks import begun_above
from lirefs.tasks.batches.recomputed import nll_of
from lirefs.tasks.items import grouped_by_beginning, shared_tokens

# A prefix shorter than this costs more to copy into every batch than to compute again.
SHORTEST_SHARED = 8
# A group of prompts with a longer beginning of its own has to save this many tokens for each of its
# forward passes: a pass of few tokens takes hardly less time than one of so many.
SAVED = 256


class Batch:
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
        if prefix is not None:
            self.mask = torch.cat([self.mask.new_ones(len(prompts), shared), self.mask], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        self.next_position = positions[:, -1:] + 1

        def run() -> Any:
            cache = copy.deepcopy(prefix)
            if prefix is not None:
                cache.reorder_cache(self.mask.new_zeros(len(prompts)))
            return self._passed(inputs["input_ids"], positions, cache)

        decisive = [torch.tensor(prompts[0][:shared]), inputs["input_ids"], self.mask]
        out = begun_above(self.model, run, decisive, shared > 0)
        self.cache, self.last_logits = getattr(out, self._name), out.logits[:, -1]

    def _passed(self, ids: Tensor, positions: Tensor, cache: Any, last_only: bool = True) -> Any:
        """What the model returns for the tokens `ids`, whose mask is already in `self.mask`."""
        extra: dict[str, Any] = {"use_cache": True}
        if cache is not None:
            extra[self._name] = cache
        if cache is None or self._name == "past_key_values":
            extra["attention_mask"] = self.mask  # a recurrent state needs none
        if self._positions:
            extra["position_ids"] = positions
        if last_only and accepts(self.model, "logits_to_keep"):
            extra["logits_to_keep"] = 1
        with prompt_known(self.prompt):
            return self.model(input_ids=ids, **extra)

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool = True) -> Tensor:
        """Logits of the tokens `ids` after what is cached."""
        self.prompt.follows = self.next_position
        out = self._passed(ids, positions, self.cache, last_only)
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


def by_beginning(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], traits: Traits, passes: int = 1
) -> Iterator[tuple[list[int], tuple[int, Any]]]:
    """Rows of prompts that share a beginning, and its length and cache; the longest come first.

    `passes` follow after that beginning: as many as tokens are generated.
    """
    groups = [list(range(len(prompts)))] if prompts else []
    if traits.shared:
        groups = grouped_by_beginning(prompts, SHORTEST_SHARED, SAVED * passes)
    for rows in sorted(groups, key=lambda rows: -max(len(prompts[row]) for row in rows)):
        yield rows, shared_prefix(lm, [prompts[row] for row in rows], traits)


def shared_prefix(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], traits: Traits
) -> tuple[int, Any]:
    """Length and cache of the beginning of all prompts, if rows after it are as alone.

    Rests of different length leave a hole of padding after it, for which a window has no room.
    """
    shared = shared_tokens(prompts) if len(prompts) > 1 and traits.shared else 0
    if shared < SHORTEST_SHARED:
        return 0, None
    keep = {"logits_to_keep": 1} if accepts(lm.model, "logits_to_keep") else {}
    inputs = lm.pad([prompts[0][:shared]])
    with prompt_known(Prompt(torch.tensor([shared + 1]))):  # every prompt continues after it
        run = partial(lm.model, **inputs, use_cache=True, **keep)
        out = begun_above(lm.model, run, list(inputs.values()))
    return shared, getattr(out, cache_name(lm.model) or "")


def score_tails(batch: Batch, options: list[Sequence[int]]) -> tuple[list[float], list[bool]]:
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
