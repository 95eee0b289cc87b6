"""Time and memory of large comparisons and question files, each in a process of its own.

    python benchmarks/sizes.py

Scores are made up, because what is measured is everything after the model has answered. Time is
that of the processor. Memory is the peak of resident memory above what the process held when the
results (or the file) were there.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import lirefs
from lirefs.comparison import Comparison, TaskInfo, load_comparison, write_report
from lirefs.tasks import ItemResult

MIB = 1 << 20


def made_up(variants: int, tasks: int, items: int) -> Comparison:
    """A comparison of which every other task is a perplexity, the others are right or wrong."""
    generator = np.random.default_rng(0)
    names = ["unchanged", *(f"variant {index}" for index in range(1, variants + 1))]
    infos: dict[str, TaskInfo] = {}
    results: dict[str, dict[str, list[ItemResult]]] = {name: {} for name in names}
    for task in range(tasks):
        texts = task % 2 == 0
        infos[f"task {task}"] = TaskInfo(
            ("language", "arithmetic")[task % 2], ("perplexity", "accuracy")[task % 2]
        )
        tokens = generator.integers(20, 200, items)
        base = generator.normal(3.0, 0.5, items) if texts else generator.random(items)
        for index, name in enumerate(names):
            shifted = base + generator.normal(0.01 * index, 0.1, items)
            scores = (shifted * tokens if texts else shifted > 0.4).astype(float).tolist()
            results[name][f"task {task}"] = [
                ItemResult(
                    f"item {row}",
                    {"nll" if texts else "accuracy": score},
                    float(weight) if texts else 1.0,
                    f"What is asked in item {row}?",
                    "what is expected",
                    f"what is answered under {name}",
                )
                for row, (score, weight) in enumerate(zip(scores, tokens.tolist(), strict=True))
            ]
    return Comparison(results, infos)


def question_file(lines: int, path: Path) -> None:
    """A JSON Lines file of different questions."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for line in range(lines):
            numbers = [generator.randrange(1000) for _ in range(8)]
            row = {
                "question": f"What is {' + '.join(map(str, numbers))}, in case {line}?",
                "label": ("reasoning", "memory")[line % 2],
            }
            file.write(json.dumps(row) + "\n")


def resident() -> int:
    """Bytes of resident memory now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def steps_of(kind: str, sizes: list[int], folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, one after the other."""
    if kind == "questions":
        file = folder / "questions.jsonl"
        question_file(*sizes, file)
        kept: list[Any] = []
        yield "load_questions", lambda: kept.append(lirefs.load_questions(file))
        yield "split", lambda: kept[0].split(seed=0)
        return
    comparison = made_up(*sizes)
    yield "statistics", comparison.cells
    yield "write_report", lambda: write_report(comparison, folder / "report")
    yield "load_comparison", lambda: load_comparison(folder / "report")


def measured(kind: str, sizes: list[int]) -> Iterator[tuple[str, float, float, float]]:
    """Name, seconds, MiB of memory before, and peak MiB above that, of each step."""
    with tempfile.TemporaryDirectory() as folder:
        for name, step in steps_of(kind, sizes, Path(folder)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            before, start = resident(), time.process_time()
            step()
            seconds = time.process_time() - start
            status = Path("/proc/self/status").read_text()
            (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
            yield name, seconds, before / MIB, (int(peak) * 1024 - before) / MIB


CASES = (
    ("comparison", 1, 2, 5_000),
    ("comparison", 1, 2, 20_000),
    ("comparison", 1, 2, 100_000),
    ("comparison", 20, 40, 500),
    ("comparison", 50, 40, 100),
    ("questions", 100_000),
    ("questions", 1_000_000),
)


def main() -> None:
    """Print a table of every case, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", help="kind and sizes: measure this alone, here")
    options = parser.parse_args()
    if options.case:
        kind, *sizes = options.case
        for name, *numbers in measured(kind, list(map(int, sizes))):
            seconds, before, above = numbers
            shown = " ".join(f"{int(one):,}" for one in sizes)
            print(f"| {kind} {shown} | {name} | {seconds:.1f} | {before:.0f} | {above:.0f} |")
            sys.stdout.flush()
        return
    print("| case | step | seconds | MiB before | MiB above |\n|---|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, __file__, "--case", *map(str, case)], check=True)


if __name__ == "__main__":
    main()
