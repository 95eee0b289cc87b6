"""Documents packed into batches, and the loss of a batch in which no document sees another one."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.organism.documents import Documents
from lirefs.organism.items import CONTEXT_WEIGHT


@dataclass(frozen=True)
class Batch:
    """Packed documents: token ids, loss weight of predicting each token, document and position.

    All are (rows, tokens). Padding has document -1 and weight 0.
    """

    ids: Tensor
    weights: Tensor
    documents: Tensor
    positions: Tensor

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        parts = (self.ids, self.weights, self.documents, self.positions)
        return Batch(*(one.to(device) for one in parts))


class Packer:
    """Turns documents into batches, whole documents side by side in a row.

    Args:
        documents: What is shown.
        tokenizer: The language's tokenizer.
        rows: Rows of a batch.
        row_tokens: Tokens in a row.
    """

    def __init__(
        self, documents: Documents, tokenizer: PreTrainedTokenizerFast, rows: int, row_tokens: int
    ) -> None:
        self.documents, self.rows, self.row_tokens = documents, rows, row_tokens
        self._bos, self._eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text; short pieces are remembered."""
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of one step."""
        rng = Random(f"batch {seed} {step}")
        rows: list[list[tuple[list[int], list[float]]]] = [[] for _ in range(self.rows)]
        room = [self.row_tokens] * self.rows
        misses = 0
        # A document goes where it leaves least room; full means that several fit nowhere.
        while misses < 8:
            ids, weights = [self._bos], [0.0]
            for text, weight in self.documents.draw(rng):
                piece = self.encode(text)
                ids += piece
                weights += [weight] * len(piece)
            ids.append(self._eos)
            weights.append(CONTEXT_WEIGHT)
            fits = [(left, row) for row, left in enumerate(room) if left >= len(ids)]
            if not fits:
                misses += 1
                continue
            row = min(fits)[1]
            rows[row].append((ids, weights))
            room[row] -= len(ids)
        return self._tensors(rows)

    def _tensors(self, rows: list[list[tuple[list[int], list[float]]]]) -> Batch:
        ids, weights, documents, positions = [], [], [], []
        for row in rows:
            left = self.row_tokens - sum(len(tokens) for tokens, _ in row)
            ids.append([t for tokens, _ in row for t in tokens] + [self._pad] * left)
            weights.append([w for _, own in row for w in own] + [0.0] * left)
            marks = [number for number, (tokens, _) in enumerate(row) for _ in tokens]
            documents.append(marks + [-1] * left)
            positions.append([p for tokens, _ in row for p in range(len(tokens))] + [0] * left)
        return Batch(*map(torch.tensor, (ids, weights, documents, positions)))


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy; no document sees another one."""
    same = batch.documents[:, :, None] == batch.documents[:, None, :]
    mask = torch.zeros(same.shape, dtype=torch.bfloat16, device=same.device)
    mask = mask.masked_fill(~same.tril(), torch.finfo(torch.bfloat16).min)[:, None]
    hidden = model.model(
        batch.ids, attention_mask=mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()
