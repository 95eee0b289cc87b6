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

    The test fails with the traceback of the first process that fails, or if they never end: it is a
    common fault that processes wait for each other.
    """
    context = multiprocessing.get_context("spawn")
    # As under torchrun, the store outlives each of them.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failures = context.Queue()
    workers = [
        context.Process(
            target=_worker,
            args=(work, rank, len(exits), store.port, str(folder), failures),
            daemon=True,
        )
        for rank in range(len(exits))
    ]
    for process in workers:
        process.start()
    # One that fails leaves the others waiting for it, so failures are looked for first.
    for _ in range(1500):  # turns and not seconds, because a busy machine is not a fault
        if not failures.empty() or not any(process.is_alive() for process in workers):
            break
        for process in workers:
            process.join(0.2)
    failure = None if failures.empty() else failures.get()
    waiting = [rank for rank, process in enumerate(workers) if process.is_alive()]
    for process in workers:
        process.kill()
    if failure is not None:
        pytest.fail(failure)
    assert not waiting, f"processes {waiting} still wait"
    assert [process.exitcode for process in workers] == list(exits)


def _worker(
    work: Callable[..., None], rank: int, size: int, port: int, folder: str, failures: Any
) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        work(rank, folder)
        dist.destroy_process_group()
    except BaseException:
        failures.put(traceback.format_exc())
        raise
