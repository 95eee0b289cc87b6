"""`lirefs mine`: find the texts of a corpus that a model recites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import lirefs
from lirefs.cli.options import DEFAULT_MODEL, Device, Model, file_to_write, say_on_console
from lirefs.errors import DataFileError
from lirefs.files import read_jsonl
from lirefs.tasks.inference import BATCH_TOKENS

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
    texts = read_texts(corpus)
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


def read_texts(paths: list[Path]) -> list[tuple[str, str]]:
    """Id and text of each row of a `.jsonl` file, `.txt` file of a folder, or plain text file."""
    texts = []
    for path in paths:
        if path.suffix == ".jsonl":
            for line, row in read_jsonl(path):
                if not isinstance(row.get("text"), str):
                    raise DataFileError(f"{path}, line {line}: needs a string 'text'")
                texts.append((str(row.get("id") or f"{path}:{line}"), row["text"]))
            continue
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise DataFileError(f"{path}: a folder without a .txt file")
        texts += [(str(file), _read(file)) for file in files]
    return texts


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataFileError(f"{file}: no such file") from None
    except UnicodeDecodeError as problem:
        raise DataFileError(f"{file}: not UTF-8 (byte {problem.start + 1})") from problem
    except OSError as problem:
        raise DataFileError(f"{file}: cannot be read ({problem.strerror})") from problem
