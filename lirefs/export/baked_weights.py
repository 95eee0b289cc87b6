"""The matrices that write to a residual stream, and operators applied to what they write."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import BakeError
from lirefs.model.guest import maybe_call, text_config
from lirefs.model.layout import Layout
from lirefs.model.observe import Seen, observe
from lirefs.steering.operators import Operator


def shift_of(operator: Operator) -> Tensor:
    """What an affine operator makes of zero, the part that needs a bias: (width,), float64."""
    return operator(torch.zeros_like(operator.direction)).cpu()


def _linear(operator: Operator, states: Tensor) -> Tensor:
    """The states after the linear part of an affine operator, which leaves zero at zero."""
    if operator.name == "add":
        return states
    name = "amplify" if operator.name == "amplify" else "ablate"
    return Operator(name, operator.direction, operator.strength)(states)


def projections(model: nn.Module, layout: Layout, writers: list[tuple[int, str]]) -> list[str]:
    """The name of the matrix whose output is written at each (layer, site), else BakeError."""
    inside: dict[str, list[str]] = {}
    watched: dict[str, nn.Module] = {}
    for layer, site in writers:
        part = (layout.attention if site == "attn_out" else layout.mlp)[layer]
        if not part:
            raise BakeError(f"no module of layer {layer} writes {site}")
        top = f"{layout.blocks}.{layer}.{part}"
        module = watched[top] = model.get_submodule(top)
        inside[top] = [
            f"{top}.{name}".rstrip(".") for name, one in module.named_modules() if _is_matrix(one)
        ]
        watched |= {name: model.get_submodule(name) for name in inside[top]}
    seen = observe(model, watched) if watched else {}
    found = []
    for (layer, site), (top, names) in zip(writers, inside.items(), strict=True):
        fitting = [name for name in names if _same_output(seen[name], seen[top])]
        if not fitting:
            raise BakeError(
                f"{site} of layer {layer} is not written by one matrix but by "
                f"{type(watched[top]).__name__} (a norm or experts stand behind it), so no weight "
                "can hold the change"
            )
        found.append(fitting[-1])
    return found


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return named and isinstance(weight, Tensor) and weight.is_floating_point()


def _same_output(one: Seen, other: Seen) -> bool:
    if one.output is None or other.output is None:
        return False
    return torch.equal(one.output.reshape(-1), other.output.reshape(-1))


def bake_embedding(model: nn.Module, layout: Layout, operators: list[Operator]) -> None:
    """Change what layer 0 reads: the sum of the embeddings."""
    token = maybe_call(model, "get_input_embeddings")
    if not isinstance(token, nn.Embedding):
        raise BakeError("the model does not say which module is its token embedding")
    _untie(model, token)
    for name, module in model.named_modules():
        inside = name.startswith(f"{layout.blocks}.")
        if inside or not isinstance(module, nn.Embedding) or module.embedding_dim != layout.width:
            continue
        with torch.no_grad():
            weight = module.weight.double()
            for one in operators:  # the embeddings are summed, so only one of them is shifted
                weight = one(weight) if module is token else _linear(one, weight)
            module.weight.copy_(weight.to(module.weight.dtype))


def _untie(model: Any, token: nn.Embedding) -> None:
    """Give the unembedding a matrix of its own: it reads another space, behind the norm."""
    head = maybe_call(model, "get_output_embeddings")
    if head is None or head.weight is not token.weight:
        return
    head.weight = nn.Parameter(token.weight.detach().clone(), token.weight.requires_grad)
    for config in (model.config, text_config(model)):
        config.tie_word_embeddings = False
    # transformers lists the tied names when a model is built, and leaves them out of files.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def bake_projection(module: nn.Module, operators: list[Operator]) -> None:
    """Change what a matrix writes, in its weight and its bias."""
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
    parameter: Any = module.weight
    bias: Any = module.bias
    with torch.no_grad():
        weight = parameter.double() if transposed else parameter.double().T  # (in, out)
        offset = None if bias is None else bias.double()
        for one in operators:
            weight = _linear(one, weight)
            offset = None if offset is None else one(offset)
        parameter.copy_((weight if transposed else weight.T).to(parameter.dtype))
        if offset is not None:
            bias.copy_(offset.to(bias.dtype))


def add_biases(model: Any, names: list[str]) -> None:
    """Switch biases of these matrices on in the configuration, so that a plain load finds them."""
    missing = [name for name in names if model.get_submodule(name).bias is None]
    if not missing:
        return
    present = _parameter_names(model)
    config = text_config(model)
    settings = {} if config is None else config.to_dict()
    for switch in [key for key, value in settings.items() if value is False and "bias" in key]:
        trial = copy.deepcopy(model.config)
        setattr(trial.get_text_config(), switch, True)
        try:
            with torch.device("meta"):
                empty = type(model)(trial)
        except Exception:  # its own class may refuse a configuration
            continue
        there = _parameter_names(empty)
        extra = {name for name in there - present if name.endswith(".bias")}
        if there != present | extra or extra.isdisjoint(f"{name}.bias" for name in missing):
            continue
        setattr(config, switch, True)
        for name in extra:
            module = model.get_submodule(name.removesuffix(".bias"))
            zeros = module.weight.new_zeros(empty.get_parameter(name).shape)
            module.bias = nn.Parameter(zeros, module.weight.requires_grad)
        present |= extra
        missing = [name for name in missing if f"{name}.bias" not in present]
    if missing:
        raise BakeError(
            f"{type(model).__name__} has no bias at {missing[0]} and no setting that gives it one, "
            "so a saved model could not hold what is added there"
        )


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}
