"""Passes over data: forward, labels, backward, sums, checkpoints; shared by all statistics."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kfac.checkpoint import Checkpoint, State
from kfac.distributed import World
from kfac.errors import BatchError, CheckpointError, KfacError, NonFiniteError, TargetError
from kfac.factors import TargetRecord
from kfac.guest import as_guest
from kfac.hooks import Taps
from kfac.sampling import (
    RowSeeds,
    attended,
    batch_digest,
    data_labels,
    label_gradients,
    row_contents,
)
from kfac.sums import Sums, check_finite
from kfac.targets import Target

Forward = Callable[[nn.Module, Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
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
    groups: Sequence[Sequence[Target]],
    make_sums: Callable[[], Sums],
    recipe: Recipe,
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    *,
    progress: bool,
    title: str,
) -> tuple[dict[str, TargetRecord], dict[str, Tensor], int]:
    """Sum over all batches, once for each group of targets, and over all processes.

    Returns:
        Records of all targets, the tables on CPU, and the number of counted positions.
    """
    if len(groups) > 1 and iter(batches) is batches:
        raise BatchError(
            f"{len(groups)} passes are needed, but the batches can be iterated only once: give a "
            "list or a DataLoader, or a larger budget"
        )
    world = World()
    state = checkpoint.load()
    if checkpoint.path is not None:
        checkpoint.check(state, len(groups), _tables(state, groups, make_sums()), recipe.dtype)
    kept: list[tuple[Taps, Sums]] = []
    first = True
    with ExitStack() as stack:
        stack.enter_context(as_guest(model))
        stack.enter_context(checkpoint.guarded(state))
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
            taps = Taps(group, recipe.dtype, sums, counts, sources)
            others = {key: table for key, table in state.tables.items() if key not in mine}
            if turn >= state.turn:
                if turn > state.turn:
                    state.turn, state.done, state.data = turn, 0, ""
                label = title if len(groups) == 1 else f"{title} {turn + 1}/{len(groups)}"
                quiet = not progress or world.rank > 0
                bar = tqdm(batches, desc=label, unit="batch", disable=quiet)
                run = _Pass(model, taps, sums, recipe, checkpoint, state, others, world)
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
            kept.append((taps, sums))
            state.tables = others | sums.tables
        checkpoint.save(state)
    world.check_equal(state.data, "batches")
    tokens = sum(world.gather(state.tokens))
    if not tokens:
        raise BatchError(f"none of the {state.done} batches has a counted position")
    records: dict[str, TargetRecord] = {}
    tables: dict[str, Tensor] = {}
    for taps, sums in kept:
        records |= _finish(taps, sums, digests, world)
        tables |= sums.tables
    return records, tables, tokens


def language_model_forward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a causal language model; the default `forward` of `collect`.

    Args:
        model: Takes input_ids and the batch's other tensors; returns logits or an output with
            a `logits` field.
        batch: As described in `collect`.

    Returns:
        Logits (B, T, vocabulary) and the bool mask (B, T) of positions that predict a counted
        token.
    """
    real = attended(batch)
    if real is None:
        raise BatchError("a batch of a language model needs input_ids as a tensor")
    inputs: dict[str, Any] = {
        k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"
    }
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "position_ids" in accepted and "position_ids" not in inputs and not bool(real.all()):
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"the model returned a {type(output).__name__} without logits; pass `forward`"
        )
    counted = torch.zeros_like(real)
    torch.logical_and(real[:, :-1], real[:, 1:], out=counted[:, :-1])
    if isinstance(batch.get("labels"), Tensor):
        counted[:, :-1].logical_and_(batch["labels"][:, 1:] != -100)
    return logits, counted


@dataclass
class _Pass:
    """One pass over the data for one group of targets."""

    model: nn.Module
    taps: Taps
    sums: Sums
    recipe: Recipe
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
        state, world = self.state, self.world
        seeds = RowSeeds(self.recipe.seed)
        data = hashlib.sha256()
        device = _device(self.model)
        began, summed, seen = time.perf_counter(), 0, 0
        state.tables = {**self.others, **self.sums.tables}
        for index, batch in enumerate(bar):
            if self.recipe.forward is None:
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
            ready = _to_device(batch, device)
            counted = _add_batch(self.model, ready, contents, self.taps, seeds, self.recipe, index)
            if counted:
                check_finite(self.sums.tables, f"batch {index}")
            summed += counted
            state.tokens += counted if state.turn == 0 else 0
            state.done, state.data = seen, data.hexdigest()
            state.counts |= self.taps.counts
            state.sources |= self.taps.sources
            state.tables = {**self.others, **self.sums.tables}
            bar.set_postfix_str(f"{summed / (time.perf_counter() - began):.0f} tokens/s")
            self.checkpoint.after_batch(state)
        if not seen:
            raise BatchError("the iterable of batches is empty")
        if seen < state.done:
            raise CheckpointError(
                f"{self.checkpoint.path} was written after {state.done} batches, but only {seen} "
                "are given"
            )


def _add_batch(
    model: nn.Module,
    batch: Any,
    contents: Sequence[bytes],
    taps: Taps,
    seeds: RowSeeds,
    recipe: Recipe,
    index: int,
) -> int:
    """Draw labels, backpropagate, add to the sums; return the number of counted positions."""
    taps.begin()
    logits, mask, *rest = (recipe.forward or language_model_forward)(model, batch)
    shape = logits.shape[:-1]
    if not shape or mask.ndim == 0 or mask.shape[0] != shape[0] or len(contents) != shape[0]:
        raise BatchError(
            f"batch {index}: logits {tuple(logits.shape)} and mask {tuple(mask.shape)} must both "
            f"begin with the number of sequences, {len(contents)}"
        )
    mask = mask.bool()
    labelled = mask if mask.shape == shape else torch.ones(shape, dtype=torch.bool)
    real = attended(batch)
    uniforms = labels = None
    if recipe.labels == "data":
        seeds.skip(contents)
        labels = _given_labels(batch, rest, shape, recipe, index)[labelled].long()
        if bool(((labels < 0) | (labels >= logits.shape[-1])).any()):
            raise BatchError(
                f"batch {index}: a label of a counted position is not in the vocabulary of "
                f"{logits.shape[-1]}; -100 marks what is not counted"
            )
    else:
        # Drawing at every real token, counted or not, makes a label independent of the mask.
        drawn = real if real is not None and real.shape == shape else labelled
        where = drawn | labelled.to(drawn.device)
        uniforms = seeds.draw(contents, where, recipe.samples)[:, labelled.cpu()]
    counted = int(mask.sum())
    if not counted:
        return 0
    if not logits.requires_grad:
        raise TargetError("the logits depend on no target: the forward pass calls none of them")
    rows = labelled.flatten().nonzero()[:, 0]
    gradients = label_gradients(logits.detach(), rows, uniforms, labels)
    if gradients is None:
        raise NonFiniteError(f"batch {index}: the logits hold NaN or infinity")
    taps.add_inputs(mask, recipe.samples)
    for draw, gradient in enumerate(gradients, 1):
        torch.autograd.backward(logits, gradient, retain_graph=draw < recipe.samples)
    return counted


def _given_labels(
    batch: Any, rest: Sequence[Tensor], shape: torch.Size, recipe: Recipe, index: int
) -> Tensor:
    """Return the data's labels, shaped as the logits without their last axis."""
    if recipe.forward is None:
        return data_labels(batch)
    if not rest or rest[0].shape != shape:
        raise BatchError(
            f"batch {index}: with labels='data', `forward` must return labels of shape "
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


def _finish(
    taps: Taps, sums: Sums, digests: Mapping[str, str], world: World
) -> dict[str, TargetRecord]:
    """Add up what the processes have, and return the records."""
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


def check_tokens(model: nn.Module, batch: Any, place: str) -> None:
    """Verify that a batch is one that a causal language model can be given.

    Args:
        model: If it names its embedding, as those of transformers do, ids must lie within it.
        batch: What was given as a batch.
        place: Name of the batch, for messages.

    Raises:
        BatchError: No mapping with integer input_ids (B, T), a mask or labels of another shape, or
            an id outside the vocabulary.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise BatchError(
            f"{place} must be a mapping with input_ids as a tensor, not a "
            f"{type(batch).__name__}; for other models pass `forward`"
        )
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    if len(shape) != 2 or not ids.numel() or ids.dtype not in (torch.int32, torch.int64):
        raise BatchError(
            f"{place}: input_ids must be integers of shape (B, T), not empty, but are "
            f"{ids.dtype} of {tuple(shape)}"
        )
    for key in ("attention_mask", "labels"):
        value = batch.get(key)
        if value is not None and (not isinstance(value, Tensor) or value.shape != shape):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchError(
                f"{place}: {key} must be a tensor of shape {tuple(shape)}, not {found}"
            )
    size = _vocabulary(model)
    if size is not None and bool(((ids < 0) | (ids >= size)).any()):
        raise BatchError(f"{place}: an id in input_ids is not in the model's vocabulary of {size}")


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that a model of transformers can embed."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    # Offloaded weights are on the meta device; accelerate's hooks then move the inputs.
    if parameter is None or parameter.is_meta:
        return torch.device("cpu")
    return parameter.device


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to_device(value, device) for value in batch]
    return batch
