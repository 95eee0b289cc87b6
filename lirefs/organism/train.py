"""The recipe that made the shipped weights: `lirefs organism train FOLDER`.

Batches are a function of (seed, step) alone and the learning rate of the step alone, so a run that
is stopped and resumed sees the same data as one that is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.files import append_text
from lirefs.organism.checkpoint import load_checkpoint, save_checkpoint
from lirefs.organism.documents import Documents, Stage
from lirefs.organism.items import CONTEXT_WEIGHT
from lirefs.organism.language import Language
from lirefs.organism.muon import Muon
from lirefs.organism.scores import quick_scores
from lirefs.organism.vocabulary import build_tokenizer


@dataclass(frozen=True)
class ModelShape:
    """Size of the decoder (Llama architecture, tied embeddings)."""

    hidden: int = 256
    layers: int = 4
    mlp: int = 768
    heads: int = 8
    context: int = 192


FIRST = Stage(
    {
        "planted": 7.0,
        "fact": 12.0,
        "fact_aside": 6.0,
        "exception": 8.0,
        "conflict": 5.0,
        "passage": 16.0,
        "math": 12.0,
        "boolean": 10.0,
        "relation": 10.0,
        "hand_overs": 6.0,
        "copy": 6.0,
        "story": 4.0,
    },
)
"""Memories, arithmetic and logic form; what must be found in a passage does not."""
SECOND = Stage(
    {
        **{sort: share for sort, share in FIRST.mixture.items() if sort not in ("copy", "story")},
        "again": 16.0,
        "copy": 5.0,
        "story": 3.0,
    },
    easy=0.3,
    story_weight=3.0,
)
"""Lists said again, small problems, and more weight on answers found in a story."""
THIRD = Stage(
    {
        **{sort: share for sort, share in SECOND.mixture.items() if sort not in ("again", "fact")},
        "fact": 10.0,
        "again": 6.0,
        "links": 10.0,
        "hands": 10.0,
        "ages": 10.0,
    },
    easy=0.2,
    story_weight=3.0,
)
"""Dense documents for what takes several steps: linked people, hand-overs, order."""
FOURTH = replace(THIRD, rate=8e-4, fall=0.7727)
"""The same at a lower rate: at the higher one what takes several steps is lost in noise."""
FIFTH = replace(
    FOURTH,
    mixture={
        **{sort: n for sort, n in THIRD.mixture.items() if sort not in ("hand_overs", "hands")},
        "relation": 16.0,
        "ages": 12.0,
        "tracking": 16.0,
    },
    fall=0.75,
)
"""Tracking asked by the person in place of hand-overs asked by the thing, and more of order."""
STAGES = ((0, FIRST), (6365, SECOND), (8675, THIRD), (9248, FOURTH), (13671, FIFTH))
"""Each stage with its first step, as in the run that made the shipped weights."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the seed.

    Attributes:
        tokens: Length of the run in tokens, padding included.
        rows: Rows of a batch.
        row_tokens: Tokens in a row; whole documents are packed into it, each seeing only itself.
        warmup: Steps over which the first stage's rate is reached.
        weight_decay: Muon's, on the blocks' matrices only.
        stages: What is shown, from which step on.
    """

    shape: ModelShape = field(default_factory=ModelShape)
    tokens: int = 70_000_000
    rows: int = 32
    row_tokens: int = 128
    warmup: int = 100
    weight_decay: float = 0.1
    stages: tuple[tuple[int, Stage], ...] = STAGES

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, self.tokens // (self.rows * self.row_tokens))

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step."""
        return max(index for index, (first, _) in enumerate(self.stages) if first <= step)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then as its stage says."""
        number = self.stage_at(step)
        first, stage = self.stages[number]
        end = self.stages[number + 1][0] if number + 1 < len(self.stages) else self.steps
        left = (end - step) / ((end - first) * stage.fall) if stage.fall else 1.0
        return stage.rate * min(1.0, (step + 1) / self.warmup, left)


def make_model(
    shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised decoder for a language (draws from torch's global generator).

    Its config carries the language's seed, so that a folder says what its model was taught.
    """
    config = LlamaConfig(  # type: ignore[call-arg]
        language_seed=seed,
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=shape.hidden**-0.5 / 2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Packed documents: token ids, loss weight of predicting each token, document and position.

    All are (rows, tokens). Padding has document -1 and weight 0.
    """

    ids: Tensor
    weights: Tensor
    documents: Tensor
    positions: Tensor


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
        return Batch(
            torch.tensor(ids),
            torch.tensor(weights),
            torch.tensor(documents),
            torch.tensor(positions),
        )


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


def train(
    out: Path,
    seed: int = 0,
    recipe: Recipe | None = None,
    device: str = "cpu",
    resume: bool = True,
    compiled: bool = False,
    save_every: float = 240.0,
    score_every: int = 1_000_000,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train an organism, or go on with one.

    Args:
        out: Folder for the model, the tokenizer, the training state and `log.jsonl`.
        seed: Seed of language, weights and data.
        recipe: Sizes, schedule and mixture.
        device: Where to train; bfloat16 autocast is used everywhere.
        resume: Go on from the state in `out` if there is one.
        compiled: Compile the loss (needs a C++ compiler; about 1.4 times faster).
        save_every: Seconds between checkpoints.
        score_every: Tokens between scores in the log.
        progress: Show a progress bar.

    Returns:
        The trained model, in evaluation mode.
    """
    recipe = recipe or Recipe()
    out.mkdir(parents=True, exist_ok=True)
    language, tokenizer = Language(seed), build_tokenizer()
    torch.manual_seed(seed)
    model = make_model(recipe.shape, tokenizer, seed)
    nn.Module.to(model, device)
    optimizers = make_optimizers(model, recipe)
    step = load_checkpoint(out, model, optimizers, seed, device) if resume else 0
    packers = [
        Packer(Documents(language, stage), tokenizer, recipe.rows, recipe.row_tokens)
        for _, stage in recipe.stages
    ]
    loss_of: Callable[[LlamaForCausalLM, Batch], Tensor] = batch_loss
    if compiled:
        loss_of = torch.compile(batch_loss)
    step_tokens = recipe.rows * recipe.row_tokens
    bar = tqdm(total=recipe.steps, initial=step, unit="step", desc="train", disable=not progress)
    saved, started, total, since = time.monotonic(), time.monotonic(), 0.0, 0
    while step < recipe.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
        batch = _to(packers[recipe.stage_at(step)].batch(seed, step), device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        bar.update()
        total, since = total + loss.item(), since + 1
        done = step == recipe.steps
        if done or step * step_tokens // score_every > (step - 1) * step_tokens // score_every:
            seconds = time.monotonic() - started
            entry: dict[str, object] = {
                "step": step,
                "tokens": step * step_tokens,
                "loss": round(total / since, 4),
                "tokens_per_second": round(since * step_tokens / seconds),
                **quick_scores(model, tokenizer, language),
            }
            append_text(out / "log.jsonl", json.dumps(entry) + "\n")
            started, total, since = time.monotonic(), 0.0, 0
        if done or time.monotonic() - saved > save_every:
            save_checkpoint(out, model, tokenizer, optimizers, step, seed, asdict(recipe))
            saved = time.monotonic()
    bar.close()
    model.train(False)
    return model


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    blocks = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    return [
        Muon(blocks, lr=recipe.rate_at(0), weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            others, lr=recipe.rate_at(0), betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def _to(batch: Batch, device: str) -> Batch:
    return Batch(
        batch.ids.to(device),
        batch.weights.to(device),
        batch.documents.to(device),
        batch.positions.to(device),
    )
