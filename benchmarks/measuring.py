"""Shared by the benchmarks: timing variants in turns, and environments for peers."""

from __future__ import annotations

import statistics
import subprocess
import time
import venv
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; a first round, which warms up, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if index:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_range(ratios: Sequence[float], digits: int = 2) -> str:
    """The median of the ratios of all rounds, and the lowest and the highest.

    Of 5 rounds, the range holds the true median with 94 % confidence, of 7 with 98 %.
    """
    ends = ", ".join(f"{one:.{digits}f}" for one in (min(ratios), max(ratios)))
    return f"{statistics.median(ratios):.{digits}f} [{ends}]"


def ratios(times: dict[str, list[float]], name: str, base: str) -> list[float]:
    """A variant's time divided by the base's time, of each round."""
    return [a / b for a, b in zip(times[name], times[base], strict=True)]


def versions(*packages: str) -> str:
    """Versions of those that are installed, separated by commas."""
    found = []
    for one in packages:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{one} {metadata.version(one)}")
    return ", ".join(found)


def environment(folder: Path, wanted: Sequence[str]) -> Path:
    """Create a virtual environment for peers if it is missing, and return its interpreter.

    Packages that it does not install, such as torch, come from the current environment.

    Args:
        folder: Folder of the environment.
        wanted: Arguments of `pip install`.
    """
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
        (folder / "ready").touch()
    return python
