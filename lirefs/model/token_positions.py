"""Positions of the tokens of a forward pass, in their row and from the end of the prompt."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lirefs.errors import ScopeError
from lirefs.model.prompts import Prompt, expand_to_rows


class Tokens:
    """The tokens of one forward pass.

    `position` is the index of each in its unpadded row, (rows, tokens), -1 for padding. In a
    `packed` row, which holds several texts, it is the index in the text.
    """

    def __init__(
        self,
        position: Tensor,
        past: int | Tensor,
        prompt: Prompt | None,
        *,
        begins: bool,
        packed: bool = False,
        cacheless: bool = False,
    ) -> None:
        self.position = position
        self.known_prompt = prompt
        self.past = past
        self._begins = begins
        self._cacheless = cacheless
        self.packed = packed
        if prompt is not None and prompt.ages is not None:
            # Its mask knows the padding on either side, under any cache.
            self.position = self.age + self._lengths(prompt)

    @functools.cached_property
    def age(self) -> Tensor:
        """Index among the generated tokens, (rows or 1, tokens); negative inside the prompt."""
        prompt = self.prompt
        if prompt.width is None:
            return self.position - self._lengths(prompt)
        rows, width = self.position.shape
        columns = torch.arange(width, device=self.position.device) + self.past
        new = (columns - prompt.width).unsqueeze(0)
        if prompt.ages is None:
            return new
        prompt.ages = prompt.ages.to(self.position.device)
        old = expand_to_rows(prompt.ages, rows)[:, columns.clamp(max=prompt.width - 1)]
        return torch.where(new < 0, old, new)

    def _lengths(self, prompt: Prompt) -> Tensor:
        """Tokens of the prompt of each row, (rows, 1)."""
        prompt.lengths = prompt.lengths.to(self.position.device)
        return expand_to_rows(prompt.lengths, self.position.shape[0]).unsqueeze(1)

    @property
    def prompts(self) -> int | None:
        """Number of prompts in the batch (beams share one), None if unknown."""
        self._refuse_packed()
        known = self.known_prompt
        if known is None:
            return None
        # Outside `generate`, one length may have been given for all rows.
        alone = len(known.lengths) == 1 and known.width is None and len(self.position) > 1
        return None if alone else len(known.lengths)

    @functools.cached_property
    def prompt(self) -> Prompt:
        """What is known of the prompt; ScopeError if it is unknown where it ends."""
        self._refuse_packed()
        known = self.known_prompt
        if known is None:
            raise ScopeError(
                "this forward pass continues a cache, and it is unknown where its prompt ends; "
                "wrap the calls in lirefs.prompt_lengths([...])"
            )
        if not known.explicit and not self._begins and self.position.shape[1] > 1:
            raise ScopeError(
                "several tokens follow a cache, so they may be the rest of a prompt or generated "
                "text; wrap the calls in lirefs.prompt_lengths([...])"
            )
        if not known.explicit and self._cacheless and _is_generating():
            raise ScopeError(
                "generate(use_cache=False) gives the whole text again for each new token, and the "
                "model that generates is not the steered one, so it is unknown where the prompt "
                "ends; attach the steering to the model whose generate is called"
            )
        return known

    def _refuse_packed(self) -> None:
        if self.packed:
            raise ScopeError(
                "the position ids restart inside a row, so it holds several texts; prompts, rows "
                "and generated tokens cannot be told apart there: give each text its own row"
            )


@dataclass
class Cached:
    """What is known of a cache after a forward pass."""

    # Where its prompt ends, if the cache began with it.
    prompt: Prompt | None
    # Columns it holds, padding included; a tensor for a static cache.
    columns: int | Tensor
    # Positions of the tokens of the pass, (rows, tokens).
    position: Tensor


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments, or the attributes of the output, of a forward pass."""
    names = ("past_key_values", "cache_params", "state")
    return next((given[name] for name in names if given.get(name) is not None), None)


def anchor_of(cache: Any) -> Any:
    """The object that stays the same from pass to pass; None without a cache.

    RWKV's state is a list of tensors that are changed in place.
    """
    if isinstance(cache, Mapping):
        cache = list(cache.values())
    if isinstance(cache, list | tuple):
        return anchor_of(cache[0]) if cache else None
    return cache


def cached_columns(cache: Any) -> int | Tensor | None:
    """How many columns a cache holds, padding included; None if it does not say."""
    if cache is None:
        return 0
    for name in ("seqlen_offset", "get_seq_length"):  # xLSTM's, all others'
        found = getattr(cache, name, None)
        try:
            found = found() if callable(found) else found
        except ValueError:  # no layer with attention
            found = 0
        if isinstance(found, Tensor):
            return found.clone()  # a static cache keeps counting in place
        if found:
            return int(found)
    # A layer with a recurrent state counts nothing, and it may be the one that was asked.
    layers = getattr(cache, "layers", None)
    if layers is None:
        return 0 if hasattr(cache, "get_seq_length") else None
    lengths = [one.get_seq_length() for one in layers if hasattr(one, "get_seq_length")]
    longest = max(map(int, lengths), default=0)
    return longest or (None if any(map(_has_state, layers)) else 0)


def _has_state(layer: Any) -> bool:
    state = getattr(layer, "has_previous_state", False)
    return any(state.values()) if isinstance(state, dict) else bool(state)


def read_tokens(
    given: Mapping[str, Any], source: Tensor, known: Cached | None, prompt: Prompt | None
) -> Tokens:
    """The tokens of a forward pass.

    Args:
        given: Arguments of the forward pass, by name.
        source: What it reads, (rows, tokens, ...).
        known: What is known of its cache.
        prompt: Where the prompt ends, if the caller has said so.

    Raises:
        ScopeError: The cache does not say how many tokens it holds.
    """
    rows, width = source.shape[:2]
    cache, mask = cache_of(given), given.get("attention_mask")
    flat = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    start = 0 if flat is None else flat.shape[1] - width
    past = cached_columns(cache)
    if past is None and known is not None:
        past = known.columns
    if cache is None or (past is None and start):
        past = start  # states may be kept inside the modules; a mask counts them
    if past is None:
        raise ScopeError(
            f"this forward pass continues a cache ({type(cache).__name__}) that does not count its "
            "tokens, and began before the steering; attach the steering before the prompt, or give "
            "an attention_mask for all tokens so far"
        )
    if start and start != past:  # a mask as long as a static cache
        start = min(int(past), start)
    new = torch.arange(width, device=source.device)
    behind = known is not None and isinstance(past, int) and past and past == known.columns
    if prompt is not None and prompt.follows is not None:
        following = prompt.follows.to(source.device) + new
    elif known is not None and behind and not start:
        # Behind a prompt that was padded, or whose positions did not begin at 0. A mask of all
        # tokens says so itself, also where rows of the cache were dropped since.
        before = expand_to_rows(known.position.to(source.device).amax(dim=1, keepdim=True), rows)
        following = before + 1 + new
    else:
        following = (new + past).expand(rows, width)
    masked = None
    if flat is not None:
        masked = _numbered(flat)[:, start : start + width]
        if bool(past) and flat.shape[1] == width:  # a mask of the new tokens alone
            masked = torch.where(masked < 0, masked, masked + following[:, :1])
    ids = _text_positions(given.get("position_ids"), rows, width)
    packed = ids is not None and getattr(prompt, "width", None) is None and _restarts(ids, masked)
    if masked is not None:
        position = masked if ids is None or not packed else torch.where(masked < 0, masked, ids)
    elif ids is not None:
        # `generate` under a static cache: its mask has four axes, but these know the padding, which
        # may have position 0 here. That is harmless, as no token attends to it.
        position = ids
    else:
        position = _seen_positions(mask, rows, width, following)
    begins = False
    if prompt is None and not bool(past):
        prompt, begins = Prompt(position.amax(dim=1) + 1, explicit=False), True
    elif prompt is None and known is not None:
        prompt = known.prompt
    cacheless = given.get("use_cache") is False
    return Tokens(position, past, prompt, begins=begins, packed=packed, cacheless=cacheless)


def _is_generating() -> bool:
    """Whether `generate` of transformers is what called, from however far."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        where = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "generate" and where.startswith("transformers.generation."):
            return True
        frame = frame.f_back
    return False


def prompt_columns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of prompts, (rows,), and ages of their columns, from a mask (rows, columns)."""
    position = _numbered(mask)
    lengths = position.amax(dim=1) + 1
    return lengths, position - lengths.unsqueeze(1)


def _text_positions(ids: Any, rows: int, width: int) -> Tensor | None:
    """Position ids that count tokens, (rows, width), if there are any."""
    if isinstance(ids, Tensor) and ids.dim() == 3 and ids.shape[0] == 4:
        ids = ids[0]  # Qwen2-VL: the position in the text, before its three axes
    return ids.expand(rows, width) if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _seen_positions(mask: Any, rows: int, width: int, following: Tensor) -> Tensor:
    """Positions by the number of tokens that each one attends to; `following` without a mask."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        return (seen.sum(dim=-1) - 1).expand(rows, width)
    return following


def _restarts(ids: Tensor, masked: Tensor | None) -> bool:
    """Whether position ids, (rows, tokens), go back inside a row, other than at padding."""
    back = ids[:, 1:] < ids[:, :-1]
    if masked is not None:
        back = back & (masked[:, 1:] >= 0) & (masked[:, :-1] >= 0)
    return ids.shape[1] > 1 and bool(back.any())


def _numbered(mask: Tensor) -> Tensor:
    """Index of each real token in its row, -1 for padding: the shape of the mask."""
    real = mask != 0
    return (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
