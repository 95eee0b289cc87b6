"""Checkpoints: an interrupted collection resumes where it was, and gives the same bits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kfac.factors.tensor_file import read_tensors, write_tensors
from lirefs.errors import CheckpointError, FactorsFileError
from lirefs.files import holds_mark, refuse_folder

_HEADER = "kfac_checkpoint"


@dataclass
class State:
    """The state of a collection between two batches."""

    turn: int = 0  # which pass over the data
    done: int = 0  # batches of this pass that are summed or belong to other processes
    tokens: int = 0  # counted positions of the first pass
    counts: dict[str, int] = field(default_factory=dict)  # positions by target
    sources: dict[str, str] = field(default_factory=dict)  # which targets share an input
    data: str = ""  # SHA-256 of the batches of this pass so far
    whole: str = ""  # SHA-256 of all batches, once the first pass is over
    tables: dict[str, Tensor] = field(default_factory=dict)  # the sums


Shapes = Mapping[str, Mapping[str, tuple[int, int]]]
"""Target to the shapes of its sums by key."""


class Checkpoint:
    """A file with the state of a collection, replaced every so many seconds; None: no file.

    `settings` are the JSON values that the sums depend on. Ctrl-C waits for the end of the batch; a
    second Ctrl-C does not. Whatever else stops the collection, the file is consistent, because the
    sums only change at the very end of a batch, while `changing` is true.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, every: float, settings: Mapping[str, Any]
    ) -> None:
        if path is not None:
            refuse_folder(path, CheckpointError)
        self.path = None if path is None else Path(path)
        self.every = every
        self.settings = json.loads(json.dumps(settings))
        self._written = time.monotonic()
        self._busy = self._asked = self.changing = False
        self._handler: Any = signal.SIG_IGN  # what `guarded` found in place

    def load(self, turns: int, shapes_in: Callable[[State], Shapes], dtype: torch.dtype) -> State:
        """Return the state to resume from; a new one when no file exists.

        A file that is damaged or belongs to another collection is a CheckpointError.
        """
        if self.path is None or not self.path.exists():
            return State()
        try:
            header, tables = read_tensors(self.path, _HEADER, "checkpoint")
            settings = header.pop("settings")
            if not isinstance(settings, dict):
                raise ValueError("its settings are not an object")
            state = State(**header, tables=tables)
            _check_fields(state)
            if settings == self.settings:
                _check_sums(state, turns, shapes_in(state), dtype)
        except FactorsFileError as error:
            ours = holds_mark(self.path, _HEADER)
            advice = "delete it to start again" if ours else "give another path"
            raise CheckpointError(f"{error}; {advice}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is damaged: {error!r}; delete it to start again"
            ) from error
        if settings != self.settings:
            keys = {*settings, *self.settings}
            changed = sorted(key for key in keys if settings.get(key) != self.settings.get(key))
            raise CheckpointError(
                f"{self.path} belongs to a collection with other settings ({changed}); give "
                "another path, or delete it to start again"
            )
        return state

    def save(self, state: State) -> None:
        """Write the state."""
        if self.path is None:
            return
        header = {key: value for key, value in vars(state).items() if key != "tables"}
        text = json.dumps(header | {"settings": self.settings})
        write_tensors(
            self.path, {key: table.cpu() for key, table in state.tables.items()}, {_HEADER: text}
        )
        self._written = time.monotonic()

    @contextmanager
    def batch(self, state: State) -> Iterator[None]:
        """Make Ctrl-C wait for the end of a batch; afterwards write the state if it is time to."""
        self._busy = True
        yield
        self._busy = self.changing = False
        if self._asked:
            self._handler(signal.SIGINT, None)
            self._asked = False  # the handler of the caller's lets the collection go on
        if self.path is not None and time.monotonic() - self._written >= self.every:
            self.save(state)

    @contextmanager
    def guarded(self, state: State) -> Iterator[None]:
        """Hold Ctrl-C back during batches, and write the state if anything stops the collection."""
        # Only the main thread may set handlers; elsewhere Ctrl-C does not arrive anyway. A process
        # that ignores the signal (SIG_IGN, as under nohup) has no handler to call, and goes on.
        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        ours = self.path is not None and main and callable(before)
        self._handler = before
        try:
            if ours:
                signal.signal(signal.SIGINT, self._interrupt)
            yield
        except BaseException:
            # While the sums are changing, the last complete file stays. Before the first batch is
            # done, there is nothing to save.
            if not self.changing and (state.turn or state.done):
                self.save(state)
            raise
        finally:
            if ours:
                asked, self._busy = self._asked, True  # a Ctrl-C now waits for the old handler
                signal.signal(signal.SIGINT, before)
                self._busy = False
                if self._asked and not asked:
                    signal.raise_signal(signal.SIGINT)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._busy and not self._asked:
            self._asked = True
        else:
            self._handler(number, frame)  # the caller's, which raises KeyboardInterrupt by default


def _check_fields(state: State) -> None:
    """Raise ValueError unless every field has its type."""
    if not isinstance(state.counts, dict) or not isinstance(state.sources, dict):
        raise ValueError("its counts or sources are not an object")
    counts = [state.turn, state.done, state.tokens, *state.counts.values()]
    if not all(type(one) is int and 0 <= one < 2**63 for one in counts):
        raise ValueError("its counts are not whole numbers of at least 0")
    texts = [state.data, state.whole, *state.sources.values()]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError("its digests or sources are not texts")


def _check_sums(state: State, turns: int, targets: Shapes, dtype: torch.dtype) -> None:
    """Raise ValueError unless the sums can be those of these targets."""
    if not state.turn < turns:
        raise ValueError(f"it is in pass {state.turn + 1} of {turns}")
    if not {*state.counts, *state.sources, *state.sources.values()} <= set(targets):
        raise ValueError("it counts positions of other targets")
    shapes: dict[str, tuple[int, int]] = {}
    for keys in targets.values():
        for key, shape in keys.items():
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(f"targets of different widths share {key!r:.80}")
    for key, table in state.tables.items():
        if table.dtype != dtype or tuple(table.shape) != shapes.get(key):
            raise ValueError(f"its sums {key!r:.80} have another dtype, shape or target")
        if not bool(table.isfinite().all()):
            raise ValueError(f"its sums {key!r:.80} are not finite")
    for name, keys in targets.items():
        # Until a gradient has arrived, there are only the inputs.
        missing = [key for key in keys if key not in state.tables]
        gradients = [key for key in keys if not key.startswith("A.")]
        if state.counts.get(name) and missing not in ([], gradients):
            raise ValueError(f"it lacks sums of target {name!r}: {missing}")
