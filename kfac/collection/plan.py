"""The memory that a collection needs, and the passes over which its targets are spread to fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kfac.collection.memory import activation_bytes, weights_bytes
from kfac.target import Target
from lirefs.errors import BudgetError, KfacError, TargetError, as_list, got, must_be, whole_number
from lirefs.model.language_model import BATCH_TOKENS, LanguageModel

LAPACK_SIDE = 32_766
"""Widest matrix whose workspace, 1 + 6 d + 2 d² numbers, a 32-bit whole number can count."""

# Projections of one parent module that read one input.
_SHARED = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"wi_0", "wi_1"}),
)


@dataclass(frozen=True)
class Plan:
    """Which targets are collected in which pass over the data.

    Attributes:
        passes: Targets of each pass.
        bytes: Memory of the sums in each pass, on the devices of the targets.
        total: Memory of all sums together, in main memory at the end.
        per_token: Memory for each position of a batch: the targets' inputs and output gradients
            (for one label a position), and values derived from them. The model is not included.
        dtype: Of the sums.
        rows: Of inputs and gradients, in which products are computed before they are added.
        phases: With a model, the bytes of each phase ("collect", "decompose", "edit") by what takes
            them, all at the same time; empty without one. The CPU's allocator may keep about 100 MB
            more. On an accelerator, eigenbases are in main memory.
        impossible: Sentences on what does not fit this machine; empty if all does.
    """

    passes: tuple[tuple[Target, ...], ...]
    bytes: tuple[int, ...]
    total: int
    per_token: int
    dtype: torch.dtype
    rows: torch.dtype
    phases: Mapping[str, Mapping[str, int]]
    impossible: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Plan({self})"

    def __str__(self) -> str:
        targets = sum(len(group) for group in self.passes)
        passes = f"{len(self.passes)} passes" if len(self.passes) > 1 else "1 pass"
        return (
            f"{targets} targets in {passes}: {_size(max(self.bytes))} of sums at a time, "
            f"{_size(self.total)} in the end, {_size(self.per_token)} for each token of a batch, "
            "and the model"
            + "".join(
                f"; {phase}: {_size(sum(parts.values()))} ("
                + ", ".join(f"{what} {_size(size)}" for what, size in parts.items() if size)
                + ")"
                for phase, parts in self.phases.items()
            )
            + "".join(f"; impossible here: {one}" for one in self.impossible)
        )


def plan(
    targets: Sequence[Target],
    budget: int | None = None,
    *,
    model: nn.Module | LanguageModel | None = None,
    batch: tuple[int, int] = (4, BATCH_TOKENS // 4),
    dtype: torch.dtype | None = None,
    marginals: bool = False,
    diagonal: bool = False,
    correction: bool = False,
) -> Plan:
    """Plan a collection before anything is computed; `str(plan)` sums the plan up in one line.

    Targets that read one input, judged by their names (gate and up; q, k, v), stay in one pass.
    Targets that share an input but have other names are counted separately, so the plan never
    understates the memory.

    Args:
        targets: At least one.
        budget: Bytes that the sums of one pass may take; None puts all targets into one pass.
        model: The model of the targets, for `phases`; it may be on the meta device, with no weights
            loaded. It runs one batch of tensors without data.
        batch: Sequences and tokens of each in the largest batch.
        dtype: As in `collect`.
        marginals: As in `collect`.
        diagonal: As in `collect`.
        correction: Plan `correct` instead of `collect`.

    Raises:
        BudgetError: The targets of one input alone need more than the budget.
        TargetError: No targets were given.
        KfacError: `dtype` is not None, float32 or float64, `batch` is not two whole numbers, or
            the model cannot be planned, because what it does depends on its data (some mixtures of
            experts).
    """
    targets = as_list(targets, "targets", Target, TargetError)
    if not targets:
        raise TargetError("no targets were given")
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if budget is not None and not (number and budget > 0):
        raise BudgetError(f"budget must be a number of bytes above 0, got {got(budget)}")
    if model is not None:
        must_be(model, (nn.Module, LanguageModel), "model", KfacError)
        model = model.model if isinstance(model, LanguageModel) else model
        shape = _checked(batch)
    of_sums, of_rows = _dtypes(targets, dtype)

    def need(group: Sequence[Target]) -> int:
        entries = 0
        for sharing in _groups(group):
            inputs = sharing[0].in_features
            entries += inputs**2
            for out in (target.out_features for target in sharing):
                entries += out**2 + marginals * (out**2 + inputs**2)
                entries += (diagonal or correction) * out * inputs
        return of_sums.itemsize * entries

    def per_token(group: Sequence[Target]) -> int:
        copies = 1 + (marginals or diagonal or correction)
        outs = [target.out_features for target in group]
        return of_rows.itemsize * (
            copies * sum(t.in_features for t in group) + sum(outs) + max(outs)
        )

    passes: list[list[Target]] = [[]]
    for group in _groups(targets):
        if budget is not None and need(group) > budget:
            raise BudgetError(
                f"{' and '.join(t.name for t in group)} need {_size(need(group))} for sums, more "
                f"than the budget of {_size(budget)}: raise it, or take fewer targets"
            )
        if budget is not None and passes[-1] and need([*passes[-1], *group]) > budget:
            passes.append([])
        passes[-1] += group
    needs = tuple(map(need, passes))
    most = max(map(per_token, passes))
    total, phases = sum(needs), {}
    if model is not None:
        # What the sums of earlier passes take stays in main memory.
        phases = _phases(model, targets, total, of_sums, of_rows, shape)
    widest = max(max(target.in_features, target.out_features) for target in targets)
    impossible = _impossible(phases or {"collect": {"sums": total}}, widest)
    grouped = tuple(map(tuple, passes))
    return Plan(grouped, needs, total, most, of_sums, of_rows, phases, impossible)


def _checked(batch: object) -> tuple[int, int]:
    """Return the numbers of sequences and of tokens of each."""
    numbers = as_list(batch, "batch", int, KfacError)
    if len(numbers) != 2 or not all(
        0 < whole_number(one, "batch", error=KfacError) < 2**40 for one in numbers
    ):
        raise KfacError(f"batch={batch!r}: give numbers of sequences and of tokens, each above 0")
    return int(numbers[0]), int(numbers[1])


def _phases(
    model: nn.Module,
    targets: Sequence[Target],
    total: int,
    of_sums: torch.dtype,
    of_rows: torch.dtype,
    batch: tuple[int, int],
) -> dict[str, dict[str, int]]:
    """Return the bytes of each phase by what takes them."""
    held = {"weights": weights_bytes(model), "sums": total}
    sides = [group[0].in_features for group in _groups(targets)]
    sides += [target.out_features for target in targets]
    bases = 8 * sum(side * side for side in sides)
    # The mean, its symmetric part, in which eigenvectors arise, and twice that for LAPACK.
    work = 4 * 8 * max(sides) ** 2
    # An edit copies eigenvectors to the weight's width, and holds rotated and edited weights.
    entries = sum(target.in_features * target.out_features for target in targets)
    widest = max(target.in_features * target.out_features for target in targets)
    weight = targets[0].parameter.dtype
    wide = torch.promote_types(weight, torch.float32).itemsize
    edit = wide * (bases // 8 + entries + 3 * widest) + 2 * weight.itemsize * entries
    return {
        "collect": held | activation_bytes(model, targets, of_rows, batch),
        "decompose": held | {"eigenbases": bases - 8 * max(sides) ** 2, "work": work},
        "edit": held | {"eigenbases": bases, "work": edit},
    }


def fitting_tokens(model: nn.Module, planned: Plan) -> int:
    """Return how many tokens of a batch fit into half of the free memory, beside the sums.

    Raises:
        BudgetError: Not even 256 tokens do.
    """
    targets = [target for some in planned.passes for target in some]
    one = sum(activation_bytes(model, targets, planned.rows, (4, 256)).values()) / 1024
    device = targets[0].parameter.device
    on_cpu = planned.total
    if device.type == "cuda":
        free, on_cpu = torch.cuda.mem_get_info(device)[0], max(planned.bytes)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    tokens = int((free / 2 - on_cpu) / one)
    if tokens < 256:
        raise BudgetError(
            f"batch_tokens='auto': half of {_size(free)} of free memory has no room for sums of "
            f"{_size(on_cpu)} and 256 tokens of {_size(round(one))}: "
            "take fewer targets, or a budget"
        )
    return min(tokens, 16_384)


def _impossible(phases: Mapping[str, Mapping[str, int]], widest: int) -> tuple[str, ...]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [
        f"{phase} needs {_size(sum(parts.values()))}, and this machine has {_size(memory)} of "
        "main memory"
        for phase, parts in phases.items()
        if sum(parts.values()) > memory
    ]
    if widest > LAPACK_SIDE:
        found.append(
            f"a side of {widest}: LAPACK decomposes sides of at most {LAPACK_SIDE}, because its "
            "workspace of 2 d² numbers is counted in 32 bits"
        )
    return tuple(found)


def _dtypes(
    targets: Sequence[Target], dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the sums and of the rows whose products are added to them."""
    if dtype not in (None, torch.float32, torch.float64):
        raise KfacError(f"dtype={dtype}: use torch.float32, torch.float64 or None")
    if dtype is not None:
        return dtype, dtype
    parameters = [target.parameter for target in targets]
    if any(one.device.type == "mps" for one in parameters):  # which has no float64
        return torch.float32, torch.float32
    wide = any(one.dtype == torch.float64 for one in parameters)
    return torch.float64, torch.float64 if wide else torch.float32


def _groups(targets: Sequence[Target]) -> list[list[Target]]:
    """Join targets that read one input, judged by their names."""
    groups: dict[object, list[Target]] = {}
    for target in targets:
        parent, _, own = target.name.rpartition(".")
        kin = next((names for names in _SHARED if own in names), None)
        key = target.name if kin is None else (parent, kin, target.in_features)
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _size(number: int) -> str:
    value = float(number)
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GB"
