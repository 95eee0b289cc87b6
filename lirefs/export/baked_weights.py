"""The matrices that write to a residual stream, and operators applied to what they write."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Writer:
    """A weight whose product is written to the residual stream, or a stack of them (experts).

    Attributes:
        module: The name of the module that holds it.
        weight: Its name there; (out, in), stacks have an axis before these.
        bias: The name of its bias there.
        transposed: Whether it is (in, out).
        scale: What the block multiplies its product by before adding it to the stream (Granite's
            `residual_multiplier`).
    """

    module: str
    weight: str = "weight"
    bias: str = "bias"
    transposed: bool = False
    scale: float = 1.0

    def has_bias(self, model: nn.Module) -> bool:
        """Whether the model has a bias here."""
        return getattr(model.get_submodule(self.module), self.bias, None) is not None


def writers(
    model: nn.Module, layout: Layout, places: list[tuple[int, str]]
) -> list[tuple[Writer, ...]]:
    """The weights that write what each (layer, site) adds to the stream, else BakeError.

    Several for experts, which write together: whatever is linear passes through the router's
    weights.
    """
    inside: dict[str, list[str]] = {}
    watched: dict[str, nn.Module] = {}
    scales: list[float] = []
    for layer, site in places:
        block = f"{layout.blocks}.{layer}"
        part, scale = (layout.attention if site == "attn_out" else layout.mlp)[layer], 1.0
        if not part:
            part, scale = _scaled_mlp(model, block)
        scales.append(scale)
        top = f"{block}.{part}"
        module = watched[top] = model.get_submodule(top)
        parts = module.named_modules(prefix=top)
        inside[top] = [name for name, one in parts if _is_matrix(one) or _is_norm(one)]
        watched |= {name: model.get_submodule(name) for name in inside[top]}
    seen = observe(model, watched) if watched else {}
    found: list[tuple[Writer, ...]] = []
    for (layer, site), scale, (top, names) in zip(places, scales, inside.items(), strict=True):
        fitting = [name for name in names if _same_output(seen[name], seen[top])]
        name = fitting[-1] if fitting else top
        if _is_norm(watched[name]):
            raise BakeError(
                f"{site} of layer {layer} is written by {type(watched[name]).__name__}, a norm "
                "behind the projection: it divides by the length of what was projected, which the "
                "change would alter, so no weight can hold it"
            )
        if fitting:
            conv1d = type(watched[name]).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
            found.append((Writer(name, transposed=conv1d, scale=scale),))
        elif experts := _experts(watched[top], top, layout.width):
            found.append(experts)
        else:
            raise BakeError(
                f"{site} of layer {layer} is written by {type(watched[top]).__name__}, and not by "
                "a matrix in it, so no weight can hold the change"
            )
    return found


def _scaled_mlp(model: nn.Module, block: str) -> tuple[str, float]:
    """The MLP of a block that adds a multiple of attention and MLP, and the factor."""
    children = dict(model.get_submodule(block).named_children())
    seen = observe(model, {"": model.get_submodule(block), **children})
    before, after = seen[""].input, seen[""].output
    if before is not None and after is not None:
        change = (after.double() - before.double()).reshape(-1)
        parts = {
            name: one.output.double().reshape(-1)
            for name, one in seen.items()
            if name and one.output is not None and one.output.numel() == change.numel()
        }
        attentions = [name for name in parts if "attn" in name or "attention" in name]
        for first, last in itertools.product(attentions, parts.keys() - attentions):
            both = parts[first] + parts[last]
            scale = _factor(change, both)
            if (change - scale * both).norm() <= 1e-3 * change.norm():
                return last, scale
    raise BakeError(
        f"{block} does not add up what its attention and its MLP write, so no weight alone holds "
        "a change of its output"
    )


def _experts(module: nn.Module, top: str, width: int) -> tuple[Writer, ...]:
    """The down projections of all experts, routed and shared, as transformers names them."""
    found = []
    for name, one in module.named_modules(prefix=top):
        stack = one._parameters.get("down_proj")
        if name.endswith("down_proj") and _is_matrix(one):
            found.append(Writer(name))
        elif stack is not None and stack.ndim == 3 and stack.is_floating_point():
            transposed = bool(getattr(one, "is_transposed", stack.shape[1] != width))
            found.append(Writer(name, "down_proj", "down_proj_bias", transposed))
    return tuple(found)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return named and isinstance(weight, Tensor) and weight.is_floating_point()


def _same_output(one: Seen, other: Seen) -> bool:
    if one.output is None or other.output is None:
        return False
    return torch.equal(one.output.reshape(-1), other.output.reshape(-1))


def embeddings(model: nn.Module, layout: Layout) -> tuple[dict[str, nn.Embedding], float]:
    """The embeddings by name, tokens' first, and by how much a token's is scaled for layer 0.

    BakeError where layer 0 does not read their sum, or a multiple of it.
    """
    token = maybe_call(model, "get_input_embeddings")
    if not isinstance(token, nn.Embedding):
        raise BakeError("the model does not say which module is its token embedding")
    found = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Embedding)
        and one.embedding_dim == layout.width
        and not name.startswith(f"{layout.blocks}.")
    }
    seen = observe(model, {"": layout.block(model, 0), **found})
    entered = seen[""].input
    outputs = [seen[name].output for name in found]
    if entered is not None:
        read = entered.double().reshape(-1, layout.width)
        total = sum(
            (one.double().reshape(-1, layout.width) for one in outputs if one is not None),
            torch.zeros_like(read),
        )
        scale = _factor(read, total)
        if (read - scale * total).norm() <= 1e-3 * read.norm():
            first = next(name for name, one in found.items() if one is token)
            output, ids = seen[first].output, seen[first].input
            if output is not None and ids is not None:  # Gemma scales in the embedding itself
                rows = token.weight.detach()[ids.to(token.weight.device)].cpu().double()
                scale *= _factor(output.double().reshape(rows.shape), rows)
            return {first: token, **found}, scale
    raise BakeError(
        "layer 0 does not read the sum of the embeddings: a norm, or positions that are not "
        "learned, stand between, so no weight holds a change of it"
    )


def _factor(one: Tensor, other: Tensor) -> float:
    """The number by which the second has to be multiplied to come nearest to the first."""
    return float((one * other).sum() / (other * other).sum())


def bake_embedding(model: nn.Module, names: list[str], scale: float, ops: list[Operator]) -> None:
    """Change what layer 0 reads, given what `embeddings` found."""
    for name in names:
        module: Any = model.get_submodule(name)
        if name == names[0]:
            _untie(model, module)
        with torch.no_grad():
            weight = module.weight.double() * scale
            for one in ops:  # only one of the summands is shifted
                weight = one(weight) if name == names[0] else _linear(one, weight)
            module.weight.copy_((weight / scale).to(module.weight.dtype))


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


def bake_writer(model: nn.Module, writer: Writer, operators: list[Operator]) -> None:
    """Change what a weight, or each weight of a stack, writes, and its bias."""
    module: Any = model.get_submodule(writer.module)
    parameter: Any = getattr(module, writer.weight)
    bias: Any = getattr(module, writer.bias, None)
    if writer.scale != 1.0:  # only `add` can act on a stream whose parts are not at hand
        operators = [
            Operator(one.name, one.direction, one.strength / writer.scale) for one in operators
        ]
    with torch.no_grad():
        for matrix in parameter if parameter.ndim == 3 else [parameter]:
            weight = matrix.double() if writer.transposed else matrix.double().T  # (in, out)
            for one in operators:
                weight = _linear(one, weight)
            matrix.copy_((weight if writer.transposed else weight.T).to(matrix.dtype))
        if bias is not None:
            offset = bias.double()
            for one in operators:
                offset = one(offset)
            bias.copy_(offset.to(bias.dtype))


def bias_switches(model: Any, shifted: list[tuple[Writer, ...]]) -> dict[str, set[str]]:
    """Settings that give these weights their missing biases, each with all that it switches on.

    Nothing is changed yet. BakeError where no setting does.
    """
    without = [
        (one, together) for together in shifted for one in together if not one.has_bias(model)
    ]
    for one, together in without:
        if len(together) > 1 or one.weight != "weight":
            raise BakeError(
                f"{one.module} of {type(model).__name__} holds experts without a bias, so nothing "
                "can be added to what they write; ablate and amplify can be baked there"
            )
    missing = [f"{one.module}.bias" for one, _ in without]
    found: dict[str, set[str]] = {}
    present, config = _parameter_names(model), text_config(model)
    settings = config.to_dict() if missing and config is not None else {}
    for switch in [key for key, value in settings.items() if value is False and "bias" in key]:
        trial = copy.deepcopy(model.config)
        for name in (*found, switch):
            setattr(trial.get_text_config(), name, True)
        try:
            with torch.device("meta"):
                there = _parameter_names(type(model)(trial))
        except Exception:  # its own class may refuse a configuration
            continue
        extra = {name for name in there - present if name.endswith(".bias")}
        if there == present | extra and not extra.isdisjoint(missing):
            found[switch] = extra
            present |= extra
            missing = [name for name in missing if name not in present]
    if missing:
        raise BakeError(
            f"{type(model).__name__} has no bias at {missing[0].removesuffix('.bias')} and no "
            "setting that gives it one, so a saved model could not hold what is added there"
        )
    return found


def add_biases(model: Any, switches: dict[str, set[str]]) -> None:
    """Switch biases on in the configuration, so that a plain load finds them; they are zero."""
    for switch, names in switches.items():
        setattr(text_config(model), switch, True)
        for name in names:
            module = model.get_submodule(name.removesuffix(".bias"))
            out = module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
            module.bias = nn.Parameter(module.weight.new_zeros(out), module.weight.requires_grad)


def must_be_dense(model: nn.Module) -> None:
    """Raise BakeError for weights that a change would not reach whole: quantized, adapted, away."""
    for name, module in model.named_modules():
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            raise BakeError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT, and save_pretrained "
                "would save the adapters alone; merge them (merge_and_unload) and bake the result"
            )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype.itemsize == 1:
            kind = type(parameter).__name__
            raise BakeError(
                f"{name} is quantized or sharded ({kind}, {parameter.dtype}), so it cannot hold "
                "the change exactly; bake the model as loaded in bfloat16, float16 or float32, and "
                "quantize the result"
            )
        if parameter.is_meta:
            raise BakeError(f"{name} is offloaded; load the model into memory to bake it")


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}
