"""Positions of the tokens of a forward pass, in their row and from the end of the prompt."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lirefs.errors import ScopeError
from lirefs.model.prompts import Prompt, expand_to_rows


class Tokens:
    """The tokens of one forward pass.

    `position` is the index of each in its unpadded row, (rows, tokens), -1 for padding.
    """

    def __init__(
        self, position: Tensor, past: int | Tensor, prompt: Prompt | None, begins: bool
    ) -> None:
        self.position = position
        self.known_prompt = prompt
        self._past = past
        self._begins = begins
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
        columns = torch.arange(width, device=self.position.device) + self._past
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
        known = self.known_prompt
        if known is None:
            return None
        # Outside `generate`, one length may have been given for all rows.
        alone = len(known.lengths) == 1 and known.width is None and len(self.position) > 1
        return None if alone else len(known.lengths)

    @functools.cached_property
    def prompt(self) -> Prompt:
        """What is known of the prompt; ScopeError if it is unknown where it ends."""
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
        return known
