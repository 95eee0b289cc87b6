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

import torch
from torch import Tensor

from kfac.factors.tensor_file import read_tensors, write_tensors
from lirefs.errors import CheckpointError, FactorsFileError

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
            if not isinstance(settings, dict):
                raise ValueError("its settings are no object")
            state = State(**header, tables=tables)
            _check_fields(state)
        except FactorsFileError as error:
            raise CheckpointError(f"{error}; delete it to begin anew") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is damaged: {error!r}; delete it to begin anew"
            ) from error
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

    def check(
        self,
        state: State,
        turns: int,
        targets: Mapping[str, Mapping[str, tuple[int, int]]],
        dtype: torch.dtype,
    ) -> None:
        """Verify that a state can be one of a collection.

        Args:
            state: From `load`.
            turns: Passes over the data.
            targets: For each target the shapes of its sums by key.
            dtype: Of the sums.

        Raises:
            CheckpointError: It cannot.
        """
        try:
            if not 0 <= state.turn < turns:
                raise ValueError(f"it is in pass {state.turn + 1} of {turns}")
            if not {*state.counts, *state.sources, *state.sources.values()} <= set(targets):
                raise ValueError("it counts positions of other targets")
            _check_tables(state, targets, dtype)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} is damaged: {error}; delete it to begin anew"
            ) from error

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


def _check_fields(state: State) -> None:
    """Raise ValueError unless every field has its type."""
    if not isinstance(state.counts, dict) or not isinstance(state.sources, dict):
        raise ValueError("its counts or sources are no object")
    counts = [state.turn, state.done, state.tokens, *state.counts.values()]
    if not all(type(one) is int and 0 <= one < 2**63 for one in counts):
        raise ValueError("its counts are no whole numbers of at least 0")
    texts = [state.data, state.whole, *state.sources.values()]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError("its digests or sources are no texts")


def _check_tables(
    state: State, targets: Mapping[str, Mapping[str, tuple[int, int]]], dtype: torch.dtype
) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for keys in targets.values():
        for key, shape in keys.items():
            if shapes.setdefault(key, shape) != shape:
                raise ValueError(f"targets of different widths share {key!r:.80}")
    for key, table in state.tables.items():
        if table.dtype != dtype or tuple(table.shape) != shapes.get(key):
            raise ValueError(f"its sums {key!r:.80} are of another type, shape or target")
        if not bool(table.isfinite().all()):
            raise ValueError(f"its sums {key!r:.80} are not finite")
    for name, keys in targets.items():
        # Until a gradient has come back, there are only the inputs.
        missing = [key for key in keys if key not in state.tables]
        gradients = [key for key in keys if not key.startswith("A.")]
        if state.counts.get(name) and missing not in ([], gradients):
            raise ValueError(f"it lacks sums of target {name!r}: {missing}")
