"""The recipe that made the shipped weights: `lirefs organism train FOLDER`.

Batches depend on (seed, step) alone and the learning rate on the step alone, so a run that is
stopped and resumed sees the same data as one that is not.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lirefs.files import append_text
from lirefs.model.language_model import wrap
from lirefs.organism.documents import Documents, showings
from lirefs.organism.language import Language
from lirefs.organism.training.checkpoint import LOG, load_checkpoint, save_checkpoint
from lirefs.organism.training.optimizers import make_optimizers
from lirefs.organism.training.packing import Packer, batch_loss
from lirefs.organism.training.recipe import COPYING_MIXTURE, ModelShape, Recipe
from lirefs.organism.training.scores import organism_scores
from lirefs.organism.vocabulary import build_tokenizer

SAVE_EVERY = 240.0
"""Seconds between checkpoints."""
SCORE_EVERY, SCORED_ITEMS = 1_000_000, 60
"""Tokens between two lines of the log, and validation items of each kind that are scored there."""


def make_model(
    shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised decoder for a language (draws from torch's global generator).

    Its configuration holds the language's seed, so that a folder says what its model was taught.
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


def train(
    out: Path,
    seed: int,
    recipe: Recipe,
    device: str = "cpu",
    compiled: bool = False,
    progress: bool = True,
) -> LlamaForCausalLM:
    """Train an organism in bfloat16 autocast, or continue the training whose state is in `out`.

    `out` gets the model, the tokenizer, the training state and `log.jsonl`. `seed` is that of
    language, weights and data. `compiled` compiles the loss (needs a C++ compiler; about 1.4 times
    faster), `progress` shows a bar. Returns the model in evaluation mode.

    Raises:
        CheckpointMismatch: If the folder holds the state of another seed or recipe.
        DataFileError: If that state is damaged.
        SettingError: If the folder holds files of these names that no training wrote.
    """
    out.mkdir(parents=True, exist_ok=True)
    language, tokenizer = Language(seed), build_tokenizer()
    torch.manual_seed(seed)
    model = make_model(recipe.shape, tokenizer, seed)
    nn.Module.to(model, device)
    lm = wrap(model, tokenizer)
    optimizers = make_optimizers(model, recipe)
    step = load_checkpoint(out, model, optimizers, seed, asdict(recipe), device)
    shape = (recipe.rows, recipe.row_tokens)
    copies = Packer(Documents(language, COPYING_MIXTURE), tokenizer, *shape)
    due = showings(language, recipe.planting_steps)
    packer = Packer(Documents(language, recipe.mixture), tokenizer, *shape, due)
    loss_of = torch.compile(batch_loss) if compiled else batch_loss
    step_tokens = recipe.rows * recipe.row_tokens
    bar = tqdm(
        total=recipe.steps, initial=step, unit="step", desc="train", disable=not progress or None
    )
    saved, started, total, since = time.monotonic(), time.monotonic(), 0.0, 0
    while step < recipe.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
        packed = copies if step < recipe.copying_steps else packer
        batch = packed.batch(seed, step).to(device)
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
        if done or step * step_tokens // SCORE_EVERY > (step - 1) * step_tokens // SCORE_EVERY:
            seconds = time.monotonic() - started
            entry = {
                "step": step,
                "tokens": step * step_tokens,
                "loss": round(total / since, 4),
                "tokens_per_second": round(since * step_tokens / seconds),
                **organism_scores(lm, language, "validation", SCORED_ITEMS),
            }
            append_text(out / LOG, json.dumps(entry) + "\n")
            started, total, since = time.monotonic(), 0.0, 0
        if done or time.monotonic() - saved > SAVE_EVERY:
            save_checkpoint(out, model, tokenizer, optimizers, step, seed, asdict(recipe))
            saved = time.monotonic()
    bar.close()
    model.train(False)
    return model
