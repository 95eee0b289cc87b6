"""Which tokens of the current forward pass are steered, and how strongly."""

from __future__ import annotations

import torch
from torch import Tensor

from lirefs.errors import ScopeError
from lirefs.model.prompts import expand_to_rows
from lirefs.model.token_positions import Tokens
from lirefs.steering.gate import Gate
from lirefs.steering.hook_chain import Change
from lirefs.steering.operators import Operator
from lirefs.steering.scope import ALL, Scope
from lirefs.steering.strength import RowStrengths, Schedule


class TokenMask:
    """Scope, gate and strengths by token of one attached steering.

    `prepare` runs before each forward pass and computes once what all its places share.
    """

    def __init__(
        self, scope: Scope, varying: RowStrengths | Schedule | None, gate: Gate | None
    ) -> None:
        self._scope = scope
        self._varying = varying
        self._gate = gate
        self._tokens: Tokens | None = None
        # All three of shape (rows or 1, tokens or 1); None where they make no difference.
        self._mask: Tensor | None = None
        self._strength: Tensor | None = None
        self._passes: Tensor | None = None
        self._idle = False

    def prepare(self, tokens: Tokens) -> None:
        """Take in the tokens of the forward pass that begins; ScopeError if they do not fit."""
        self._tokens, self._passes = tokens, None
        self._scope.check(tokens)
        mask = None if self._scope is ALL else self._scope.touches(tokens)
        if self._varying is not None:
            self._strength, steered = self._varying.at(tokens)
            mask = steered if mask is None else mask & steered
        self._mask, self._idle = mask, False
        # On an accelerator this question would have to wait for the answer.
        if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            touched = int(mask.sum())
            self._idle = touched == 0
            if touched == mask.numel():
                self._mask = None

    def confine(self, operator: Operator) -> Change:
        """The operator, confined to the tokens that are steered."""

        def change(h: Tensor) -> Tensor:
            if self._tokens is None:
                raise ScopeError("the blocks ran without the module that owns them; call lm.model")
            if self._idle:
                return h
            mask = self._mask
            if self._gate is not None:
                if self._passes is None:
                    raise ScopeError("the gate was not read before the layer that it controls")
                passes = self._passes.to(h.device)
                mask = passes if mask is None else mask.to(h.device) & passes
            strength = self._strength
            steered = operator(h, None if strength is None else self._shaped(strength, h))
            return steered if mask is None else torch.where(self._shaped(mask, h), steered, h)

        return change

    def read_gate(self, h: Tensor) -> Tensor:
        """Let the gate decide by the hidden states at its place; return them as they are."""
        if self._gate is None or self._tokens is None:
            return h
        position = self._tokens.position
        rows = h.reshape(*position.shape, -1)  # some modules flatten the batch (OPT)
        passes = self._gate.passes(rows, (position >= 0).to(h.device))
        if self._gate.per == "row":
            passes = self._by_row(passes, self._tokens)
        self._passes = passes
        return h

    def _by_row(self, passes: Tensor, tokens: Tokens) -> Tensor:
        """The decision of the last token of each prompt, for it and the tokens after it."""
        age = tokens.age.to(passes.device)
        last = (age == -1).expand(passes.shape)
        decided, now = (last & passes).any(dim=1), last.any(dim=1)
        before = tokens.prompt.decisions.get(self)
        if before is not None:
            decided = torch.where(now, decided, expand_to_rows(before, len(decided)))
        tokens.prompt.decisions[self] = decided
        return decided.unsqueeze(1) & (age >= -1)

    def _shaped(self, values: Tensor, h: Tensor) -> Tensor:
        """Values of (rows or 1, tokens or 1) for hidden states, which may come flattened (OPT)."""
        if h.dim() == 2 and self._tokens is not None:
            values = values.expand(self._tokens.position.shape).reshape(-1)
        return values.unsqueeze(-1).to(h.device)
