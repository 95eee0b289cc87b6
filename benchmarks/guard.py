"""Is this working tree slower than another commit? Both run in turns, on one machine.

    python benchmarks/guard.py main

Each round runs the same work on both, in processes of their own; a ratio is the median over rounds
of the ratio within a round. Exits with 1 if one is above `MOST`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
MOST = 1.1
REPEATS = 3
"""The fastest of so many runs counts."""


def work() -> dict[str, float]:
    """Seconds of what a person waits for, on the organism, with the packages of PYTHONPATH."""
    begun = time.process_time()
    import kfac
    import lirefs

    _ = lirefs.load, kfac.collect  # imported when they are asked for
    seconds = {"import": time.process_time() - begun}
    lm, language = lirefs.load("organism", device="cpu"), lirefs.organism.Language()
    texts = language.texts("train", 160)
    split = lirefs.load_questions("organism").split(seed=0)
    direction = lirefs.fit(lm, split, layers=[2], progress=False).best
    steer, other = (
        lirefs.Steer(one, "add", 2.0) for one in (direction, direction.random_like(seed=0))
    )
    factors = kfac.collect(lm, texts[:80], layers=[2], progress=False)
    few = ("twins of tales", "common facts", "boolean expressions", "stories")
    asked = lirefs.organism.organism_tasks(lm, language, "test", 20)
    tasks = [one for one in asked if one.name in few]

    def steered() -> None:
        with steer.apply(lm.model):
            lm.generate(texts[:24], max_new_tokens=24)

    def edited() -> None:
        collected = kfac.collect(lm, texts[:20], layers=[2], progress=False)
        with kfac.CurvatureEdit(collected, 0.9).apply(lm.model):
            pass

    def compared() -> lirefs.Comparison:
        variants = {"steered": steer, "random": other, "edited": kfac.CurvatureEdit(factors, 0.98)}
        return lirefs.compare(lm, variants, tasks, progress=False)

    comparison = compared()

    def reported() -> None:
        with tempfile.TemporaryDirectory() as folder:
            lirefs.write_report(comparison, folder)

    runs: dict[str, Callable[[], Any]] = {
        "capture": lambda: lirefs.capture(lm, texts, progress=False),
        "steered generation": steered,
        "factors": lambda: kfac.collect(lm, texts[:80], layers=[1, 2], progress=False),
        "factors and edit": edited,
        "comparison": compared,
        "report": reported,
    }
    for name, run in runs.items():
        times = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        seconds[name] = min(times)
    return seconds


def measured(tree: Path, folder: str) -> dict[str, float]:
    """The same from a process that imports the packages of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "LIREFS_CACHE": f"{folder}/cache"}
    command = [sys.executable, "-P", str(HERE / "benchmarks" / "guard.py"), "--work"]
    done = subprocess.run(
        command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if Path(found.pop("packages")) != tree:
        raise SystemExit(f"{tree} was not what ran")
    return {str(name): float(one) for name, one in found.items()}


def main() -> int:
    """Compare, print a table, and say whether something is slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        found: dict[str, Any] = work()
        import lirefs

        print(json.dumps(found | {"packages": str(Path(lirefs.__file__).parents[1])}))
        return 0
    from measuring import with_range  # not above: it imports torch, and imports are timed

    if options.base is None:
        parser.error("name a commit")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve() / "base"
        base.mkdir()
        archive = f"{folder}/base.tar"
        git = ["git", "-C", str(HERE), "archive", "--output", archive, options.base]
        if subprocess.run(git, check=False).returncode:
            return 2
        subprocess.run(["tar", "xf", archive, "-C", str(base)], check=True)
        rounds = [[measured(tree, folder) for tree in (base, HERE)] for _ in range(options.rounds)]
    print(f"| | {options.base}, s | here, s | ratio [range] |\n|---|---|---|---|")
    slower = []
    for name in rounds[0][0]:
        ratios = [here[name] / before[name] for before, here in rounds]
        before, here = (statistics.median(one[i][name] for one in rounds) for i in (0, 1))
        print(f"| {name} | {before:.2f} | {here:.2f} | {with_range(ratios)} |")
        slower += [name] if statistics.median(ratios) > MOST else []
    print(f"slower by more than {MOST - 1:.0%}: {', '.join(slower) or 'nothing'}")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
