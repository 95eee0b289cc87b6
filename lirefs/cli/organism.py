"""`lirefs organism`: train a model organism, score it, write its texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from typer import Argument, Option

import lirefs
from lirefs.cli.options import (
    Force,
    Json,
    Quiet,
    choice_option,
    device_option,
    folder_to_write,
    keep_finished,
    print_result,
    say_on_console,
)
from lirefs.errors import ModelLoadError
from lirefs.files import atomic_write_text
from lirefs.main_job.console import console_table
from lirefs.organism.items import SIDES, Side
from lirefs.organism.training.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="The model organism: train one, score one.")


@app.command("train")
def train_command(
    out: Annotated[
        Path,
        Argument(
            help="Folder of the run; an interrupted one is continued.", callback=folder_to_write
        ),
    ],
    seed: Annotated[int, Option(min=0, help="Seed of language, weights and data.")] = 0,
    tokens: Annotated[int, Option(min=1, help="Length of the run.")] = Recipe.tokens,
    device: Annotated[str, Option(help="Where to train.", callback=device_option)] = "cpu",
    compiled: Annotated[
        bool, Option("--compile", help="Compile the loss (needs a C++ compiler).")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an organism by the recipe of the shipped one; the result is in `OUT/shipped`.

    `OUT/log.jsonl` has loss and validation scores of every million tokens.
    """
    from lirefs.organism.language import Language
    from lirefs.organism.training.card import ship_organism
    from lirefs.organism.training.train import train as train_organism
    from lirefs.organism.vocabulary import build_tokenizer

    keep_finished(
        out / "shipped" / "config.json",
        force,
        '"language_seed"',
        ["README.md", "scores.json", "model.safetensors", "tokenizer.json"],
    )
    recipe = Recipe(tokens=tokens)
    model = train_organism(out, seed, recipe, device, compiled=compiled, progress=not quiet)
    tokenizer = build_tokenizer()
    found = ship_organism(out / "shipped", model.cpu(), tokenizer, Language(seed), asdict(recipe))
    print_result(found, _scores_table(found), as_json)
    say_on_console(f"organism: {out / 'shipped'}")


@app.command("scores")
def scores_command(
    folder: Annotated[
        str, Argument(help="Folder of an organism. Default: the shipped one.")
    ] = "organism",
    split: Annotated[str, Option(help="train, validation or test.")] = "test",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the share of items answered as expected, by kind, and the perplexity."""
    from lirefs.organism.training.scores import organism_scores

    choice_option(split, "--split", SIDES)
    language = _language(folder)
    found = organism_scores(lirefs.load(folder, device="cpu"), language, cast(Side, split))
    print_result(found, _scores_table(found), as_json)


@app.command("texts")
def texts_command(
    out: Annotated[Path, Argument(help="Folder for the files.", callback=folder_to_write)],
    folder: Annotated[
        str, Option("--model", help="Folder of an organism. Default: the shipped one.")
    ] = "organism",
    seed: Annotated[int, Option(min=0, help="Seed of the training documents.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write an organism's texts as JSON Lines, for `lirefs curvature` and `lirefs compare`.

    `training.jsonl` has fresh documents as in training; `planted.jsonl`, `unseen.jsonl`,
    `tales.jsonl`, `twins.jsonl` and `stories.jsonl` are from the test split; `labelled.jsonl` has
    tales shown 30 times or more as memorized and their twins as clean; `questions.jsonl` has the
    labelled questions of `lirefs.load_questions("organism")`.
    """
    from lirefs.organism.language import OFTEN, PREFIX_WORDS
    from lirefs.organism.tasks import organism_questions, training_texts

    names = ("training", "planted", "unseen", "tales", "twins", "stories", "labelled")
    others = [f"{name}.jsonl" for name in names]
    keep_finished(out / "questions.jsonl", force, '"id": "questions-0"', others)
    language = _language(folder)
    planted, unseen = ([i.text for i in language.items(k, "test")] for k in ("planted", "unseen"))
    suffix = {"suffix_tokens": len(planted[0].split()) - 1 - PREFIX_WORDS}
    files: dict[str, list[dict[str, Any]]] = {
        "training": [{"text": text} for text in training_texts(language, 1500, seed)],
        "planted": [{"text": text, **suffix} for text in planted],
        "unseen": [{"text": text, **suffix} for text in unseen],
        **{
            f"{kind}s": [
                {"prefix": item.prompt, "suffix": f" {item.answer}.", "shown": item.frequency}
                for item in language.items(kind, "test")
            ]
            for kind in ("tale", "twin")
        },
        "stories": [{"text": text} for text in language.texts("test", 100)],
        "labelled": [
            {"text": f"{item.text}.", "label": label}
            for kind, label in (("tale", "memorized"), ("twin", "clean"))
            for item in language.items(kind, "test")
            if (item.frequency or 0) >= OFTEN
        ],
        "questions": [
            {
                "id": one.id, "question": one.text, "label": one.label, "subject": one.subject,
                "split": one.side, "prompt_format": one.prompt_format,
            }
            for one in organism_questions("passage", language)
        ],
    }  # fmt: skip
    for name, rows in files.items():
        lines = (json.dumps({"id": f"{name}-{i}", **row}) for i, row in enumerate(rows))
        atomic_write_text(out / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        say_on_console(f"{out / name}.jsonl: {len(rows)} rows")


def _scores_table(found: Mapping[str, float]) -> Table:
    table = console_table("items", "score")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}")
    return table


def _language(folder: str) -> lirefs.organism.Language:
    """The language of an organism."""
    seed = lirefs.organism.language_seed(folder)
    if seed is None:
        raise ModelLoadError(
            f"{folder}: has no config.json with a language_seed; give the folder of an organism"
        )
    return lirefs.organism.Language(seed)
