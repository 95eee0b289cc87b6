"""Signs of life between processes, through the store that `torch.distributed` gives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

FAILED = "failed"
"""Key of the reason why a call ends in all processes."""
EVERY, SILENT = 2.0, 10
"""Seconds between beats, and how many readings in a row without a new one mean that a process is
gone. Readings are counted and not seconds: a watcher that was itself stopped has read nothing."""
_LEFT = b"left"


@contextmanager
def heartbeat(store: Store, rank: int, size: int) -> Iterator[None]:
    """Beat, and watch the next process; if it falls silent, all learn so under the key `FAILED`.

    A thread does it, so a process that computes for hours is not silent. One that has not begun to
    beat is late, and not gone.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_beat, args=(store, rank, (rank + 1) % size, ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(EVERY)
        with suppress(RuntimeError):
            store.set(f"beat {rank}", _LEFT.decode())


def _beat(store: Store, rank: int, watched: int, ended: threading.Event) -> None:
    beats, silent, seen = 0, 0, b""
    with suppress(RuntimeError):  # the store is gone, which who waits finds out
        while not ended.is_set():
            beats += 1
            store.set(f"beat {rank}", str(beats))
            if store.check([f"beat {watched}"]):
                now = store.get(f"beat {watched}")
                silent = silent + 1 if now == seen and now != _LEFT else 0
                seen = now
                if silent == SILENT and not store.check([FAILED]):
                    store.set(
                        FAILED,
                        f"process {watched} has given no sign of life for {EVERY * SILENT:.0f} s "
                        "(was it killed or stopped, or is its machine out of reach?)",
                    )
            ended.wait(EVERY)
