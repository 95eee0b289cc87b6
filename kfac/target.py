"""One weight matrix with an input and an output: how it is stored, and its record in factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from torch import Tensor, nn

from lirefs.errors import TargetError, must_be
from lirefs.model.untrusted.digest import tensor_bytes
from lirefs.model.weight_swap import gathered, is_sharded, sharded_like


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix with an input and an output.

    Attributes:
        name: Dotted module name inside the model; for one expert of a fused stack the parameter's
            name and the index, as in "model.layers.0.mlp.experts.gate_up_proj[3]".
        module: The `nn.Linear` or transformers `Conv1D` that owns the weight, or the module that
            holds the stack.
        layer: Index of the decoder block, from 0; None outside the main block list.
        transposed: True when the matrix is stored as (in, out), as in GPT-2.
        attribute: Name of the parameter inside the module.
        expert: Index into a stack of shape (experts, ., .); None for a matrix of its own.
    """

    name: str
    module: nn.Module = field(repr=False)
    layer: int | None = None
    transposed: bool = False
    attribute: str = "weight"
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module stores it; for an expert the whole stack."""
        parameter = getattr(self.module, self.attribute)
        if not isinstance(parameter, nn.Parameter):
            raise TargetError(
                f"target {self.name!r}: its weight is a {type(parameter).__name__}, not a "
                "parameter (a parametrization or weight norm?); remove it first"
            )
        return parameter

    @property
    def weight(self) -> Tensor:
        """The weight, detached, as a view of shape (out_features, in_features).

        Of a weight that is sharded over processes it is a whole copy, which all must ask for.
        """
        return self.view(self.parameter)

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return int(self.parameter.shape[-1 if self.transposed else -2])

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return int(self.parameter.shape[-2 if self.transposed else -1])

    def record(self, count: int, source: str, digest: str) -> TargetRecord:
        """Return the record of this target in factors."""
        return TargetRecord(self.out_features, self.in_features, count, source, digest)

    def orient(self, matrix: Tensor) -> Tensor:
        """Return a view of a stored matrix as (out, in), or the reverse: it is the same step."""
        return matrix.T if self.transposed else matrix

    def view(self, stored: Tensor) -> Tensor:
        """Return the target's weight (out, in) inside a tensor with the shape of its parameter.

        It is a detached view, so that writing to it writes to `stored`, unless that is sharded.
        """
        stored = gathered(stored.detach())
        return self.orient(stored if self.expert is None else stored[self.expert])

    def placed(self, weight: Tensor, into: Tensor | None = None) -> Tensor:
        """Return a tensor that can replace the parameter's, with a new weight of this target.

        Args:
            weight: Shape (out, in), any floating dtype and device.
            into: A copy of the parameter's tensor to write into, for several experts of one stack;
                None makes one.

        Returns:
            Same shape, dtype and device as the parameter, sharded in the same way; other experts
            are unchanged.
        """
        if into is None:
            into = self.parameter.detach().clone()
        whole = gathered(into)
        self.view(whole).copy_(weight)
        return sharded_like(whole, into) if is_sharded(into) else whole


@dataclass(frozen=True)
class TargetRecord:
    """The record of one target in the factors.

    Attributes:
        out_features: Rows of the weight, size of G.
        in_features: Columns of the weight, size of A.
        count: Positions summed over; 0 for an expert that no counted position was routed to.
        source: Name of the target under which the shared A is stored.
        digest: SHA-256 of the weight at collection.
    """

    out_features: int
    in_features: int
    count: int
    source: str
    digest: str

    def key(self, kind: str, name: str) -> str:
        """Return the key of a target's sums of one kind; an A is stored under its source."""
        return f"{kind}.{self.source if kind == 'A' else name}"

    def shape(self, kind: str) -> tuple[int, int]:
        """Return the shape of the sums of a kind: "A", "G", "AW", "GW", "D", "DS" or "E"."""
        rows = self.in_features if kind in ("A", "AW") else self.out_features
        return rows, self.out_features if kind in ("G", "GW") else self.in_features


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of a weight's dtype, shape and bytes, as 64 hex digits.

    That of a sharded weight is the one of the whole weight; all processes must ask for it.
    """
    must_be(weight, Tensor, "weight", TargetError)
    if weight.is_meta:
        raise TargetError(
            "a weight is on the meta device, without data: such a model can be planned only; load "
            "it to collect or edit"
        )
    sha = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    sha.update(tensor_bytes(gathered(weight)))
    return sha.hexdigest()
