"""Run a function in several processes of `torch.distributed` (gloo, on the CPU)."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def run(work: Callable[[int, str], None], folder: Path, exits: Sequence[int] = (0, 0)) -> None:
    """Call ``work(rank, folder)`` in as many processes as there are expected exit codes.

    Raises the failure of the first process that fails, with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(work, rank, len(exits), str(folder), failures), daemon=True
        )
        for rank in range(len(exits))
    ]
    for process in workers:
        process.start()
    # One that fails leaves the others waiting for it, so failures are looked for first.
    while any(process.is_alive() for process in workers) and failures.empty():
        for process in workers:
            process.join(0.2)
    if not failures.empty():
        for process in workers:
            process.kill()
        pytest.fail(failures.get())
    assert [process.exitcode for process in workers] == list(exits)


def _worker(work: Callable[..., None], rank: int, size: int, folder: str, failures: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{work.__name__}", rank=rank, world_size=size
        )
        work(rank, folder)
        dist.destroy_process_group()
    except BaseException:
        failures.put(traceback.format_exc())
        raise
