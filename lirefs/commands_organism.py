"""Commands that make a model organism and say what it knows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lirefs.builtin import organism
from lirefs.errors import ModelLoadError, SettingError
from lirefs.organism.card import ship
from lirefs.organism.items import SPLITS, Split
from lirefs.organism.language import Language
from lirefs.organism.scores import scores
from lirefs.organism.train import Recipe
from lirefs.organism.train import train as train_organism
from lirefs.organism.vocabulary import build_tokenizer

app = typer.Typer(no_args_is_help=True, help="The model organism: train one, score one.")


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder of the run; an interrupted one goes on.")],
    seed: Annotated[int, typer.Option(help="Seed of language, weights and data.")] = 0,
    tokens: Annotated[int, typer.Option(help="Length of the run.")] = Recipe.tokens,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the loss (needs a C++ compiler).")
    ] = False,
) -> None:
    """Train an organism by the recipe of the shipped one; `OUT/shipped` is what would be shipped.

    `OUT/log.jsonl` has loss and validation scores of every million tokens.
    """
    if out.exists() and not out.is_dir():
        raise SettingError(f"{out}: exists and is not a folder")
    recipe = Recipe(tokens=tokens)
    model = train_organism(out, seed, recipe, device, compiled=compiled)
    tokenizer = build_tokenizer()
    found = ship(out / "shipped", model.cpu(), tokenizer, Language(seed), asdict(recipe))
    Console().print_json(json.dumps(found))


@app.command("scores")
def scores_command(
    folder: Annotated[Path | None, typer.Argument(help="Default: the shipped organism.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of its language.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Print the share of items answered as expected, by kind, and the perplexity, as JSON."""
    side: Split | None = next((one for one in SPLITS if one == split), None)
    if side is None:
        raise SettingError(f"--split {split!r}: expected one of {', '.join(SPLITS)}")
    from transformers import LlamaForCausalLM

    place = organism() if folder is None else folder
    if not (place / "config.json").is_file():
        raise ModelLoadError(f"{place}: no config.json in it; give the folder of an organism")
    model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
    found = scores(model, build_tokenizer(), Language(seed), side)
    Console().print_json(json.dumps(found))
