"""Passes over data: forward, labels, backward, sums, checkpoints; shared by all statistics."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.collection.batches import (
    Forward,
    attended,
    check_tokens,
    data_labels,
    language_model_forward,
    on_its_device,
)
from kfac.collection.checkpoint import Checkpoint, State
from kfac.collection.covariance import Sums, check_overflow
from kfac.collection.distributed import World
from kfac.collection.finite import logits_error
from kfac.collection.hooks import Taps
from kfac.collection.plan import Plan
from kfac.collection.sampling import RowSeeds, batch_digest, label_gradients, row_contents
from kfac.target import Target, TargetRecord
from lirefs.errors import BatchError, CheckpointError, KfacError, TargetError
from lirefs.model.guest import as_guest


@dataclass(frozen=True)
class Labelling:
    """How gradients are made; see `collect` for the meaning of each field."""

    seed: int
    labels: str
    samples: int
    forward: Forward | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.labels not in ("sampled", "data"):
            raise KfacError(f"labels={self.labels!r}: use 'sampled' or 'data'")
        if self.samples < 1 or (self.labels == "data" and self.samples != 1):
            raise KfacError(f"samples={self.samples}: at least 1, and 1 with the data's labels")
        if self.dtype not in (torch.float32, torch.float64):
            raise KfacError(f"dtype={self.dtype}: sums are float32 or float64")

    def settings(self) -> dict[str, Any]:
        """Return what the sums depend on, as JSON values."""
        return {
            "seed": self.seed,
            "labels": self.labels,
            "samples": self.samples,
            "dtype": str(self.dtype),
        }


def run_passes(
    model: nn.Module,
    batches: Iterable[Any],
    layout: Plan,
    make_sums: Callable[[], Sums],
    labelling: Labelling,
    digests: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    checkpoint: str | os.PathLike[str] | None,
    every: float,
    progress: bool,
    title: str,
) -> tuple[dict[str, TargetRecord], dict[str, Tensor], int]:
    """Sum over all batches, once for each group of targets, and over all processes.

    Args:
        model: As in `collect`, as are `batches`, `checkpoint` and `progress`.
        batches: Gone through once for each pass of the layout.
        layout: Targets of each pass; said in a line where progress is shown.
        make_sums: Makes the sums of one pass.
        labelling: How gradients are made.
        digests: Of each target's weight, for its record.
        settings: What else the sums depend on; JSON values.
        checkpoint: File to keep the state in; each process has its own.
        every: Seconds between writes.
        progress: Show a bar.
        title: Of the bar.

    Returns:
        Records of all targets, the tables on CPU, and the number of counted positions.
    """
    world, groups = World(), layout.passes
    shown = progress and world.rank == 0
    if shown:
        tqdm.write(str(layout), file=sys.stderr)
    if len(groups) > 1 and iter(batches) is batches:
        raise BatchError(
            f"{len(groups)} passes are needed, but the batches can be iterated only once: give a "
            "list or a DataLoader, or a larger budget"
        )
    if checkpoint is not None and world.size > 1:
        checkpoint = f"{os.fspath(checkpoint)}.{world.rank}-of-{world.size}"
    passes = [[target.name for target in group] for group in groups]
    needed = {**labelling.settings(), **settings, "passes": passes, "processes": world.size}
    file = Checkpoint(checkpoint, every, needed)
    state = file.load()
    if checkpoint is not None:
        file.check(state, len(groups), _tables(state, groups, make_sums()), labelling.dtype)
    kept: list[Taps] = []
    first = True
    with ExitStack() as stack:
        stack.enter_context(as_guest(model))
        stack.enter_context(file.guarded(state))
        for turn, group in enumerate(groups):
            sums = make_sums()
            owners = {target.name: target.parameter.device for target in group}
            # Of an earlier pass the sums wait in main memory; of this one they go to their device.
            # They stay in the state until the pass is over: an interruption here must not save
            # a checkpoint without them.
            mine = [key for key in state.tables if key.partition(".")[2] in owners]
            for key in mine:
                device = owners[key.partition(".")[2]] if turn >= state.turn else "cpu"
                sums.tables[key] = state.tables[key].to(device, copy=True)
            counts = {name: state.counts[name] for name in owners if name in state.counts}
            sources = {name: state.sources[name] for name in owners if name in state.sources}
            taps = Taps(group, labelling.dtype, sums, counts, sources)
            others = {key: table for key, table in state.tables.items() if key not in mine}
            if turn >= state.turn:
                if turn > state.turn:
                    state.turn, state.done, state.data = turn, 0, ""
                label = title if len(groups) == 1 else f"{title} {turn + 1}/{len(groups)}"
                bar = tqdm(batches, desc=label, unit="batch", disable=not shown)
                run = _Pass(model, taps, labelling, file, state, others, world)
                with taps.hooked(), bar:
                    run(bar, compare=first)
                first = False
                sums.leave_device()
                state.whole = state.whole or state.data
                if state.data != state.whole:
                    raise BatchError(
                        f"the batches of pass {turn + 1} differ from those of pass 1, so the sums "
                        "would be of different data: give the same in the same order each time (a "
                        "list, or a DataLoader without shuffling), or a larger budget"
                    )
            kept.append(taps)
            state.tables = others | sums.tables
        file.save(state)
    world.check_equal(state.data, "batches")
    tokens = sum(world.gather(state.tokens))
    if not tokens:
        raise BatchError(f"none of the {state.done} batches has a counted position")
    records: dict[str, TargetRecord] = {}
    tables: dict[str, Tensor] = {}
    for taps in kept:
        records |= _finish(taps, digests, world)
        tables |= taps.sums.tables
    return records, tables, tokens


@dataclass
class _Pass:
    """One pass over the data for one group of targets."""

    model: nn.Module
    taps: Taps
    labelling: Labelling
    checkpoint: Checkpoint
    state: State
    others: Mapping[str, Tensor]
    world: World

    def __call__(self, bar: Any, *, compare: bool) -> None:
        """Go through all batches, from where the state is.

        Args:
            bar: The batches, in a progress bar.
            compare: Compare the first batch with that of the other processes.
        """
        state, world, sums = self.state, self.world, self.taps.sums
        seeds = RowSeeds(self.labelling.seed)
        data = hashlib.sha256()
        began, summed, seen = time.perf_counter(), 0, 0
        state.tables = {**self.others, **sums.tables}
        for index, batch in enumerate(bar):
            if self.labelling.forward is None:
                check_tokens(self.model, batch, f"batch {index}")
            contents = row_contents(batch)
            data.update(batch_digest(batch, contents))
            seen = index + 1
            if index == 0 and compare:
                world.check_equal(data.hexdigest(), "batches")
            if index < state.done or not world.owns(index):
                seeds.skip(contents)
                if seen == state.done and state.data != data.hexdigest():
                    raise CheckpointError(
                        f"{self.checkpoint.path} was written with other data, or in another order: "
                        f"its first {seen} batches differ from those given now"
                    )
                if seen > state.done:
                    state.done, state.data = seen, data.hexdigest()
                continue
            self.checkpoint.before_batch()
            ready = on_its_device(batch, self.model)
            counted = self._backpropagate(ready, contents, seeds, index)
            if counted:
                self.checkpoint.before_sums()
                self.taps.add(self.labelling.samples)
                check_overflow(sums.tables, f"batch {index}")
            summed += counted
            state.tokens += counted if state.turn == 0 else 0
            state.done, state.data = seen, data.hexdigest()
            state.counts |= self.taps.counts
            state.sources |= self.taps.sources
            state.tables = {**self.others, **sums.tables}
            bar.set_postfix_str(f"{summed / (time.perf_counter() - began):.0f} tokens/s")
            self.checkpoint.after_batch(state)
        if not seen:
            raise BatchError("the iterable of batches is empty")
        if seen < state.done:
            raise CheckpointError(
                f"{self.checkpoint.path} was written after {state.done} batches, but only {seen} "
                "are given"
            )

    def _backpropagate(
        self, batch: Any, contents: Sequence[bytes], seeds: RowSeeds, index: int
    ) -> int:
        """Run the model, draw labels and backpropagate; return the number of counted positions."""
        labelling, place = self.labelling, f"batch {index}"
        self.taps.begin()
        logits, mask, *rest = (labelling.forward or language_model_forward)(self.model, batch)
        shape = logits.shape[:-1]
        if not shape or mask.ndim == 0 or mask.shape[0] != shape[0] or len(contents) != shape[0]:
            raise BatchError(
                f"{place}: logits {tuple(logits.shape)} and mask {tuple(mask.shape)} must both "
                f"begin with the number of sequences, {len(contents)}"
            )
        mask = mask.bool()
        labelled = mask if mask.shape == shape else torch.ones(shape, dtype=torch.bool)
        uniforms = labels = None
        if labelling.labels == "data":
            seeds.skip(contents)
            labels = self._given_labels(batch, rest, shape, place)[labelled].long()
            if bool(((labels < 0) | (labels >= logits.shape[-1])).any()):
                raise BatchError(
                    f"{place}: a label of a counted position is not in the vocabulary of "
                    f"{logits.shape[-1]}; -100 marks what is not counted"
                )
        else:
            # Drawing at every real token, counted or not, makes a label independent of the mask.
            real = attended(batch)
            drawn = real if real is not None and real.shape == shape else labelled
            where = drawn | labelled.to(drawn.device)
            uniforms = seeds.draw(contents, where, labelling.samples)[:, labelled.cpu()]
        counted = int(mask.sum())
        if not counted:
            return 0
        if not logits.requires_grad:
            raise TargetError("the logits depend on no target: the forward pass calls none of them")
        self.taps.read(mask, place)
        rows = labelled.flatten().nonzero()[:, 0]
        gradients = label_gradients(logits.detach(), rows, uniforms, labels)
        if gradients is None:
            raise logits_error(logits, labelled, place)
        for draw, gradient in enumerate(gradients, 1):
            torch.autograd.backward(logits, gradient, retain_graph=draw < labelling.samples)
        self.taps.check_gradients(place)
        return counted

    def _given_labels(
        self, batch: Any, rest: Sequence[Tensor], shape: torch.Size, place: str
    ) -> Tensor:
        """Return the data's labels, shaped as the logits without their last axis."""
        if self.labelling.forward is None:
            return data_labels(batch)
        if not rest or rest[0].shape != shape:
            raise BatchError(
                f"{place}: with labels='data', `forward` must return labels of shape "
                f"{tuple(shape)} as its third value"
            )
        return rest[0]


def _tables(
    state: State, groups: Sequence[Sequence[Target]], sums: Sums
) -> dict[str, dict[str, tuple[int, int]]]:
    """Shapes of the sums of every target, by key, where inputs are shared as a state says."""
    found = {}
    for target in (target for group in groups for target in group):
        source = state.sources.get(target.name, target.name)
        record = TargetRecord(target.out_features, target.in_features, 0, source, "")
        found[target.name] = sums.keys(target.name, record)
    return found


def _finish(taps: Taps, digests: Mapping[str, str], world: World) -> dict[str, TargetRecord]:
    """Add up what the processes have, and return the records."""
    sums = taps.sums
    parts = world.gather((taps.counts, taps.sources, list(sums.tables)))
    taps.counts = {name: sum(counts[name] for counts, _, _ in parts) for name in taps.counts}
    for _, sources, _ in parts:
        if any(taps.sources.get(name, source) != source for name, source in sources.items()):
            raise KfacError("targets shared their input in some processes only")
        taps.sources |= sources
    records = taps.records(digests)
    reached = {key for _, _, keys in parts for key in keys}
    for name in taps.targets:
        keys = sums.keys(name, records[name])
        if records[name].count and not any(key in reached for key in keys if key[0] != "A"):
            raise TargetError(f"targets whose output never reaches the logits: {[name]}")
        for key, shape in keys.items():
            if key not in sums.tables:
                sums.tables[key] = torch.zeros(shape, dtype=taps.dtype)
    world.add(sums.tables)
    sums.finish()
    return records
