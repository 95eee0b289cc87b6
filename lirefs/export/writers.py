"""The matrices that write to a residual stream, and affine changes of what they write."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import BakeError
from lirefs.model.guest import maybe_call, text_config
from lirefs.model.layout import Layout
from lirefs.model.observe import Seen, observe


@dataclass(frozen=True)
class Affine:
    """h + share (h.v) v + shift, float64."""

    unit: Tensor
    share: float
    shift: Tensor

    @property
    def shifts(self) -> bool:
        """Whether it needs a bias."""
        return bool(self.shift.any())

    @property
    def removes(self) -> bool:
        """Whether nothing along the unit vector is left."""
        return self.share == -1.0 and not self.shifts


def projections(model: nn.Module, layout: Layout, places: list[tuple[str, int]]) -> list[str]:
    """Names of the matrices whose outputs are what is written at these places.

    Raises:
        BakeError: There is no such matrix.
    """
    candidates: dict[str, list[str]] = {}
    watched: dict[str, nn.Module] = {}
    for site, layer in places:
        part = layout.attention if site == "attn_out" else layout.mlp
        top = f"{layout.blocks}.{layer}.{part}"
        module = model.get_submodule(top) if part else None
        if module is None:
            raise BakeError(f"no module of this architecture writes {site}")
        inside = [
            f"{top}.{name}" if name else top
            for name, one in module.named_modules()
            if _is_matrix(one)
        ]
        candidates[top] = inside
        watched[top] = module
        watched |= {name: model.get_submodule(name) for name in inside}
    if not watched:
        return []
    seen = observe(model, watched)
    found = []
    for (site, layer), (top, inside) in zip(places, candidates.items(), strict=True):
        fitting = [name for name in inside if _equal(seen[name], seen[top])]
        if not fitting:
            raise BakeError(
                f"{site} of layer {layer} is not written by one matrix but by "
                f"{type(watched[top]).__name__} (a norm or experts stand behind it), so there "
                "is no weight that holds the change"
            )
        found.append(fitting[-1])
    return found


def change_embedding(model: nn.Module, layout: Layout, changes: list[Affine]) -> None:
    """Change what layer 0 reads.

    Raises:
        BakeError: It is not the sum of embeddings.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and not name.startswith(f"{layout.blocks}.")
        and module.weight.shape[1] == layout.width
    ]
    token = maybe_call(model, "get_input_embeddings")
    if not isinstance(token, nn.Embedding):
        raise BakeError("the model does not say which module is its token embedding")
    _untie(model, token)
    for name in names:
        module: Any = model.get_submodule(name)
        with torch.no_grad():
            weight = module.weight.double()
            for one in changes:
                unit, shift = one.unit.to(weight.device), one.shift.to(weight.device)
                weight = weight + one.share * (weight @ unit)[:, None] * unit
                if module is token:  # position embeddings are added to it: once is enough
                    weight = weight + shift
            module.weight.copy_(weight.to(module.weight.dtype))


def _untie(model: Any, token: nn.Embedding) -> None:
    """Give the unembedding a matrix of its own: it reads another space, behind the norm."""
    head = maybe_call(model, "get_output_embeddings")
    if head is None or head.weight is not token.weight:
        return
    head.weight = nn.Parameter(token.weight.detach().clone(), token.weight.requires_grad)
    for config in {id(c): c for c in (model.config, text_config(model))}.values():
        config.tie_word_embeddings = False
    # transformers lists the tied names when a model is built, and leaves them out of files.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return named and isinstance(weight, Tensor) and weight.is_floating_point()


def _equal(one: Seen, other: Seen) -> bool:
    if one.output is None or other.output is None or one.output.numel() != other.output.numel():
        return False
    return torch.equal(one.output.reshape(-1), other.output.reshape(-1))


def change_projection(module: nn.Module, changes: list[Affine]) -> None:
    """Change what a matrix writes, in its weight and its bias."""
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
    parameter: Any = module.weight
    bias: Any = module.bias
    with torch.no_grad():
        weight = parameter.double().T if transposed else parameter.double()
        offset = None if bias is None else bias.double()
        for one in changes:
            unit, shift = one.unit.to(weight.device), one.shift.to(weight.device)
            weight = weight + one.share * torch.outer(unit, unit @ weight)
            if offset is not None:
                offset = offset + one.share * (offset @ unit) * unit + shift
        parameter.copy_((weight.T if transposed else weight).to(parameter.dtype))
        if offset is not None:
            bias.copy_(offset.to(bias.dtype))


def make_biases(model: Any, names: list[str]) -> None:
    """Switch biases on in the configuration, zero, so that a plain load finds them again."""
    missing = [name for name in names if model.get_submodule(name).bias is None]
    if not missing:
        return
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    config = text_config(model)
    switches = [
        key
        for key, value in (config.to_dict() if config is not None else {}).items()
        if value is False and "bias" in key
    ]
    for switch in switches:
        trial = copy.deepcopy(model.config)
        setattr(trial.get_text_config(), switch, True)
        try:
            with torch.device("meta"):
                empty = type(model)(trial)
        except Exception:  # a configuration that its own class refuses is no way either
            continue
        there = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        extra = there - present
        if not all(name.endswith(".bias") for name in extra) or present - there:
            continue
        if not any(f"{name}.bias" in extra for name in missing):
            continue
        setattr(config, switch, True)
        for name in extra:
            module = model.get_submodule(name.removesuffix(".bias"))
            out = empty.get_parameter(name).shape
            zeros = torch.zeros(out, dtype=module.weight.dtype, device=module.weight.device)
            module.bias = nn.Parameter(zeros, module.weight.requires_grad)
            present.add(name)
        missing = [name for name in missing if f"{name}.bias" not in present]
    if missing:
        raise BakeError(
            f"{type(model).__name__} has no bias at {missing[0]} and no setting that gives it one, "
            "so a plain load could not hold what is added there"
        )
