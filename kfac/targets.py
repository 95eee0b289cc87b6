"""Find the weight matrices of a model that curvature is collected for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kfac.experts import check_expert_stack, stacked_experts
from kfac.target import Target
from lirefs.errors import TargetError, as_list, must_be, whole_number
from lirefs.model.layout import missing_layer
from lirefs.model.layout_search import decoder_blocks
from lirefs.model.weight_swap import is_sharded, must_be_readable

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<attribute>\w+)\[(?P<expert>\d+)\]")
_MATRICES = (nn.Linear, Conv1D)
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


def find_targets(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    projections: str | Sequence[str] = "mlp_in",
    experts: Iterable[int] | None = None,
) -> list[Target]:
    """Find target matrices by layer and role, in the order of `model.named_modules()`.

    In a mixture of experts that transformers stores as stacks of shape (experts, ., .), every
    expert is its own target. Where an adapter (PEFT) wraps a matrix, the target is the matrix
    itself: its factors are those of base plus adapter as they ran, and an edit changes the base and
    leaves the adapter as it is. To edit the sum of both, merge the adapter first.

    Args:
        model: Any module. Its layers are the blocks that `lirefs` steers, in a model that also sees
            those of the text decoder; in other networks those of the outermost `nn.ModuleList` with
            the most parameters.
        layers: Block indices from 0; None takes all.
        projections: "mlp_in" (matrices that read the block's stream: gate and up), "mlp_out"
            (down), "mlp" (both), or a list of name endings such as ["gate_proj", "q_proj"].
        experts: Indices of the experts to take from fused stacks; None takes all.

    Returns:
        At least one target.

    Raises:
        TargetError: A layer is out of range, nothing matches, a name ending matches nothing, an
            expert does not exist, or a match is not a dense floating-point Linear or Conv1D. The
            message lists what the model has. Or the model is sharded, and not by FSDP2 alone.
    """
    must_be(model, nn.Module, "model", TargetError)
    must_be_readable(model, TargetError)
    if not isinstance(projections, str):
        projections = as_list(projections, "projections", str, TargetError)
    prefix, blocks = _main_blocks(model)
    wanted = _wanted_layers(layers, blocks)
    by_role = isinstance(projections, str)
    if by_role and projections not in _MLP_GROUPS:
        raise TargetError(
            f"projections={projections!r} is unknown: use one of {sorted(_MLP_GROUPS)} or a list "
            "of name endings such as ['gate_proj']"
        )
    group = _MLP_GROUPS[projections] if isinstance(projections, str) else projections
    endings = tuple(ending.strip() for ending in group)
    chosen = None if experts is None else sorted(set(as_list(experts, "experts", int, TargetError)))
    found = []
    for name, module in model.named_modules():
        layer, local = _locate(name, prefix)
        outside = (blocks and layer is None) or _in_attention(local)
        if (wanted is not None and layer not in wanted) or (by_role and outside):
            continue
        text = local.lower() if by_role else name
        for stack in stacked_experts(module):
            if _ends(f"{text}.{stack}", endings):
                indices = range(len(getattr(module, stack))) if chosen is None else chosen
                found += [_expert(name, module, layer, stack, index) for index in indices]
        # A container of the same name (a block called "0") is passed over for its children.
        inner = _wrapped(name, module) if _ends(text, endings) else module
        matrix = isinstance(inner, _MATRICES) or not (
            any(inner.children()) or stacked_experts(inner)
        )
        if matrix and _ends(text, endings):
            found.append(_matrix(name, inner, layer))
    names = {target.name.partition("[")[0] for target in found}
    # A model has only some endings of a group, but each ending that a user wrote must match.
    unmatched = [end for end in endings if not any(_ends(name, (end,)) for name in names)]
    if not found or (unmatched and not by_role):
        where = "" if wanted is None else f" in layers {sorted(wanted)}"
        raise TargetError(
            f"no matrix matches projections={projections if by_role else unmatched!r}{where}; the "
            f"model has: {_inventory(model)}"
        )
    return found


def named_targets(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """Return the targets with exactly these dotted module names, in the order given.

    Args:
        model: Any module.
        names: Names as in `model.named_modules()`, each once; the name of a matrix that an adapter
            wraps means the matrix itself.

    Raises:
        TargetError: A name is missing, repeated, or not a dense floating-point matrix.
    """
    must_be(model, nn.Module, "model", TargetError)
    must_be_readable(model, TargetError)
    prefix, _ = _main_blocks(model)
    modules = dict(model.named_modules())
    result: dict[str, Target] = {}
    for name in as_list(
        list(names) if isinstance(names, Mapping) else names, "names", str, TargetError
    ):
        match = _EXPERT.fullmatch(name)
        owner = match["module"] if match else name
        if owner not in modules:
            raise TargetError(f"no module called {owner!r}; the model has: {_inventory(model)}")
        if name in result:
            raise TargetError(f"target {name!r} is named twice")
        layer = _locate(owner, prefix)[0]
        if match:
            stack, index = match["attribute"], int(match["expert"])
            result[name] = _expert(owner, modules[owner], layer, stack, index)
        else:
            result[name] = _matrix(name, _wrapped(name, modules[name]), layer)
    return list(result.values())


def must_pass_gradients(model: nn.Module) -> None:
    """Raise TargetError if a quantized matrix passes no gradient to what is before it.

    bitsandbytes runs 4-bit weights by a kernel without a backward pass on some CPUs, and autograd
    then goes on without its gradient.
    """
    kinds: dict[tuple[type, type], tuple[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module.weight) not in (Tensor, nn.Parameter):
            kinds.setdefault((type(module), type(module.weight)), (name, module))
    for name, module in kinds.values():
        if module.weight.is_meta or is_sharded(module.weight):
            continue
        dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the kernel has no backward pass
            state = torch.ones(1, module.in_features, device=module.weight.device, dtype=dtype)
            output = module.forward(state.requires_grad_())  # without hooks
            passed = torch.autograd.grad(output.sum(), state, allow_unused=True)[0]
        if passed is None:
            raise TargetError(
                f"module {name!r} ({type(module).__name__}) has a weight of type "
                f"{type(module.weight).__name__}, through which no gradient passes on this device, "
                "so curvature before it would be wrong; load the model without quantization_config"
            )


def _wrapped(name: str, module: nn.Module) -> nn.Module:
    """Return the module inside an adapter of PEFT or a compiled module."""
    if "original_module" in module._modules:
        copies = [child for child, _ in module.named_modules(prefix=name)][1:]
        raise TargetError(
            f"module {name!r} is a {type(module).__name__}, which holds several copies of its "
            f"weight; name the one that runs: {copies}"
        )
    inner = module._modules.get("base_layer") or module._modules.get("_orig_mod")
    return module if inner is None else _wrapped(name, inner)


def _matrix(name: str, module: nn.Module, layer: int | None) -> Target:
    if not isinstance(module, _MATRICES):
        raise TargetError(
            f"module {name!r} is a {type(module).__name__}; only nn.Linear and Conv1D are "
            "supported (load quantized models dequantized)"
        )
    _check_weight(f"module {name!r} ({type(module).__name__})", module, module.weight, 2)
    return Target(name, module, layer, transposed=isinstance(module, Conv1D))


def _expert(name: str, module: nn.Module, layer: int | None, attribute: str, index: int) -> Target:
    full = f"{name}.{attribute}[{index}]"
    if attribute not in stacked_experts(module):
        raise TargetError(
            f"module {name!r} ({type(module).__name__}) has no stack of experts called "
            f"{attribute!r}; it has: {stacked_experts(module) or 'none'}"
        )
    check_expert_stack(name, module)
    stack = getattr(module, attribute)
    _check_weight(f"target {full!r}", module, stack, 3)
    if not 0 <= index < len(stack):
        raise TargetError(f"target {full!r} does not exist: the stack has {len(stack)} experts")
    return Target(full, module, layer, bool(module.is_transposed), attribute, index)


def _ends(text: str, endings: tuple[str, ...]) -> bool:
    return any(text == end or text.endswith("." + end) for end in endings)


def _check_weight(what: str, module: nn.Module, weight: object, dimensions: int) -> None:
    """Refuse weights that are not one dense matrix, in memory or sharded by FSDP2."""
    # Quantized tensors (torchao) are subclasses that report a float dtype.
    if type(weight) not in (Tensor, nn.Parameter) and not is_sharded(weight):
        raise TargetError(
            f"{what} has a weight of type {type(weight).__name__}: quantized weights "
            "are out of reach; load the model dequantized"
        )
    assert isinstance(weight, Tensor)
    if weight.dtype not in _FLOATS or weight.ndim != dimensions or not weight.numel():
        raise TargetError(
            f"{what} has a weight of {weight.dtype}, {tuple(weight.shape)}; a dense floating-point "
            "matrix is needed (load quantized models dequantized)"
        )
    if weight.is_meta and hasattr(module, "_hf_hook"):
        raise TargetError(
            f"{what} has its weight on the meta device (offloaded by accelerate); "
            "load the model fully on its devices"
        )


def _main_blocks(model: nn.Module) -> tuple[str | None, int]:
    """Return the name and length of the main block list; (None, 0) if there is none."""
    best: tuple[int, str | None] = (-1, None)
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(o) for o in outer):
            continue
        outer.append(name + "." if name else "")
        size = sum(p.numel() for p in module.parameters())
        if len(module) and size > best[0]:
            best = (size, name)
    blocks = decoder_blocks(model, best[1])
    return blocks, 0 if blocks is None else len(list(model.get_submodule(blocks).children()))


def _locate(name: str, prefix: str | None) -> tuple[int | None, str]:
    """Split a module name into its block index and its name inside the block."""
    head = prefix + "." if prefix else ""
    if prefix is None or not name.startswith(head):
        return None, name
    index, _, local = name[len(head) :].partition(".")
    return (int(index), local) if index.isdigit() else (None, name)


def _wanted_layers(layers: Iterable[int] | None, blocks: int) -> set[int] | None:
    if layers is None:
        return None
    wanted = {
        whole_number(layer, "a layer", error=TargetError)
        for layer in as_list(layers, "layers", error=TargetError)
    }
    if not blocks:
        raise TargetError("layers were given, but the model has no ModuleList of blocks; use names")
    if problem := missing_layer(sorted(wanted), blocks):
        raise TargetError(problem)
    if not wanted:
        raise TargetError("layers is empty; pass None for all layers")
    return wanted


def _in_attention(local: str) -> bool:
    return any("attn" in part or "attention" in part for part in local.lower().split("."))


def _inventory(model: nn.Module) -> str:
    """List the supported matrices with block numbers folded to *, for error messages."""
    modules = list(model.named_modules())
    names = [name for name, module in modules if isinstance(module, _MATRICES)]
    names += [f"{name}.{stack}[*]" for name, module in modules for stack in stacked_experts(module)]
    folded = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(folded) - 20} more" if len(folded) > 20 else ""
    return (", ".join(folded[:20]) + more) or "no Linear or Conv1D"
