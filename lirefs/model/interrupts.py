"""Ctrl-C held back for the few steps that belong together, and steps that are undone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import starmap
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the `with`, which leaves things whole; nothing slow inside.

    Handlers of the caller's get the signal then. Python runs them in the main thread alone, so
    others have nothing to hold back; nor has a process that ignores the signal, as under `nohup`.
    """
    before = signal.getsignal(signal.SIGINT)  # None if it was not set from Python
    main = threading.current_thread() is threading.main_thread()
    if not main or before in (None, signal.SIG_IGN):
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def undone() -> Iterator[list[Callable[[], object]]]:
    """A list for what undoes each change inside the `with`; at its end they are called, last first.

    An interrupt at any moment skips none of them, if each is in the list before its change is made,
    or gets there by `note(steps, change)`.
    """
    steps: list[Callable[[], object]] = []
    try:
        yield steps
    finally:
        try:
            _undo(steps)
        except BaseException:
            _undo(steps)  # the interrupt may have come before it began; else nothing is left to do
            raise


def note(results: list[Any], call: Callable[..., Any], *arguments: Any) -> None:
    """Append what a call returns to a list; no interrupt comes between.

    In `results.append(call())` one may: where torch's compiler has taken over the evaluation of
    frames, as while a model is steered, Python runs handlers of signals after each call.
    """
    results.extend(starmap(call, [arguments]))


def _undo(steps: list[Callable[[], object]]) -> None:
    problem: Exception | None = None
    with interrupts_held():
        while steps:
            try:
                steps.pop()()
            except Exception as one:
                problem = problem or one
    if problem is not None:
        raise problem
