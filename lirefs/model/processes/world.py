"""Processes that do one thing together: they agree on it, and a failure of one ends it in all.

Each process writes into the store of `torch.distributed` how far it is, and whether it has failed,
and waits there until all are as far. Only then do they enter an operation of the backend together,
so none is caught in one, where not even Ctrl-C arrives, for a process that never comes; and the
group can be used again afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from importlib import metadata
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lirefs.errors import DistributedError, first_line_of_error
from lirefs.model.processes.heartbeat import FAILED, heartbeat

LATE, LATEST = 30.0, 1800.0
"""Seconds until a process that has not begun a call is named, and until the others give up."""
_SHOWN, _MOST = 40, 4
"""Characters of a value, and differences, that a message shows."""
_NEVER_SENT = 48_102
"""Tag of a message that no process sends."""
_BROKEN = re.compile("connection|socket|timed out", re.IGNORECASE)
_log = logging.getLogger(__name__)


class World:
    """The processes of one call: those of `torch.distributed` if it runs, else this one."""

    def __init__(self, call: str = "") -> None:
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.size = dist.get_world_size() if running else 1
        self._call = call
        self._step = 0
        self._reached = [0] * self.size
        if self.size > 1:
            store = dist.distributed_c10d._get_default_store()
            number = store.add(f"lirefs/calls of {self.rank}", 1)
            self.store = dist.distributed_c10d.PrefixStore(f"lirefs/call {number}", store)

    def check(self) -> None:
        """Raise DistributedError if another process has failed. Takes less than a millisecond."""
        if self.size > 1:
            with self._store_at_hand():
                if self.store.check([FAILED]):
                    raise DistributedError(f"{self._call}: {self.store.get(FAILED).decode()}")

    def wait(self) -> None:
        """Return when all processes are here; DistributedError if one fails before."""
        if self.size == 1:
            return
        self._step += 1
        began, told = time.monotonic(), False
        with self._store_at_hand():
            self.store.set(f"reached {self.rank}", str(self._step))
            while True:
                self.check()
                for rank in range(self.size):
                    self._ask(rank)
                if min(self._reached) >= self._step:
                    break
                absent = [rank for rank, step in enumerate(self._reached) if not step]
                waited = time.monotonic() - began
                if absent and waited > LATE and not told:
                    told = True
                    _log.warning(
                        "%s: waiting for %s to call it too", self._call, _processes(absent)
                    )
                if absent and waited > LATEST:
                    self.fail(f"{_processes(absent)} did not call it within {LATEST:.0f} s")
                time.sleep(min(max(waited / 10, 0.001), 0.2))
        self.check()

    def _ask(self, rank: int) -> None:
        """Note how far a process is."""
        key = f"reached {rank}"  # asking for one that is not there would wait for it
        if self._reached[rank] < self._step and (self._reached[rank] or self.store.check([key])):
            self._reached[rank] = int(self.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        self.wait()
        values: list[Any] = [None] * self.size
        with self.connected():
            dist.all_gather_object(values, value)
        return values

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise DistributedError unless all have the same; it says what differs, and where."""
        if self.size == 1:
            return
        found = self.gather({name: _text(value) for name, value in settings.items()})
        names = dict.fromkeys(name for one in found for name in one)
        differences = []
        for name in names:
            ranks: dict[str, list[int]] = {}
            for rank, one in enumerate(found):
                ranks.setdefault(one.get(name, "missing"), []).append(rank)
            if len(ranks) > 1:
                where = "; ".join(f"{value} in {_processes(some)}" for value, some in ranks.items())
                differences.append(f"{name} ({where})")
        if differences:
            more = len(differences) - _MOST
            shown = ", ".join(differences[:_MOST]) + (f" and {more} more" if more > 0 else "")
            raise DistributedError(
                f"{self._call}: the processes differ in {shown}; give the same to every process, "
                "and each of them takes its own share"
            )

    def add(self, tables: Mapping[str, Tensor]) -> None:
        """Replace each table by its sum over all processes."""
        if self.size == 1:
            return
        self.wait()
        # One order for all processes: tables are created in the order that targets are reached.
        for _, table in sorted(tables.items()):
            moved = table.cuda() if dist.get_backend() == "nccl" else table
            with self.connected():
                dist.all_reduce(moved)
            if moved is not table:
                table.copy_(moved)

    def broadcast(self, table: Tensor, owner: int) -> Tensor:
        """Return a table of the owner, which the others give an empty one for, on the CPU."""
        moved = table.cuda() if dist.get_backend() == "nccl" else table
        with self.connected():
            dist.broadcast(moved, owner)
        return moved.cpu()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise DistributedError where the backend loses the connection to another process."""
        try:
            yield
        except RuntimeError as problem:
            if self.size == 1 or not _BROKEN.search(str(problem)):
                raise
            self.check()  # may know why
            raise DistributedError(
                f"{self._call}: the connection to another process is lost "
                f"({first_line_of_error(problem)}); start all of them again"
            ) from problem

    def disconnect(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Free the processes that wait in operations of these groups; none can use them again.

        Only for gloo, where a receive that times out closes the connections of its group.
        """
        for group in groups:
            others = [rank for rank in dist.get_process_group_ranks(group) if rank != self.rank]
            if others and dist.get_backend(group) == "gloo":
                with suppress(RuntimeError):
                    waiting = dist.irecv(torch.empty(1), others[0], group, tag=_NEVER_SENT)
                    assert waiting is not None
                    waiting.wait(timedelta(milliseconds=1))

    def fail(self, reason: str) -> NoReturn:
        """End the call in all processes, this one included, with a DistributedError."""
        with suppress(RuntimeError):
            self.store.set(FAILED, reason)
        raise DistributedError(f"{self._call}: {reason}")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the other processes what fails here."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, DistributedError):  # which all of them have
                said = f"{type(error).__name__}: {first_line_of_error(error)}".removesuffix(": ")
                with suppress(RuntimeError):
                    self.store.set(FAILED, f"process {self.rank} failed with {said}")
            raise

    @contextmanager
    def _store_at_hand(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:
            raise DistributedError(
                f"{self._call}: the store of torch.distributed is out of reach, so the process "
                f"that holds it has ended ({first_line_of_error(problem)})"
            ) from problem


_OPEN: ContextVar[World | None] = ContextVar("processes of the call that runs", default=None)


@contextmanager
def together(call: str) -> Iterator[World]:
    """Give the processes of a call, which all make; what fails in one of them ends it in all.

    They agree that it is this call, and on versions. Calls inside it belong to it. Others notice a
    failure when they next `check`, `wait`, `gather` or `agree`.
    """
    outer = _OPEN.get()
    world = World(call) if outer is None else outer
    if outer is not None or world.size == 1:
        yield world
        return
    token = _OPEN.set(world)
    try:
        with heartbeat(world.store, world.rank, world.size), world.telling():
            versions = {one: metadata.version(one) for one in ("transformers", "numpy")}
            world.agree({"what is called": call, "torch": torch.__version__, **versions})
            yield world
    finally:
        _OPEN.reset(token)


def _processes(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _text(value: Any) -> str:
    """A value for messages, or its digest if that is long."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= _SHOWN:
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:12]
