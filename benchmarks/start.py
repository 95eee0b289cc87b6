"""CPU seconds until the command line has printed its help, next to the imports it avoids.

    python benchmarks/start.py

Each line is the median over rounds of fresh processes. Every round runs all of them, so that a slow
minute of the machine affects all; a ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys

import typer
from measuring import versions, with_range

from lirefs.cli.app import app

IMPORTS = (
    "import torch",
    "import lirefs, kfac",
    "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel",
)


def helps(command: typer.core.TyperCommand, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words that ask for help, of a command and all below it."""
    below = getattr(command, "commands", {})
    return [(*words, "--help"), *(one for n in below for one in helps(below[n], (*words, n)))]


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """CPU time of a Python process with these arguments."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure all starts in turns, and print one line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    asked = [("--version",), *helps(typer.main.get_command(app))]
    starts = {line: ("-c", line) for line in IMPORTS}
    starts |= {" ".join(("lirefs", *words)): ("-m", "lirefs", *words) for words in asked}
    times = [{name: cpu_seconds(one) for name, one in starts.items()} for _ in range(rounds)]
    print("| start | CPU seconds | of `import torch` [range] |\n|---|---|---|")
    for name in starts:
        seconds = statistics.median(one[name] for one in times)
        ratio = with_range([one[name] / one[IMPORTS[0]] for one in times])
        print(f"| `{name}` | {seconds:.2f} | {ratio} |")
    used = versions("torch", "transformers", "typer")
    print(f"Python {platform.python_version()}, {used}, medians of {rounds} rounds")


if __name__ == "__main__":
    main()
