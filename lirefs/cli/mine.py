"""`lirefs mine`: find the texts of a corpus that a model recites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import lirefs
from lirefs.cli.options import DEFAULT_MODEL, Device, Model, file_to_write, say_on_console
from lirefs.errors import SettingError
from lirefs.tasks.inference import BATCH_TOKENS
from lirefs.tasks.texts import plain_texts

COPIED = 0.5
"""Windows with at least this share of predictable 4-grams are counted as predictable."""


def mine_command(
    corpus: Annotated[
        list[Path],
        Argument(help=".jsonl files with `text`, plain texts, or folders of .txt files."),
    ],
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    out: Annotated[
        Path,
        Option(help="JSON Lines for `lirefs compare --memorized`.", callback=file_to_write),
    ] = Path("mined.jsonl"),
    prefix_tokens: Annotated[int, Option(min=1, help="Length of the prompts.")] = 64,
    suffix_tokens: Annotated[int, Option(min=1, help="Length of the continuations.")] = 48,
    stride: Annotated[
        int | None, Option(min=1, help="Tokens between windows. Default: no overlap.")
    ] = None,
    near: Annotated[float, Option(help="Jaccard similarity of near-duplicates, in (0, 1].")] = 0.7,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens per batch.")] = BATCH_TOKENS,
) -> None:
    """Find the windows of texts that a model recites, and write them to a file.

    The same command continues an interrupted run: finished windows are in OUT.partial.
    """
    texts = plain_texts(corpus, "corpus", SettingError)
    lm = lirefs.load(model, device=device)
    journal = Path(f"{out}.partial")
    sizes = (prefix_tokens, suffix_tokens, stride, near)
    found = lirefs.mine(lm, texts, *sizes, batch_tokens=batch_tokens, journal=journal)
    found.save(out)
    journal.unlink()
    say_on_console(", ".join(f"{n:,} {stage}" for stage, n in found.counts.items()))
    copied = sum(one.predictable >= COPIED for one in found.windows)
    say_on_console(f"{copied} of the distinct ones have half of their 4-grams in the prefix")
    say_on_console(f"written to {out}, settings to {out}.json")
