"""Several processes of one collection: the batches of each, and the one sum at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lirefs.errors import DistributedError


class World:
    """The processes of this collection: those of `torch.distributed` if it runs, else this one."""

    def __init__(self) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.size = dist.get_world_size() if running else 1

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
        dist.all_gather_object(values, value)
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
