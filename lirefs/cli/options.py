"""Options, checks and ways to print that all commands share.

Results go to the standard output; progress and messages go to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rich.console import RenderableType
from typer import Option

import lirefs
from lirefs.errors import SettingError, visible
from lirefs.files import (
    atomic_write_text,
    parse_json,
    refuse_foreign,
    sha256_of,
    usual_file_permissions,
    write_errors,
)
from lirefs.main_job.console import SafeConsole
from lirefs.questions.question import LABELS

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_LABELS = ",".join(LABELS)
DTYPES = ("float32", "bfloat16", "float16", "auto")
UNCUT = 10_000
"""Columns of a table that goes to a file or a pipe: no line is folded there."""

console = SafeConsole(stderr=True)
"""For progress and messages; results go to the standard output."""
SHARD = "1GB"
"""Largest file of an edited model; main memory holds one of an accelerator's model at a time."""


def say_on_console(line: str) -> None:
    """Print a line on the console, as it is."""
    console.print(line, soft_wrap=True)


def print_result(result: Any, shown: RenderableType, as_json: bool) -> None:
    """Print a result on the standard output: for a reader, or as one JSON document.

    Only a terminal folds lines.
    """
    if as_json:
        # A character that is written out is the same to a reader of JSON.
        sys.stdout.write(visible(json.dumps(result, indent=2, ensure_ascii=False)) + "\n")
        return
    width = None if sys.stdout.isatty() else UNCUT
    SafeConsole(width=width).print(shown)


def be_quiet(value: bool) -> bool:
    """Callback of `--quiet`: the console is silent, or not, and so is transformers."""
    from transformers.utils import logging as transformers_logging

    console.quiet = value
    if value or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    else:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return value


def device_option(value: str | None) -> str | None:
    """Callback of an option that names a device; SettingError if no such device exists."""
    if value is not None:
        from lirefs.model.loading import usable_device

        usable_device(value, "--device")
    return value


def dtype_option(value: str | None) -> str | None:
    """Callback of an option that names a type of numbers."""
    if value is not None:
        choice_option(value, "--dtype", DTYPES)
    return value


def folder_to_write(value: Path | None) -> Path | None:
    """Callback of an option that names a folder for results, existing or not."""
    if value is not None and value.exists() and not value.is_dir():
        raise SettingError(f"{value}: exists and is not a folder; name another place")
    return value if value is None else _writable(value)


def file_to_write(value: Path) -> Path:
    """The same for a file."""
    if value.is_dir():
        raise SettingError(f"{value}: is a folder; name a file to write")
    _writable(value.parent)
    return value


def keep_finished(result: Path, force: bool, mark: str, others: Iterable[str] = ()) -> None:
    """Raise SettingError if a finished result would be replaced without `--force`.

    What the command did not write itself is never replaced: see `refuse_foreign`.
    """
    if result.exists() and not force:
        raise SettingError(f"{result}: exists; give --force to replace it, or name another place")
    refuse_foreign(result, mark, others)


def figure_files(*names: str) -> list[str]:
    """The files of figures."""
    return [f"{name}.{kind}" for name in names for kind in ("png", "svg")]


def keep_folder(out: Path, record: str, force: bool) -> None:
    """Raise SettingError unless a model can be written to a folder.

    --force replaces it only if all in it is what `save_model` wrote, as its record says.
    """
    folder_to_write(out)
    if not out.exists():
        return
    if (out / record).exists() and not force:
        raise SettingError(f"{out}: exists; give --force to replace it, or name another place")
    try:
        written = parse_json((out / record).read_text("utf-8"))["files"]
        found = _digests(out)
        foreign = [name for name in found if written.get(name) != found[name] and name != record]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise SettingError(f"{out}: exists; name a new folder") from None
    if foreign:
        raise SettingError(
            f"{out / foreign[0]}: was added or changed since this command wrote the folder; name a "
            "new folder"
        )


def save_model(
    model: Any, tokenizer: Any, out: Path, record: str, content: Mapping[str, Any]
) -> None:
    """Write a model, its tokenizer and a record of its changes to a folder, whole or not at all.

    The record has the SHA-256 of every other file, which tells `keep_folder` whose they are.
    """
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as folder:
            made = Path(folder) / "model"  # with ordinary permissions, inside a private folder
            made.mkdir()
            model.save_pretrained(made, max_shard_size=SHARD)
            tokenizer.save_pretrained(made)
            whole = {**content, "files": _digests(made)}
            atomic_write_text(made / record, json.dumps(whole, indent=1))
            usual_file_permissions(made)
            if (out / record).exists():
                out.rename(Path(folder) / "replaced")
            made.rename(out)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def _writable(folder: Path) -> Path:
    """Checked first, because hours of work should not end at a folder that cannot be made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise SettingError(f"{folder}: cannot be made, because {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingError(f"{folder}: nothing can be written in {there}; name another place")
    return folder


Model = Annotated[str, Option(help="Built-in name, hub id, folder or .gguf file.")]
Device = Annotated[str | None, Option(help="Default: cuda if available.", callback=device_option)]
Dtype = Annotated[
    str | None,
    Option(
        help=f"{', '.join(DTYPES)}. Default: float32 on a CPU, the checkpoint's own elsewhere.",
        callback=dtype_option,
    ),
]
DeviceMap = Annotated[
    str | None, Option(help="auto, for a model on several devices; in place of --device.")
]
Labels = Annotated[
    str, Option(help="The two labels of the questions; directions point to the first.")
]
FactorsFile = Annotated[Path, Option(help="File written by `lirefs curvature collect`.")]
Keep = Annotated[float, Option(help="Share of curvature mass to keep, in (0, 1].")]
Seed = Annotated[int, Option(min=0, help="Seed of labels, splits, controls, intervals.")]
OutFolder = Annotated[
    Path, Option(help="Folder of the report, tables and figures.", callback=folder_to_write)
]
Force = Annotated[bool, Option("--force", help="Replace a finished result.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, Option("--quiet", help="Print results and errors only.", callback=be_quiet)]


def load_model(
    name: str, device: str | None, dtype: str | None, device_map: str | None
) -> lirefs.LanguageModel:
    """Load a model by the options that name one."""
    return lirefs.load(name, device=device, dtype=dtype, device_map=device_map)


Number = TypeVar("Number", int, float)


def numbers_option(text: str, option: str, kind: type[Number]) -> list[Number]:
    """Numbers of an option, separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "20,21,22" if kind is int else "-1,0.5,1"
        raise SettingError(f"{option} {text!r}: expected numbers such as {example}") from None


def indices_option(text: str | None, option: str = "--layers") -> list[int] | None:
    """Whole numbers of an option, ascending; None if it was not given."""
    return None if text is None else sorted(set(numbers_option(text, option, int)))


def choice_option(name: str, option: str, known: Collection[str]) -> None:
    """Check a name of an option against the known ones."""
    if name not in known:
        raise SettingError(f"{option} {name!r}: expected one of {', '.join(known)}")
