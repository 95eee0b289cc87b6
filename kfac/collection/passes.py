"""Passes over data: forward, labels, backward, sums and checkpoints, for all statistics."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.collection.batches import (
    attended,
    language_model_forward,
    must_be_causal,
    on_its_device,
)
from kfac.collection.checkpoint import Checkpoint, State
from kfac.collection.covariance import Sums
from kfac.collection.finite import not_finite_logits_error
from kfac.collection.head import Head
from kfac.collection.hooks import TargetTracker
from kfac.collection.options import Options
from kfac.collection.plan import Plan
from kfac.collection.rounds import Given, inside_a_pass, rounds
from kfac.collection.sampling import (
    RowSeeds,
    exact_gradients,
    label_gradients,
)
from kfac.target import Target, TargetRecord
from kfac.targets import must_pass_gradients
from lirefs.errors import BatchError, CheckpointError, KfacError, ProvenanceError, TargetError
from lirefs.model.guest import as_guest
from lirefs.model.identity import fingerprint, identity
from lirefs.model.processes.world import World
from lirefs.model.weight_swap import fsdp_modules
from lirefs.version import __version__


def run_passes(
    model: nn.Module,
    batches: Iterable[Any],
    planned: Plan,
    make_sums: Callable[[torch.dtype], Sums],
    options: Options,
    digests: Mapping[str, str],
    settings: Mapping[str, Any],
    world: World,
    title: str,
) -> tuple[dict[str, TargetRecord], dict[str, Tensor], int]:
    """Sum over all batches, in each pass of the plan, and over all processes.

    `settings` are JSON values that the sums depend on besides the options. Returned are the records
    of all targets, the tables on CPU, and the number of counted positions.

    If the model is sharded over the processes, each waits for all others in every pass through it,
    so they run in step: they make the same number of passes, and begin each together or not at all.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        # Its forward pass waits for the other processes, which may have fewer batches.
        model = model.module
    passes, in_step = planned.passes, world.size > 1 and bool(fsdp_modules(model))
    if in_step and options.labels == "exact":
        raise KfacError(
            "labels='exact' takes a different number of backward passes for each batch, and "
            "processes that share a model's weights run in step: load the model in one process"
        )
    shown = options.progress and world.rank == 0
    if shown:
        tqdm.write(str(planned), file=sys.stderr)
    if len(passes) > 1 and iter(batches) is batches:
        raise BatchError(
            f"{len(passes)} passes are needed, but the batches can be iterated only once: give a "
            "list or a DataLoader, or a larger budget"
        )
    path = options.checkpoint
    if path is not None and world.size > 1:
        path = f"{os.fspath(path)}.{world.rank}-of-{world.size}"
    names = [[target.name for target in targets] for targets in passes]
    empty = partial(make_sums, planned.dtype)
    drawn = {"seed": options.seed, "labels": options.labels, "samples": options.samples}
    split = {"passes": names, "processes": world.size}
    needed = {**drawn, "dtype": str(options.dtype), **settings, **split}
    if options.head_dtype is not None:
        needed["head_dtype"] = str(options.head_dtype)
    if path is not None:
        needed["model"] = identity(model)
    if world.size > 1:
        settings = {key: value for key, value in needed.items() if key not in ("digests", "model")}
        weights = {f"target {name!r}": digests[name][:12] for name in chain(*names)}
        # Reading a sharded model takes all processes, and one that cannot would leave the others.
        state_of_model = "sharded" if in_step else _state(model)
        world.agree({"lirefs": __version__, **settings, "model": state_of_model, **weights})
    checkpoint = Checkpoint(path, options.checkpoint_every, needed)
    state = checkpoint.load(len(passes), partial(_shapes, passes, empty), planned.dtype)
    trackers: list[TargetTracker] = []
    with as_guest(model), checkpoint.guarded(state):
        must_pass_gradients(model)
        if options.forward is None and not in_step:  # a check runs the model where it must
            must_be_causal(model)
        # In step, processes make the same passes, and a head is tried out where it is needed.
        own = options.forward is None and options.labels != "exact" and not in_step
        every = [one for some in passes for one in some]
        head = Head.find(model, every, options.head_dtype) if own else None
        first = state.turn
        start = min(world.gather(first)) if in_step else first
        for turn, targets in enumerate(passes):
            tracker = _resumed(targets, empty(), planned.rows, state, on_cpu=turn < first)
            if turn >= start:
                if turn > first:
                    state.turn, state.done, state.data = turn, 0, ""
                label = title if len(passes) == 1 else f"{title} {turn + 1}/{len(passes)}"
                bar = tqdm(batches, desc=label, unit="batch", disable=not shown or None)
                run = _Pass(model, tracker, options, checkpoint, state, world, in_step, head)
                with tracker.hooked(), bar:
                    run(bar, compare=turn == start, over=turn < first)
                tracker.sums.leave_device()
                state.whole = state.whole or state.data
                if turn >= first and state.data != state.whole:
                    raise BatchError(
                        f"the batches of pass {turn + 1} differ from those of pass 1, so the sums "
                        "would be of different data: give the same in the same order each time (a "
                        "list, or a DataLoader without shuffling), or a larger budget"
                    )
            trackers.append(tracker)
            state.tables = state.tables | tracker.sums.tables
        checkpoint.save(state)
    world.agree({"batches": state.data})
    tokens = sum(world.gather(state.tokens))
    if not tokens:
        raise BatchError(f"none of the {state.done} batches has a counted position")
    records: dict[str, TargetRecord] = {}
    tables: dict[str, Tensor] = {}
    for tracker in trackers:
        records |= _finish(tracker, digests, world)
        tables |= tracker.sums.tables
    return records, tables, tokens


def _state(model: nn.Module) -> str:
    """What tells a model from others, as far as that can be known."""
    found = "unknown"
    with suppress(ProvenanceError):
        found = fingerprint(model)
        found = identity(model)
    return found


def _shapes(
    passes: Sequence[Sequence[Target]], make_sums: Callable[[], Sums], state: State
) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the shapes of the sums of every target, by key, if inputs are shared as in a state."""
    shapes, sums = {}, make_sums()
    for target in (target for targets in passes for target in targets):
        record = target.record(0, state.sources.get(target.name, target.name), "")
        shapes[target.name] = sums.shapes(target.name, record)
    return shapes


def _resumed(
    targets: Sequence[Target], sums: Sums, dtype: torch.dtype, state: State, *, on_cpu: bool
) -> TargetTracker:
    """Return a tracker that continues from a state, with copies of its sums for these targets."""
    # The sums of an earlier pass stay in main memory. The state keeps its own until the first batch
    # of this pass: an interruption here must not save a checkpoint without them.
    devices = {target.name: target.parameter.device for target in targets}
    for key, table in state.tables.items():
        name = key.partition(".")[2]
        if name in devices:
            sums.tables[key] = table.to("cpu" if on_cpu else devices[name], copy=True)
    tracker = TargetTracker(targets, dtype, sums)
    tracker.counts |= {name: n for name, n in state.counts.items() if name in devices}
    tracker.sources = {name: one for name, one in state.sources.items() if name in devices}
    return tracker


@dataclass
class _Pass:
    """One pass over the data for one group of targets."""

    model: nn.Module
    tracker: TargetTracker
    options: Options
    checkpoint: Checkpoint
    state: State
    world: World
    in_step: bool
    head: Head | None  # of a language model whose logits may be computed a few at a time
    head_agrees: bool = False

    def __call__(self, bar: Any, *, compare: bool, over: bool) -> None:
        """Sum over the batches that the state lacks; `compare` the first with other processes'.

        If this pass is `over` here, and not for all processes, the model is run along with them.
        """
        state, world, sums = self.state, self.world, self.tracker.sums
        seeds = RowSeeds(self.options.seed)
        began, summed, seen = time.perf_counter(), 0, 0
        done = sys.maxsize if over else state.done
        # In step all go back to the least that one of them has done, by whole rounds.
        start = min(world.gather(done)) // world.size * world.size if self.in_step else done
        state.tables = state.tables | sums.tables
        checked = self.model if self.options.forward is None else None
        for given in rounds(bar, world, checked, in_step=self.in_step, compare=compare):
            world.check()
            for one in given:
                seen = one.number
                if seen == done and state.data != one.digest:
                    raise CheckpointError(
                        f"{self.checkpoint.path} was written with other data, or in another order: "
                        f"its first {seen} batches differ from those given now"
                    )
                if seen <= start or (seen - 1) % world.size != world.rank:
                    seeds.skip(one.contents)
                    if seen > done:
                        state.done, state.data = seen, one.digest
                    continue
                with self.checkpoint.batch(state):
                    counted = self._backpropagate(one, seeds, given[-1].digest)
                    if seen <= done:
                        continue
                    if counted:
                        self.checkpoint.changing = True
                        self.tracker.add(self.options.samples)
                        sums.check_overflow(one.place, self.tracker.dtype)
                    summed += counted
                    state.tokens += counted if state.turn == 0 else 0
                    state.done, state.data = seen, one.digest
                    state.counts |= self.tracker.counts
                    state.sources |= self.tracker.sources
                    state.tables = state.tables | sums.tables
                    bar.set_postfix_str(f"{summed / (time.perf_counter() - began):.0f} tokens/s")
            if self.in_step and start < seen and world.rank >= len(given):
                # The last round has no batch for this process, which the others wait for.
                with self.checkpoint.batch(state):
                    self._backpropagate(given[-1], seeds, given[-1].digest)
        if not seen:
            raise BatchError("the iterable of batches is empty")
        if not over and seen < done:
            raise CheckpointError(
                f"{self.checkpoint.path} was written after {done} batches, but only {seen} "
                "are given"
            )
        if self.in_step:
            world.agree({"batches": given[-1].digest})

    def _backpropagate(self, given: Given, seeds: RowSeeds, data: str) -> int:
        """Run the model, choose labels, backpropagate; return the number of counted positions.

        `data` is the digest of all batches of this round and before.
        """
        contents, place = given.contents, given.place
        batch = on_its_device(given.batch, self.model)
        forward, samples = self.options.forward or language_model_forward, self.options.samples
        head = self._needed_head(batch)
        self.tracker.begin()
        rest: Sequence[Tensor] = ()
        if head is None:
            with self._model_pass(data):
                end, mask, *rest = forward(self.model, batch)
            classes = end.shape[-1]
        else:
            hidden, mask = head.hidden_states(self.model, batch)
            assert hidden is not None  # `agrees` has seen one call
            end, classes = hidden, head.linear.out_features
        shape = end.shape[:-1]
        if not shape or mask.ndim == 0 or mask.shape[0] != shape[0] or len(contents) != shape[0]:
            raise BatchError(
                f"{place}: logits {tuple(end.shape)} and mask {tuple(mask.shape)} must both "
                f"begin with the number of sequences, {len(contents)}"
            )
        mask = mask.bool()
        labelled = mask if mask.shape == shape else torch.ones(shape, dtype=torch.bool)
        uniforms = labels = None
        real = attended(batch)
        if self.options.labels == "exact":
            seeds.skip(contents)
        elif self.options.labels == "data":
            seeds.skip(contents)
            labels = self._given_labels(batch, rest, shape, place)[labelled].long()
            if bool(((labels < 0) | (labels >= classes)).any()):
                raise BatchError(
                    f"{place}: a label of a counted position is not in the vocabulary of "
                    f"{classes}; -100 marks positions that are not counted"
                )
        else:
            # A draw at every real token, counted or not, makes labels independent of the mask.
            drawn = real if real is not None and real.shape == shape else labelled
            where = drawn | labelled.to(drawn.device)
            uniforms = seeds.draw(contents, where, samples)[:, labelled.cpu()]
        counted = int(mask.sum())
        if not counted and not self.in_step:
            return 0
        if not end.requires_grad:
            raise TargetError("the logits depend on no target: the forward pass calls none of them")
        same = real is not None and real.shape == mask.shape
        self.tracker.read(mask, real if same and real is not None else torch.ones_like(mask), place)
        gradients: Iterable[Tensor] | None
        if head is not None:
            gradients = head.gradients(end, labelled, uniforms, labels, place)
        elif self.options.labels == "exact":
            gradients = exact_gradients(end.detach(), labelled, place)
        else:
            rows = labelled.flatten().nonzero()[:, 0]
            gradients = label_gradients(end.detach(), rows, uniforms, labels)
        if gradients is None:
            raise not_finite_logits_error(end, labelled, place)
        with self._model_pass(data):
            for draw, gradient in enumerate(gradients, 1):
                more = draw < samples or self.options.labels == "exact"
                torch.autograd.backward(end, gradient, retain_graph=more)
        self.tracker.check_gradients(place)
        return counted

    @contextmanager
    def _model_pass(self, data: str) -> Iterator[None]:
        """A pass through the model: in step all processes begin it, on the same data, or none."""
        if self.in_step:
            self.world.agree({"batches": data})
        with inside_a_pass(self.model, self.world, in_step=self.in_step):
            yield

    def _needed_head(self, batch: Any) -> Head | None:
        """Return the head if it is to compute the logits of a batch, and gives the model's."""
        if self.head is not None and self.head.is_needed(batch) and not self.head_agrees:
            self.head_agrees = self.head.agrees(self.model, batch)
            self.head = self.head if self.head_agrees else None
        if self.head is None and self.options.head_dtype is not None:
            raise KfacError(
                "head_dtype: the logits of this model are not those of one matrix that is not a "
                "target, so their dtype cannot be chosen"
            )
        return self.head if self.head is not None and self.head.is_needed(batch) else None

    def _given_labels(
        self, batch: Any, rest: Sequence[Tensor], shape: torch.Size, place: str
    ) -> Tensor:
        """Return the data's labels, with the shape of the logits without their last axis."""
        if self.options.forward is None:
            given = batch.get("labels")
            following = given if isinstance(given, Tensor) else batch["input_ids"]
            return following.roll(-1, 1)  # the last column is never counted
        if not rest or rest[0].shape != shape:
            raise BatchError(
                f"{place}: with labels='data', `forward` must return labels of shape "
                f"{tuple(shape)} as its third value"
            )
        return rest[0]


def _finish(
    tracker: TargetTracker, digests: Mapping[str, str], world: World
) -> dict[str, TargetRecord]:
    """Add the sums and counts of all processes, and return the records."""
    sums = tracker.sums
    parts = world.gather((tracker.counts, tracker.sources, list(sums.tables)))
    tracker.counts = {name: sum(counts[name] for counts, _, _ in parts) for name in tracker.counts}
    for _, sources, _ in parts:
        if any(tracker.sources.get(name, source) != source for name, source in sources.items()):
            raise KfacError("targets shared their input in some processes only")
        tracker.sources |= sources
    records = tracker.records(digests)
    reached = {key for _, _, keys in parts for key in keys}
    for name, record in records.items():
        shapes = sums.shapes(name, record)
        if record.count and not any(key in reached for key in shapes if key[0] != "A"):
            raise TargetError(f"targets whose output never reaches the logits: {[name]}")
        for key, shape in shapes.items():
            if key not in sums.tables:
                sums.tables[key] = torch.zeros(shape, dtype=sums.dtype)
    world.add(sums.tables)
    sums.finish()
    return records
