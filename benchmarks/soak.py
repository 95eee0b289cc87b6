"""Does anything leak? The same work for 20 minutes, and 100,000 prompts in bounded memory.

    python benchmarks/soak.py                     # 20 minutes of cycles on the organism
    python benchmarks/soak.py --prompts 100000    # captures 1,000, 10,000 and 100,000 prompts

A cycle captures, fits, steers, collects curvature, edits, restores, bakes copies, saves and loads,
and raises errors inside `with` blocks. After each cycle, the script reads resident memory, hooks,
objects, open files, threads and a digest of all weights. The exit code is 1 if memory grew by 1 %
or more after the warm-up, a hook was left, or a weight changed. With `--prompts`, each count runs
in a process of its own, and the exit code is 1 if memory beyond the result and the token ids grew
with the number of prompts. Memory is read from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import kfac
import lirefs
from lirefs.files import atomic_write_bytes, atomic_write_text
from lirefs.organism import Language, organism_questions, training_texts

MIB = 2**20
LIMIT = 0.01
"""A soak fails if memory grows by this share or more after the warm-up."""
FIXED = 64 * MIB
"""Memory that a capture of any size may take beyond its result: batches and buffers."""
TOKEN_BYTES = 32
"""Memory that a capture may take per prompt token: its id, lists, overhead of the allocator."""


@dataclass(frozen=True)
class Reading:
    """State of the process after a cycle.

    Attributes:
        seconds: Since the first cycle began.
        memory: Resident bytes.
        hooks: Number of hooks on modules and parameters of the model.
        objects: Number of objects that the garbage collector tracks.
        files: Number of open file descriptors.
        threads: Number of threads.
        weights: SHA-256 of parameters and buffers.
    """

    seconds: float
    memory: int
    hooks: int
    objects: int
    files: int
    threads: int
    weights: str


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hooks(model: torch.nn.Module) -> int:
    """Number of hooks of every kind on the modules and parameters of a model."""
    tables = [
        table
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith("hooks") and isinstance(table, dict)
    ]
    return sum(map(len, tables)) + sum(len(p._backward_hooks or {}) for p in model.parameters())


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def hand_back() -> None:
    """Collect garbage and return free memory to the system, so that it is not counted."""
    gc.collect()
    with suppress(OSError, AttributeError):  # C libraries other than glibc have no malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def read(lm: lirefs.LanguageModel, start: float) -> Reading:
    """Take a reading, after returning all free memory to the system."""
    hand_back()
    return Reading(
        seconds=time.monotonic() - start,
        memory=resident(),
        hooks=hooks(lm.model),
        objects=len(gc.get_objects()),
        files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 (an entry may be gone)
        threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208
        weights=digest(lm.model),
    )


class Raised(Exception):
    """Raised by a cycle inside its `with` blocks."""


def cycle(
    lm: lirefs.LanguageModel, language: Language, questions: Any, number: int, folder: Path
) -> None:
    """Use everything once, on texts and seeds that no other cycle uses."""
    quiet: dict[str, Any] = {"progress": False}
    texts = training_texts(language, 48, number)
    for _ in range(2):  # the second time from the cache
        lirefs.capture(lm, texts, cache=folder / "activations", **quiet)
    probe = lirefs.fit(lm, questions, shuffles=5, seed=number, **quiet)
    probe.directions.save(folder / "directions.safetensors")
    directions = lirefs.Directions.load(folder / "directions.safetensors", lm)
    add = lirefs.Steer(directions[probe.best_layer], "add", 1.0)
    remove = lirefs.Steer(directions[probe.best_layer], "ablate", layers="all")

    def collect(texts: list[str], **settings: Any) -> kfac.Factors:
        return kfac.collect(lm, texts, layers=[2, 3], **quiet, **settings)

    state = folder / "state"
    collect(texts, checkpoint=state, checkpoint_every=0.0).save(folder / "factors.safetensors")
    factors = kfac.Factors.load(folder / "factors.safetensors", model=lm.model)
    edit = kfac.CurvatureEdit(factors, keep=0.7)

    for change in (add, remove, edit, add + edit):
        with change.apply(lm.model):
            lm.generate(texts[:4], max_new_tokens=6)
    with suppress(Raised), (remove + edit).apply(lm.model), add.apply(lm.model):
        raise Raised

    def fail(*_: Any) -> None:
        raise Raised

    # Fail in the middle of a forward pass: of a steered generation, a capture and a collection.
    failing = lm.model.get_submodule(f"{lm.layout.blocks}.3").register_forward_hook(fail)
    for run in (
        lambda: lm.generate(texts[:2], max_new_tokens=2),
        lambda: lirefs.capture(lm, texts[:4], sites=("resid_pre", "resid_post"), **quiet),
        lambda: collect(texts[:16]),
    ):
        with suppress(Raised), add.apply(lm.model):
            run()
    failing.remove()

    lirefs.bake(add, lm.model)
    edit.bake(copy.deepcopy(lm.model))
    state.unlink()
    for file in (folder / "activations").iterdir():
        file.unlink()


def soak(minutes: float, folder: Path, least: int = 1) -> list[Reading]:
    """Run cycles on the organism for some minutes, and at least `least` of them.

    The first reading precedes the cycles.
    """
    lm, language = lirefs.load("organism"), Language(0)
    questions = organism_questions("passage", language, 24).split(seed=0)
    start = time.monotonic()
    readings = [read(lm, start)]
    while len(readings) <= least or time.monotonic() - start < 60 * minutes:
        cycle(lm, language, questions, len(readings), folder)
        readings.append(read(lm, start))
        if len(readings) % 20 == 0:
            now = readings[-1]
            print(f"{len(readings) - 1} cycles, {now.memory / MIB:.1f} MiB", flush=True)
    return readings


def growth(values: list[float]) -> float:
    """Median of the last tenth divided by the median of the second tenth, minus 1."""
    warm, last = _tenths(values)
    return last / warm - 1


def _tenths(values: list[float]) -> tuple[float, float]:
    """Medians of the second and the last tenth."""
    tenth = max(1, len(values) // 10)
    warm = values[tenth : 2 * tenth] or values  # a single cycle has only one tenth
    return statistics.median(warm), statistics.median(values[-tenth:])


def verdict(readings: list[Reading]) -> tuple[list[str], bool]:
    """Lines that summarize the readings, and whether all is well."""
    before, cycles = readings[0], readings[1:]
    tenth = len(cycles) // 10
    grown = growth([float(one.memory) for one in cycles])
    slope = 0.0
    if len(cycles) - tenth > 1:
        memory = [float(one.memory) for one in cycles[tenth:]]
        slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0])
    left = max(one.hooks for one in cycles) - before.hooks
    changed = sum(one.weights != before.weights for one in cycles)
    lines = [
        f"{'':12}{'before':>12}{'warmed up':>12}{'end':>12}",
        *(
            f"{name:12}"
            + "".join(
                f"{getattr(one, name) / (MIB if name == 'memory' else 1):>12,.1f}"
                for one in (before, cycles[tenth], cycles[-1])
            )
            for name in ("memory", "objects", "files", "threads", "hooks")
        ),
        f"cycles: {len(cycles)} in {cycles[-1].seconds / 60:.1f} minutes",
        f"memory (MiB): {grown:+.2%} from the second to the last tenth (medians); slope "
        f"{slope / 1024:+.1f} KiB a cycle after the first tenth",
        f"hooks left: {left}",
        "weights: bit-identical after every cycle"
        if not changed
        else f"weights: differ after {changed} cycles",
    ]
    return lines, grown < LIMIT and not left and not changed


def picture(readings: list[Reading]) -> bytes:
    """A PNG of memory over time and the limit of its growth."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    warm = _tenths([float(one.memory) for one in readings[1:]])[0]
    minutes = [one.seconds / 60 for one in readings]
    axes.plot(minutes, [(one.memory - warm) / MIB for one in readings], color="#1f4e79", lw=1.2)
    axes.axhline(LIMIT * warm / MIB, color="#a04000", lw=1, ls="--")
    axes.annotate(f"limit, {LIMIT:.0%}", (minutes[-1], LIMIT * warm / MIB), va="top", ha="right")
    axes.set(
        xlabel="minutes",
        ylabel="MiB",
        title=f"Resident memory above its level after the warm-up, {warm / MIB:.0f} MiB",
    )
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def captured(count: int, cached: bool, layers: list[int] | None = None) -> dict[str, int]:
    """Capture the states of some prompts; return the bytes of the result and of the added peak."""
    torch.set_num_threads(1)
    lm = lirefs.load("organism")
    prompts = training_texts(Language(0), count)
    lirefs.capture(lm, prompts[:200], progress=False)  # warm up the library
    lengths = [len(ids) for at in range(0, count, 1000) for ids in lm.encode(prompts[at:][:1000])]
    tokens = sum(lengths)
    hand_back()
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = resident()
        cache = Path(folder) if cached else None
        states = lirefs.capture(lm, prompts, layers=layers, cache=cache, progress=False)
        status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024
    return {
        "prompts": count,
        "tokens": tokens,
        "result": states.values.numel() * states.values.element_size(),
        "peak": peak - before,
    }


def bounded(one: dict[str, int]) -> bool:
    """Whether a capture took no more than its result, its prompts' tokens and a fixed amount."""
    return one["peak"] - one["result"] <= FIXED + TOKEN_BYTES * one["tokens"]


def prompts(most: int, cached: bool) -> tuple[list[dict[str, int]], list[str], bool]:
    """Capture up to `most` prompts, each count in a new process: numbers, lines, verdict."""
    counts = [count for count in (1000, 10_000) if count < most] + [most]
    found = []
    for count in counts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(captured, count, cached).result())
    lines = [f"{'prompts':>9}{'tokens':>12}{'result MiB':>12}{'peak MiB':>12}{'above MiB':>12}"]
    well = True
    for one in found:
        above = one["peak"] - one["result"]
        well = well and bounded(one)
        lines.append(
            f"{one['prompts']:>9,}{one['tokens']:>12,}{one['result'] / MIB:>12.1f}"
            f"{one['peak'] / MIB:>12.1f}{above / MIB:>12.1f}"
        )
    return found, lines, well


def main() -> int:
    """Run one of the two, print and write the results, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--prompts", type=int, help="capture up to this many prompts instead")
    parser.add_argument("--cached", action="store_true", help="with a cache folder (--prompts)")
    parser.add_argument("--out", type=Path, default=Path("benchmark-soak"))
    given = parser.parse_args()
    if given.prompts is not None:
        found, lines, well = prompts(given.prompts, given.cached)
        name, rows = "prompts", found
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            readings = soak(given.minutes, Path(folder))
        lines, well = verdict(readings)
        name, rows = "soak", [asdict(one) for one in readings]
        atomic_write_bytes(given.out / "soak.png", picture(readings))
    atomic_write_text(given.out / f"{name}.json", json.dumps(rows, indent=1))
    atomic_write_text(given.out / f"{name}.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
