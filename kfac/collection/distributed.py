"""Several processes of one collection: the batches of each, and the one sum at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lirefs.errors import DistributedError


class World:
    """The processes of this collection: those of `torch.distributed` if it runs, else this one.

    They are `in_step` if the model is sharded over them: then each waits for all others in every
    pass through it, so they have to make the same number of passes, and to stop together.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.size = dist.get_world_size() if running else 1
        self.in_step = sharded and self.size > 1
        self._waiting = False

    @contextmanager
    def model_pass(self, digest: str) -> Iterator[None]:
        """A pass through the model: in step all processes begin it, on the same data, or none."""
        if self.in_step:
            self.check_same_batches(digest)
        self._waiting = self.in_step
        yield
        self._waiting = False

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """In step, an error in one process is a DistributedError where the others wait for it."""
        try:
            yield
        except BaseException as error:
            # A DistributedError is one of all. While this process waits itself, it cannot send.
            told = isinstance(error, DistributedError) or self._waiting
            if self.in_step and not told:
                with suppress(Exception):
                    self.gather(_Failure(f"process {self.rank}: {type(error).__name__}: {error}"))
            raise

    def check_same_batches(self, digest: str) -> None:
        """Raise DistributedError unless all processes have batches with the same digest."""
        if len(set(self.gather(digest))) > 1:
            raise DistributedError(
                f"the {self.size} processes were given different batches: give the same to every "
                "process, and each of them takes its own share"
            )

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._waiting = True
        dist.all_gather_object(values, value)
        self._waiting = False
        if failures := [str(one) for one in values if isinstance(one, _Failure)]:
            raise DistributedError("the collection failed in " + "; ".join(failures))
        return values

    def add(self, tables: Mapping[str, Tensor]) -> None:
        """Replace each table by its sum over all processes."""
        if self.size == 1:
            return
        # One order for all processes: tables are created in the order that targets are reached.
        for _, table in sorted(tables.items()):
            moved = table.cuda() if dist.get_backend() == "nccl" else table
            dist.all_reduce(moved)
            if moved is not table:
                table.copy_(moved)


class _Failure(str):
    """What a process that has failed sends instead of a value."""
