"""Find the weight matrices of a model that curvature is collected for, and say where they sit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac.errors import TargetError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Names of MLP matrices, relative to their block and in lower case. A name ending in one of these
# belongs to the MLP unless its path runs through a module called attention.
_MLP_IN = (
    *("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "lin1"),
    *("w1", "w3", "wi", "wi_0", "wi_1", "intermediate.dense"),
)
_MLP_OUT = (
    *("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "lin2", "w2", "wo"),
    "output.dense",
)
_MLP_GROUPS = {"mlp_in": _MLP_IN, "mlp_out": _MLP_OUT, "mlp": _MLP_IN + _MLP_OUT}


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix with an input and an output.

    Attributes:
        name: Dotted module name inside the model.
        module: The `nn.Linear` or transformers `Conv1D` that owns the weight.
        layer: Index of the decoder block, from 0; None outside the main block list.
        transposed: True when the parameter is stored as (in, out), as in GPT-2.
    """

    name: str
    module: nn.Module
    layer: int | None = None
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the module stores it."""
        parameter = self.module.weight
        if not isinstance(parameter, nn.Parameter):
            raise TargetError(
                f"target {self.name!r}: its weight is a {type(parameter).__name__}, not a "
                "parameter (a parametrization or weight norm?); remove it first"
            )
        return parameter

    @property
    def weight(self) -> Tensor:
        """The weight, detached, as a view of shape (out_features, in_features)."""
        return self.orient(self.parameter.detach())

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return int(self.weight.shape[1])

    def orient(self, matrix: Tensor) -> Tensor:
        """Turn a stored matrix into (out, in) or back; both directions are the same step."""
        return matrix.T if self.transposed else matrix


def find_targets(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    projections: str | Sequence[str] = "mlp_in",
) -> list[Target]:
    """Find target matrices by layer and role, in the order of `model.named_modules()`.

    Args:
        model: Any module. Its main block list is the outermost `nn.ModuleList` with the most
            parameters.
        layers: Block indices from 0; None takes all.
        projections: "mlp_in" (matrices that read the block's stream: gate and up), "mlp_out"
            (down), "mlp" (both), or a list of name endings such as ["gate_proj", "q_proj"].

    Returns:
        At least one target.

    Raises:
        TargetError: A layer is out of range, nothing matches, or a match is not a dense
            floating-point Linear or Conv1D. The message lists what the model has.
    """
    prefix, blocks = _main_blocks(model)
    wanted = _wanted_layers(layers, blocks)
    by_role = isinstance(projections, str)
    if isinstance(projections, str):
        if projections not in _MLP_GROUPS:
            raise TargetError(
                f"projections={projections!r} is unknown: use one of {sorted(_MLP_GROUPS)} or a "
                "list of name endings such as ['gate_proj']"
            )
        endings: tuple[str, ...] = _MLP_GROUPS[projections]
    else:
        endings = tuple(projections)

    found = []
    for name, module in model.named_modules():
        layer, local = _locate(name, prefix)
        if wanted is not None and layer not in wanted:
            continue
        if by_role and ((blocks and layer is None) or _in_attention(local)):
            continue
        text = local.lower() if by_role else name
        if not any(text == end or text.endswith("." + end) for end in endings):
            continue
        # A container of the same name (a block called "0") is not a matrix; its children are seen.
        if _kind(module) is None and any(module.children()):
            continue
        found.append(_make(name, module, layer))
    if not found:
        where = "" if wanted is None else f" in layers {sorted(wanted)}"
        raise TargetError(
            f"no matrix matches projections={projections!r}{where}; the model has: "
            f"{_inventory(model)}"
        )
    return found


def named_targets(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """Return the targets with exactly these dotted module names, in the order given.

    Args:
        model: Any module.
        names: Names as in `model.named_modules()`, each once.

    Returns:
        One target for each name.

    Raises:
        TargetError: A name is missing, repeated, or not a dense floating-point matrix.
    """
    prefix, _ = _main_blocks(model)
    modules = dict(model.named_modules())
    result: dict[str, Target] = {}
    for name in names:
        if name not in modules:
            raise TargetError(f"no module called {name!r}; the model has: {_inventory(model)}")
        if name in result:
            raise TargetError(f"target {name!r} is named twice")
        result[name] = _make(name, modules[name], _locate(name, prefix)[0])
    return list(result.values())


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    # A Conv1D can only exist once transformers has been imported, so it need not be imported here.
    utilities = sys.modules.get("transformers.pytorch_utils")
    if utilities is not None and isinstance(module, utilities.Conv1D):
        return "conv1d"
    return None


def _make(name: str, module: nn.Module, layer: int | None) -> Target:
    kind = _kind(module)
    if kind is None:
        raise TargetError(
            f"module {name!r} is a {type(module).__name__}; only nn.Linear and Conv1D are "
            "supported (load quantized models dequantized)"
        )
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS or weight.ndim != 2:
        described = f"{getattr(weight, 'dtype', type(weight))}, {getattr(weight, 'shape', '?')}"
        raise TargetError(
            f"module {name!r} ({type(module).__name__}) has a weight of {described}; a dense "
            "floating-point matrix is needed (load quantized models dequantized)"
        )
    if weight.is_meta:
        raise TargetError(
            f"module {name!r} has its weight on the meta device (offloaded or not loaded); "
            "load the model fully on its devices"
        )
    return Target(name, module, layer, transposed=kind == "conv1d")


def _main_blocks(model: nn.Module) -> tuple[str | None, int]:
    """Return the name and length of the main block list; (None, 0) if there is none."""
    best: tuple[int, str | None, int] = (-1, None, 0)
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o) for o in outer):
            continue
        outer.append(name + "." if name else "")
        size = sum(p.numel() for p in module.parameters())
        if len(module) and size > best[0]:
            best = (size, name, len(module))
    return best[1], best[2]


def _locate(name: str, prefix: str | None) -> tuple[int | None, str]:
    """Split a module name into its block index and its name inside the block."""
    head = "" if not prefix else prefix + "."
    if prefix is None or not name.startswith(head):
        return None, name
    index, _, local = name[len(head) :].partition(".")
    return (int(index), local) if index.isdigit() else (None, name)


def _wanted_layers(layers: Iterable[int] | None, blocks: int) -> set[int] | None:
    if layers is None:
        return None
    wanted = set(layers)
    if not blocks:
        raise TargetError("layers were given, but the model has no ModuleList of blocks; use names")
    bad = sorted(layer for layer in wanted if not 0 <= layer < blocks)
    if bad:
        raise TargetError(f"layers {bad} do not exist: the model has layers 0 to {blocks - 1}")
    if not wanted:
        raise TargetError("layers is empty; pass None for all layers")
    return wanted


def _in_attention(local: str) -> bool:
    return any("attn" in part or "attention" in part for part in local.lower().split("."))


def _inventory(model: nn.Module) -> str:
    """List the supported matrices with block numbers folded to *, for error messages."""
    names = (name for name, module in model.named_modules() if _kind(module) is not None)
    folded = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(folded) - 20} more" if len(folded) > 20 else ""
    return (", ".join(folded[:20]) + more) or "no Linear and no Conv1D"
