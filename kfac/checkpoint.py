"""Interrupted collections go on where they were, to the bit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from kfac.errors import CheckpointError, FactorsFileError
from kfac.store import read_tensors, write_tensors

_HEADER = "kfac_checkpoint"


@dataclass
class State:
    """How far a collection is, between two batches.

    Attributes:
        turn: Which pass over the data, from 0.
        done: Batches of this pass that are summed or belong to other processes.
        tokens: Counted positions of the first pass.
        counts: Positions by target.
        sources: Which targets share an input.
        data: SHA-256 of the batches of this pass so far.
        whole: SHA-256 of all batches, once the first pass is over.
        tables: The sums.
    """

    turn: int = 0
    done: int = 0
    tokens: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    data: str = ""
    whole: str = ""
    tables: dict[str, Tensor] = field(default_factory=dict)


class Checkpoint:
    """A file that holds the state of a collection, replaced at intervals.

    Ctrl-C waits for the end of the batch; a second Ctrl-C does not wait. Whatever else stops the
    collection, what is written is whole: the sums only change at the very end of a batch.

    Args:
        path: The file; None switches everything off.
        every: Seconds between two writes.
        settings: What the sums depend on: JSON values, the same when the collection goes on.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, every: float, settings: Mapping[str, Any]
    ) -> None:
        self.path = None if path is None else Path(path)
        self.every = every
        self.settings = json.loads(json.dumps(settings))
        self._written = time.monotonic()
        self._busy = False
        self._changing = False
        self._asked = False

    def load(self) -> State:
        """Return the state to go on from, a new one when there is no file.

        Raises:
            CheckpointError: The file is damaged, or belongs to another collection.
        """
        if self.path is None or not self.path.exists():
            return State()
        try:
            header, tables = read_tensors(self.path, _HEADER, "checkpoint")
            settings = header.pop("settings")
            state = State(**header, tables=tables)
        except (FactorsFileError, KeyError, TypeError) as error:
            raise CheckpointError(f"{error}; delete it to begin anew") from error
        if settings != self.settings:
            changed = [
                key
                for key in {*settings, *self.settings}
                if settings.get(key) != self.settings.get(key)
            ]
            raise CheckpointError(
                f"{self.path} belongs to a collection with other settings ({sorted(changed)}); "
                "give another path, or delete it to begin anew"
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

    def after_batch(self, state: State) -> None:
        """Write the state if it is time to, or if Ctrl-C was pressed during the batch.

        Raises:
            KeyboardInterrupt: After the write, if Ctrl-C was pressed.
        """
        self._busy = self._changing = False
        if self._asked:
            raise KeyboardInterrupt
        if self.path is not None and time.monotonic() - self._written >= self.every:
            self.save(state)

    def before_batch(self) -> None:
        """From here to `after_batch` Ctrl-C waits."""
        self._busy = True

    def before_sums(self) -> None:
        """From here to `after_batch` the sums are changing."""
        self._changing = True

    @contextmanager
    def guarded(self, state: State) -> Iterator[None]:
        """Hold Ctrl-C back during batches, and write the state if anything stops the collection."""
        # Only the main thread may set handlers; elsewhere Ctrl-C does not arrive anyway.
        ours = self.path is not None and threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self._interrupt) if ours else None
        try:
            yield
        except BaseException:
            # While the sums change they are half done: the last whole state stays. Before the first
            # batch is done there is nothing to keep.
            if not self._changing and (state.turn or state.done):
                self.save(state)
            raise
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._busy or self._asked:
            raise KeyboardInterrupt
        self._asked = True
