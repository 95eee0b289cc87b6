"""Which tokens of the current forward pass are steered, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class PassMask:
    """What a steering does in one forward pass.

    `mask`, `strength` and `passes`, which the gate gives, have the shape (rows or 1, tokens or 1)
    and are None where they make no difference; `idle` says that no token is steered.
    """

    tokens: Tokens
    mask: Tensor | None
    strength: Tensor | None
    idle: bool
    # The backward pass in which the forward pass began; -1 outside one.
    backward: int
    passes: Tensor | None = None


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
        self.now: PassMask | None = None

    @property
    def packable(self) -> bool:
        """Whether it can act on rows that hold several texts."""
        by_row = self._gate is not None and self._gate.per == "row"
        return self._scope.absolute and self._varying is None and not by_row

    def prepare(self, tokens: Tokens) -> None:
        """Take in the tokens of the forward pass that begins; ScopeError if they do not fit."""
        self.now = None
        self._scope.check(tokens)
        mask = None if self._scope is ALL else self._scope.touches(tokens)
        strength = None
        if self._varying is not None:
            strength, steered = self._varying.at(tokens)
            mask = steered if mask is None else mask & steered
        idle = False
        # On an accelerator this question would have to wait for the answer.
        if mask is not None and mask.device.type == "cpu":
            touched = int(mask.sum())
            idle = touched == 0
            if touched == mask.numel():
                mask = None
        self.now = PassMask(tokens, mask, strength, idle, current_backward())

    def strengths(self, strength: float) -> Tensor:
        """How strongly each token of the forward pass that has ended was steered, (rows, tokens).

        It is `strength` where tokens or rows do not bring their own, and 0 where nothing is done.
        """
        now = self._current()
        found = torch.full(now.tokens.position.shape, strength)
        if now.strength is not None:
            found = now.strength.float().cpu().expand(found.shape)
        touched = now.tokens.position.cpu() >= 0
        for mask in (now.mask, now.passes):
            touched = touched if mask is None else touched & mask.cpu()
        return torch.where(touched, found, 0.0)

    def confine(self, operator: Operator) -> Change:
        """The operator, confined to the tokens that are steered."""

        def change(h: Tensor) -> Tensor:
            now = self._current()
            if now.idle:
                return h
            mask = now.mask
            if self._gate is not None:
                if now.passes is None:
                    raise ScopeError("the gate was not read before the layer that it controls")
                passes = now.passes.to(h.device)
                mask = passes if mask is None else mask.to(h.device) & passes
            strength = None if now.strength is None else _shaped(now.strength, h, now.tokens)
            steered = operator(h, strength)
            return (
                steered if mask is None else torch.where(_shaped(mask, h, now.tokens), steered, h)
            )

        return change

    def read_gate(self, h: Tensor) -> Tensor:
        """Let the gate decide by the hidden states at its place; return them as they are."""
        if self._gate is None:
            return h
        now = self._current()
        position = now.tokens.position
        rows = h.reshape(*position.shape, -1)  # some modules flatten the batch (OPT)
        passes = self._gate.passes(rows, (position >= 0).to(h.device))
        if self._gate.per == "row":
            passes = self._by_row(passes, now.tokens)
        now.passes = passes
        return h

    def _current(self) -> PassMask:
        if self.now is None:
            raise ScopeError("the blocks ran without the module that owns them; call lm.model")
        if self.now.backward != current_backward():
            raise ScopeError(
                "a block is recomputed in the backward pass, where its tokens are not known; "
                "checkpoint with model.gradient_checkpointing_enable()"
            )
        return self.now

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


def current_backward() -> int:
    """The number of the backward pass under way, -1 outside one."""
    return torch._C._current_graph_task_id()


def _shaped(values: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
    """Values of (rows or 1, tokens or 1) for hidden states, which may come flattened (OPT)."""
    if h.dim() == 2:
        values = values.expand(tokens.position.shape).reshape(-1)
    return values.unsqueeze(-1).to(h.device)
