"""The memory that a call takes, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch
from fuzzing import _memory

MOST = 3 << 30
"""Address space that a call may take; more is a MemoryError, or what a library makes of it."""


def peak_of(call: Callable[[], object]) -> tuple[int, str]:
    """Bytes that a call takes at its peak, and the text of its exception ("" for none)."""
    into, out = os.pipe()
    child = os.fork()
    if not child:
        said = "the process ended"
        try:
            os.close(into)
            # After a fork, torch makes its pool of threads at the first call; of several threads at
            # once, as a model is loaded with, one may find none.
            torch.set_num_threads(1)
            limit = _memory("VmSize") + MOST
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory("VmRSS")
            try:
                call()
                said = ""
            except BaseException as problem:
                said = f"{type(problem).__name__}: {problem}"
            os.write(out, json.dumps([max(0, _memory("VmHWM") - before), said]).encode())
        finally:
            os._exit(0)
    os.close(out)
    with os.fdopen(into) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    peak, said = json.loads(text) if text else (MOST, "the process ended")
    return peak, said
