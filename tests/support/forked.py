"""Fresh processes at the price of a fork: a server imports torch once and forks for each of them.

A fork of the tests' own process would be of no use: where a backward pass has run before, PyTorch
refuses another one in a forked process.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


@contextlib.contextmanager
def started(function: Callable, *arguments: object):
    """Run `function(*arguments, connection)` in a new process; yield it and our connection.

    The function is one of a module. It sends what it likes; if it raises an error, it sends the
    traceback and exits with code 1. The process is killed when the block ends.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_run, args=(function, arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def module(name: str, arguments: list[str], folder: Path, connection) -> None:
    """Send what `python -m NAME ARGUMENTS` prints in a folder, which stands first in `sys.path`."""
    os.chdir(folder)
    sys.path[:] = ["", *(path for path in sys.path if Path(path).resolve() != folder)]
    sys.argv = [name, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_module(name, run_name="__main__")
        finally:
            connection.send(printed.getvalue())


def _run(function, arguments, connection) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        function(*arguments, connection)
    except Exception:
        connection.send(traceback.format_exc())
        raise SystemExit(1) from None
