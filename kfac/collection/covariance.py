"""The running sums of a collection: what is added for each input and each output gradient."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor

from kfac.target import TargetRecord
from lirefs.errors import NonFiniteError
from lirefs.model.guest import full_precision

# A symmetric product is computed in at most this many row panels, each from its diagonal to the
# right: 9/16 of the work of the full product at eight panels.
_PANELS, _PANEL_WIDTH = 8, 192


class Rows:
    """The counted rows of one use of a target, and what is derived from them.

    Attributes:
        values: Shape (rows, width), in the dtype of the sums.
        positions: Index of each row among the batch's positions, int64.
        shape: Of the batch's positions, sequences first.
    """

    def __init__(self, values: Tensor, positions: Tensor, shape: torch.Size) -> None:
        self.values = values
        self.positions = positions
        self.shape = shape
        self.cache: dict[str, Tensor] = {}

    @property
    def sequences(self) -> Tensor:
        """Index of the sequence that each row belongs to, int64."""
        return self.positions // max(1, self.shape[1:].numel())


class Sums(abc.ABC):
    """What the hooks feed. `tables` holds everything that is summed, by "<letter>.<target>"."""

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}

    @abc.abstractmethod
    def add_input(self, source: str, a: Rows) -> None:
        """Add the inputs of all targets that share this source."""

    @abc.abstractmethod
    def add_gradient(self, name: str, g: Tensor, a: Rows, share: float) -> None:
        """Add the output gradients of a target.

        Args:
            name: Of the target.
            g: Shape (rows, out).
            a: The same positions' inputs.
            share: Weight of this draw of labels: one over the number of draws.
        """

    @abc.abstractmethod
    def keys(self, name: str, record: TargetRecord) -> dict[str, tuple[int, int]]:
        """Return the key and shape of every table that a target needs."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Bring the tables into their final form."""

    def leave_device(self) -> None:
        """Move the tables to the CPU and let go of all else: the pass is over."""
        self.tables = {key: table.cpu() for key, table in self.tables.items()}


class CovarianceSums(Sums):
    """Sums for K-FAC; with `marginals` also norm-weighted; with `diagonal` also entry by entry.

    Args:
        marginals: Sum ‖a‖² g gᵀ and ‖g‖² a aᵀ as well.
        diagonal: Sum the squared entries of g aᵀ as well.
    """

    def __init__(self, *, marginals: bool, diagonal: bool) -> None:
        super().__init__()
        self.marginals = marginals
        self.diagonal = diagonal

    def add_input(self, source: str, a: Rows) -> None:
        """Add a aᵀ."""
        _add_symmetric(self.tables, "A." + source, a.values, a.values, 1.0)

    def add_gradient(self, name: str, g: Tensor, a: Rows, share: float) -> None:
        """Add g gᵀ, and what needs both sides."""
        _add_symmetric(self.tables, "G." + name, g, g, share)
        if self.marginals:
            a_norms = a.values.square().sum(1, keepdim=True)
            g_norms = g.square().sum(1, keepdim=True)
            _add_symmetric(self.tables, "GW." + name, g * a_norms, g, share)
            _add_symmetric(self.tables, "AW." + name, a.values * g_norms, a.values, share)
        if self.diagonal:
            if "squares" not in a.cache:
                a.cache["squares"] = a.values.square()
            add_product(self.tables, "D." + name, g.square(), a.cache["squares"], share)

    def keys(self, name: str, record: TargetRecord) -> dict[str, tuple[int, int]]:
        """Return the key and shape of every table that a target needs."""
        out, into = record.out_features, record.in_features
        keys = {"A." + record.source: (into, into), "G." + name: (out, out)}
        if self.marginals:
            keys |= {"AW." + name: (into, into), "GW." + name: (out, out)}
        if self.diagonal:
            keys["D." + name] = (out, into)
        return keys

    def finish(self) -> None:
        """Mirror the upper triangles, which are all that was computed."""
        for key, table in self.tables.items():
            if not key.startswith("D."):
                table.copy_(table.triu() + table.triu(1).T)


def add_product(
    tables: dict[str, Tensor], key: str, left: Tensor, right: Tensor, share: float
) -> None:
    """Add share · leftᵀ right to a table; left and right have one row for each position."""
    with full_precision(left.device):
        table = _table(tables, key, left, right)
        table.addmm_(left.T, right, alpha=share)


def check_overflow(tables: Mapping[str, Tensor], place: str) -> None:
    """Raise if a sum of finite rows is not finite; the diagonal of squares shows any overflow.

    Raises:
        NonFiniteError: Naming target and batch.
    """
    if not tables:
        return
    device = next(iter(tables.values())).device
    # A rectangular table has no diagonal that holds all rows; its own sum is taken.
    traces = torch.stack(
        [
            (t.diagonal().sum() if key.startswith(("A", "G")) else t.sum()).to(device)
            for key, t in tables.items()
        ]
    )
    if bool(traces.isfinite().all()):
        return
    key = list(tables)[int((~traces.isfinite()).nonzero()[0])]
    letter, _, name = key.partition(".")
    what = "activation" if letter == "A" else "output gradient"
    raise NonFiniteError(
        f"{place}: an {what} of target {name!r} is so large that its square overflows "
        f"{tables[key].dtype}; collect with dtype=torch.float64"
    )


def _add_symmetric(
    tables: dict[str, Tensor], key: str, left: Tensor, right: Tensor, share: float
) -> None:
    """Add share · leftᵀ right, known to be symmetric, to the upper triangle of a table."""
    with full_precision(left.device):
        table = _table(tables, key, left, right)
        size = len(table)
        width = max(_PANEL_WIDTH, -(-size // _PANELS))
        for start in range(0, size, width):
            panel = slice(start, start + width)
            table[panel, start:].addmm_(left[:, panel].T, right[:, start:], alpha=share)


def _table(tables: dict[str, Tensor], key: str, left: Tensor, right: Tensor) -> Tensor:
    if key not in tables:
        tables[key] = left.new_zeros(left.shape[1], right.shape[1])
    return tables[key]
