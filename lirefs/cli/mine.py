"""`lirefs mine`: find the windows of a corpus that a model memorized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import lirefs
from lirefs.cli import options
from lirefs.errors import SettingError
from lirefs.tasks.settings import BATCH_TOKENS

COPIED = 0.5
"""Windows with at least this share of predictable 4-grams are counted as predictable."""


def mine_command(
    corpus: Annotated[
        list[Path],
        Argument(
            help="JSON Lines with `text`, files of text (one text each), or folders of .txt files."
        ),
    ],
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.Dtype = None,
    device_map: options.DeviceMap = None,
    out: Annotated[
        Path,
        Option(help="JSON Lines for `lirefs compare --memorized`.", callback=options.file_to_write),
    ] = Path("mined.jsonl"),
    prefix_tokens: Annotated[int, Option(min=1, help="Length of the prompts.")] = 64,
    suffix_tokens: Annotated[int, Option(min=1, help="Length of the continuations.")] = 48,
    stride: Annotated[
        int | None, Option(min=1, help="Tokens between windows. Default: no overlap.")
    ] = None,
    near: Annotated[float, Option(help="Jaccard similarity of near-duplicates, in (0, 1].")] = 0.7,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens per batch.")] = BATCH_TOKENS,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the windows of texts that a model recites, and write them to a file.

    The same command continues an interrupted run: finished windows are in OUT.partial.
    """
    from lirefs.tasks.texts import plain_texts

    options.keep_finished(out, force, '"prefix_ids"', [f"{out.name}.json"])
    texts = plain_texts(corpus, "corpus", SettingError)
    lm = options.load_model(model, device, dtype, device_map)
    journal = Path(f"{out}.partial")
    sizes = (prefix_tokens, suffix_tokens, stride, near)
    found = lirefs.mine(
        lm, texts, *sizes, batch_tokens=batch_tokens, journal=journal, progress=not quiet
    )
    found.save(out)
    journal.unlink()
    copied = sum(one.predictable >= COPIED for one in found.windows)
    stages = ", ".join(f"{n:,} {stage}" for stage, n in found.counts.items())
    line = f"{stages}; {copied} of the distinct ones have half of their 4-grams in the prefix"
    options.print_result({**found.counts, "predictable": copied}, line, as_json)
    options.say_on_console(f"written to {out}, settings to {out}.json")
