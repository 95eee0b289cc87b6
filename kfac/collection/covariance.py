"""The running sums of a collection, and how inputs and output gradients are added to them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kfac.collection.finite import not_finite
from kfac.target import TargetRecord
from lirefs.errors import NonFiniteError
from lirefs.model.guest import full_precision

# A symmetric product is computed in at most this many row panels, each from its diagonal to the
# right: 9/16 of the work of the full product at eight panels.
_PANELS, _PANEL_WIDTH = 8, 192

# Entries of a float32 product that are computed before they are added to a float64 table. On a CPU
# they stay in its cache, so the table is all that crosses the memory.
_TILE = {"cpu": 2**20, "cuda": 2**24}

DIAGONALS = {"position": "D", "sequence": "DS"}
"""The kind of sums of the "diagonal" estimator, by what the squared gradients belong to."""


@dataclass(eq=False)
class InputRows:
    """The input rows of one use of a target, and tensors derived from them."""

    values: Tensor  # (rows, in), in the dtype of the sums
    positions: Tensor  # int64 index of each row among the batch's positions
    shape: torch.Size  # of the batch's positions, sequences first
    counted: Tensor | None = None  # indices of the rows that are counted; None when all are
    _derived: dict[str, Tensor] = field(default_factory=dict)

    def derived(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Return what `compute` returns, computed once for all gradients of these rows."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    @property
    def count(self) -> int:
        """Number of counted rows."""
        return len(self.values if self.counted is None else self.counted)

    def counted_of(self, rows: Tensor) -> Tensor:
        """Return the counted ones of these rows, of `values` or of gradients."""
        return rows if self.counted is None else rows[self.counted.to(rows.device)]

    @property
    def counted_values(self) -> Tensor:
        """The counted ones of `values`."""
        return self.derived("counted", lambda: self.counted_of(self.values))


class Sums(abc.ABC):
    """The sums that the hooks add to: `tables` holds them by "<kind>.<target>".

    Tables have the dtype `dtype`. Rows may have a narrower one; then products are computed in that,
    a tile at a time, and added to the wider table.

    With `whole_sequences` the rows of all positions are needed, not of the counted ones alone: the
    loss of a counted position has a gradient at positions before it, counted or not.
    """

    def __init__(
        self, kinds: Iterable[str], dtype: torch.dtype, *, whole_sequences: bool = False
    ) -> None:
        self.kinds = tuple(kinds)
        self.dtype = dtype
        self.whole_sequences = whole_sequences
        self.tables: dict[str, Tensor] = {}
        self._scratch: dict[torch.device, Tensor] = {}

    def shapes(self, name: str, record: TargetRecord) -> dict[str, tuple[int, int]]:
        """Return the shape of every table of a target by its key."""
        return {record.key(kind, name): record.shape(kind) for kind in self.kinds}

    @abc.abstractmethod
    def add_input(self, source: str, a: InputRows) -> None:
        """Add the inputs of all targets that share this source."""

    @abc.abstractmethod
    def add_gradient(self, name: str, g: Tensor, a: InputRows, share: float) -> None:
        """Add the output gradients (rows, out) of one draw of labels; `share` is 1 / draws."""

    def finish(self) -> None:
        """Mirror the upper triangles, the only part of symmetric tables that was computed."""
        for key, table in self.tables.items():
            # A panel at a time, because a second table may not fit.
            for start in range(0, len(table) if _is_symmetric(key) else 0, _PANEL_WIDTH):
                panel = slice(start, start + _PANEL_WIDTH)
                corner = table[panel, panel]
                corner.copy_(corner.triu() + corner.triu(1).T)
                table[start + _PANEL_WIDTH :, panel] = table[panel, start + _PANEL_WIDTH :].T

    def leave_device(self) -> None:
        """Move the tables to the CPU and free everything else: the pass is over."""
        self.tables = {key: table.cpu() for key, table in self.tables.items()}
        self._scratch = {}

    def check_overflow(self, place: str, rows: torch.dtype) -> None:
        """Raise NonFiniteError if a sum has overflowed; a diagonal of squares shows it.

        `rows` is the dtype of the rows, in which products are computed.
        """
        squares = {k: t.diagonal() if _is_symmetric(k) else t for k, t in self.tables.items()}
        for index in not_finite(list(squares.values()))[:1]:
            key = list(squares)[index]
            kind, _, name = key.partition(".")
            what = "activation" if kind == "A" else "output gradient"
            raise NonFiniteError(
                f"{place}: an {what} of target {name!r} is so large that its square overflows "
                f"{rows}; collect with dtype=torch.float64"
            )

    def table(self, key: str, left: Tensor, right: Tensor) -> Tensor:
        """Return the table for leftᵀ right; zeros at first."""
        if key not in self.tables:
            shape = left.shape[1], right.shape[1]
            self.tables[key] = left.new_zeros(shape, dtype=self.dtype)
        return self.tables[key]

    def add_product(self, key: str, left: Tensor, right: Tensor, share: float) -> None:
        """Add share · leftᵀ right to a table; both have one row for each position."""
        with full_precision(left.device):
            self._add(self.table(key, left, right), left, right, share)

    def add_sequence_squares(
        self, key: str, left: Tensor, right: Tensor, a: InputRows, share: float
    ) -> None:
        """Add share · (leftᵀ right)², entry by entry, of each sequence's own rows to a table."""
        sequences = a.positions // max(1, a.shape[1:].numel())
        with full_precision(left.device):
            for sequence in sorted(set(sequences.tolist())):
                rows = sequences == sequence
                gradient = left[rows].T @ right[rows]
                self.table(key, left, right).add_(gradient.square_(), alpha=share)

    def add_symmetric(self, key: str, left: Tensor, right: Tensor, share: float) -> None:
        """Add share · leftᵀ right, which is symmetric, to the upper triangle of a table."""
        with full_precision(left.device):
            table = self.table(key, left, right)
            width = max(_PANEL_WIDTH, -(-len(table) // _PANELS))
            for start in range(0, len(table), width):
                panel = slice(start, start + width)
                self._add(table[panel, start:], left[:, panel], right[:, start:], share)

    def _add(self, table: Tensor, left: Tensor, right: Tensor, share: float) -> None:
        """Add share · leftᵀ right to a table, or to a part of one."""
        if table.dtype == left.dtype:
            table.addmm_(left.T, right, alpha=share)
            return
        tile = _TILE.get(table.device.type, _TILE["cpu"])
        height = min(len(table), tile)
        width = min(table.shape[1], max(1, tile // height))
        scratch = self._scratch.get(table.device)
        if scratch is None or scratch.numel() < height * width:
            self._scratch[table.device] = scratch = left.new_empty(height * width)
        for top in range(0, len(table), height):
            rows = left[:, top : top + height].T
            for start in range(0, table.shape[1], width):
                part = table[top : top + height, start : start + width]
                product = scratch[: part.numel()].view(part.shape)
                torch.mm(rows, right[:, start : start + width], out=product)
                part.add_(product, alpha=share)


class CovarianceSums(Sums):
    """Sums of a aᵀ and g gᵀ; with `marginals` and `diagonal` those of their estimators as well.

    `diagonal` is False, "position" or "sequence": of what the gradients are squared.
    """

    def __init__(
        self, dtype: torch.dtype, *, marginals: bool, diagonal: str | Literal[False]
    ) -> None:
        kinds = ["A", "G", *(["AW", "GW"] if marginals else [])]
        if diagonal:
            kinds.append(DIAGONALS[diagonal])
        super().__init__(kinds, dtype, whole_sequences=diagonal == "sequence")

    def add_input(self, source: str, a: InputRows) -> None:
        """Add a aᵀ."""
        self.add_symmetric("A." + source, a.counted_values, a.counted_values, 1.0)

    def add_gradient(self, name: str, g: Tensor, a: InputRows, share: float) -> None:
        """Add g gᵀ, and the sums that need both sides."""
        if "DS" in self.kinds:
            self.add_sequence_squares("DS." + name, g, a.values, a, share)
        g, values = a.counted_of(g), a.counted_values
        self.add_symmetric("G." + name, g, g, share)
        if "AW" in self.kinds:
            a_norms = values.square().sum(1, keepdim=True)
            g_norms = g.square().sum(1, keepdim=True)
            self.add_symmetric("GW." + name, g * a_norms, g, share)
            self.add_symmetric("AW." + name, values * g_norms, values, share)
        if "D" in self.kinds:
            squares = a.derived("squares", a.values.square)
            self.add_product("D." + name, g.square(), squares, share)


def _is_symmetric(key: str) -> bool:
    """Return whether a table is one of A, AW, G and GW."""
    return key.startswith(("A", "G"))
