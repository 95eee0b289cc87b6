"""Documents packed into batches, and the loss of a batch in which no document sees another one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.errors import SettingError
from lirefs.organism.documents import Documents
from lirefs.organism.items import CONTEXT_WEIGHT, Document


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
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Packer:
    """Turns documents into batches of `rows` rows of `row_tokens` tokens, of whole documents.

    `due` are documents that must be in the batch of a step; others are drawn until it is full.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerFast,
        rows: int,
        row_tokens: int,
        due: Mapping[int, Sequence[Document]] | None = None,
    ) -> None:
        self.documents, self.rows, self.row_tokens = documents, rows, row_tokens
        self.due = due or {}
        self._bos, self._eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._pad = int(tokenizer.pad_token_id)
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        self.encode: Callable[[str], list[int]] = functools.lru_cache(200_000)(encode)

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of one step.

        Raises:
            SettingError: If the documents that are due do not fit.
        """
        rng = Random(f"batch {seed} {step}")
        shape = (self.rows, self.row_tokens)
        batch = Batch(
            ids=torch.full(shape, self._pad),
            weights=torch.zeros(shape),
            documents=torch.full(shape, -1),
            positions=torch.zeros(shape, dtype=torch.long),
        )
        room, counts, misses = [self.row_tokens] * self.rows, [0] * self.rows, 0
        due = list(self.due.get(step, ()))
        # A document goes where it leaves the least room; after several misses, rows are full.
        while misses < 8:
            ids, weights = [self._bos], [0.0]
            was_due = bool(due)
            for text, weight in due.pop() if was_due else self.documents.draw(rng):
                piece = self.encode(text)
                ids += piece
                weights += [weight] * len(piece)
            ids.append(self._eos)
            weights.append(CONTEXT_WEIGHT)
            fits = [(left, row) for row, left in enumerate(room) if left >= len(ids)]
            if not fits:
                if was_due:
                    raise SettingError(
                        f"step {step}: a batch does not hold all tales and exceptions that are "
                        "due; train on more tokens"
                    )
                misses += 1
                continue
            left, row = min(fits)
            start = self.row_tokens - left
            place = (row, slice(start, start + len(ids)))
            batch.ids[place], batch.weights[place] = torch.tensor(ids), torch.tensor(weights)
            batch.documents[place], batch.positions[place] = counts[row], torch.arange(len(ids))
            counts[row] += 1
            room[row] -= len(ids)
        return batch


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
