"""The memory that a collection needs, and the passes over which its targets are spread to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kfac.target import Target
from lirefs.errors import BudgetError, KfacError, TargetError, as_list

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
    """

    passes: tuple[tuple[Target, ...], ...]
    bytes: tuple[int, ...]
    total: int
    per_token: int
    dtype: torch.dtype
    rows: torch.dtype

    def __repr__(self) -> str:
        return f"Plan({self})"

    def __str__(self) -> str:
        targets = sum(len(group) for group in self.passes)
        passes = f"{len(self.passes)} passes" if len(self.passes) > 1 else "1 pass"
        return (
            f"{targets} targets in {passes}: {_size(max(self.bytes))} of sums at a time, "
            f"{_size(self.total)} in the end, {_size(self.per_token)} for each token of a batch, "
            "and the model"
        )


def plan(
    targets: Sequence[Target],
    budget: int | None = None,
    *,
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
        dtype: As in `collect`.
        marginals: As in `collect`.
        diagonal: As in `collect`.
        correction: Plan `correct` instead of `collect`.

    Raises:
        BudgetError: The targets of one input alone need more than the budget.
        TargetError: No targets were given.
        KfacError: `dtype` is not None, float32 or float64.
    """
    targets = as_list(targets, "targets", Target, TargetError)
    if not targets:
        raise TargetError("no targets were given")
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
    return Plan(tuple(map(tuple, passes)), needs, sum(needs), most, of_sums, of_rows)


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
