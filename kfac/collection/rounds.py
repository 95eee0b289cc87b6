"""The batches of a collection, checked and numbered, in rounds of processes that run in step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from kfac.collection.batches import check_tokens
from kfac.collection.sampling import batch_digest, row_contents
from lirefs.errors import DistributedError, LirefsError
from lirefs.model.processes.world import World
from lirefs.model.weight_swap import is_sharded


class Given(NamedTuple):
    """A batch of the data."""

    number: int  # from 1
    batch: Any
    contents: Sequence[bytes]  # of its rows
    digest: str  # of this batch and all before it

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"batch {self.number - 1}"


def rounds(
    batches: Iterable[Any],
    world: World,
    model: nn.Module | None,
    *,
    in_step: bool,
    compare: bool,
) -> Iterator[list[Given]]:
    """Give batches one by one; in step, one for each process at a time.

    Those of a causal language `model` are checked. A check can run the model, so all processes make
    those of a round before they begin it. The first is compared with that of the other processes.
    """
    data = hashlib.sha256()
    numbered = enumerate(batches, 1)
    while some := list(islice(numbered, world.size if in_step else 1)):
        given = []
        for number, batch in some:
            one = Given(number, batch, [], "")
            if model is not None:
                with inside_a_pass(model, world, in_step=in_step):
                    check_tokens(model, batch, one.place)
            contents = row_contents(batch)
            data.update(batch_digest(batch, contents))
            given.append(one._replace(contents=contents, digest=data.hexdigest()))
            if number == 1 and compare:
                world.agree({"batches": data.hexdigest()})
        yield given


@contextmanager
def inside_a_pass(model: nn.Module, world: World, *, in_step: bool) -> Iterator[None]:
    """In step, a failure inside a pass frees the other processes, which wait in it for this one."""
    if not in_step:
        yield
        return
    try:
        with world.telling(), world.connected():
            yield
    except BaseException as error:
        if isinstance(error, DistributedError) or not isinstance(error, LirefsError):
            sharded: Iterable[Any] = filter(is_sharded, model.parameters())
            meshes = [one.device_mesh for one in sharded]
            world.disconnect({group for mesh in meshes for group in mesh.get_all_groups()})
        raise
