"""Operators on decoder layers as vLLM builds them; nothing here needs vLLM.

Tokens of all requests come in one row without padding. In most families a layer is given, and
returns, a pair (hidden, residual) whose sum is the residual stream: the next norm adds them. Which
families do so cannot be seen from outside (Cohere returns a pair whose first part is the whole
stream), so a family is steered only if it was compared with `transformers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lirefs.errors import BackendError
from lirefs.export.operators import varies_by
from lirefs.model.layout import missing_layer
from lirefs.steering import scope as scopes
from lirefs.steering.operators import Operator
from lirefs.steering.scope import Scope
from lirefs.steering.steer import Steer

_PARTS = ("self_attn", "mlp")
_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, tuple[str, str]] = {
    "llama.LlamaDecoderLayer": _PARTS,  # and Phi-3
    "mistral.MistralDecoderLayer": _PARTS,
    "qwen2.Qwen2DecoderLayer": _PARTS,
    "qwen3.Qwen3DecoderLayer": _PARTS,
    "gemma.GemmaDecoderLayer": _PARTS,
    "gemma2.Gemma2DecoderLayer": _NORMS,
    "gemma3.Gemma3DecoderLayer": _NORMS,
    "glm4.Glm4DecoderLayer": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "granite.GraniteDecoderLayer": ("", ""),  # scaled outside of any module
    "mixtral.MixtralDecoderLayer": ("self_attn", "block_sparse_moe"),
    "qwen3_moe.Qwen3MoeDecoderLayer": _PARTS,
    "gpt2.GPT2Block": ("attn", "mlp"),
    "opt.OPTDecoderLayer": ("self_attn", "fc2"),
    # Of transformers itself, which vLLM runs where it has no layers of its own.
    "modeling_gpt_neox.GPTNeoXLayer": ("attention", "mlp"),
    "modeling_olmo2.Olmo2DecoderLayer": _NORMS,
}
"""Decoder layers that were compared: where `attn_out` and `mlp_out` are; empty where nowhere."""

_SCOPES: dict[str, Callable[..., Scope]] = {
    "all": scopes.all_tokens,
    "prompt": scopes.prompt,
    "generated": scopes.generated,
    "last_prompt_token": scopes.last_prompt_token,
    "first_generated": scopes.first_generated,
    "from_position": scopes.from_position,
}

Batch = Callable[[], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
"""Gives the prompt length of each request of this pass, and where the tokens of each end."""


@dataclass
class PassTokens:
    """The tokens of one forward pass as a `Scope` reads them: both (tokens,)."""

    position: Tensor
    age: Tensor


def place_operators(model: nn.Module, plan: Mapping[str, Any], batch: Batch) -> list[Any]:
    """Place the operators of a plan on the layers of a model that are here; return the hooks.

    Args:
        model: What vLLM calls with `positions`.
        plan: As `lirefs.export.vllm.plan_of` makes it.
        batch: Asked once in each forward pass if the scope is not `all`.

    Raises:
        BackendError: The family is unknown, or a layer, width or site does not fit; then no hook
            is left.
    """
    layers = _layers(model)
    if problem := missing_layer([place["layer"] for place in plan["places"]], len(layers)):
        raise BackendError(problem)
    settings = dict(plan["scope"])
    scope = _SCOPES[settings.pop("name")](**settings)
    hooks: list[Any] = []
    masked = _Masked(scope, batch)
    try:
        if scope is not scopes.ALL:
            hooks.append(model.register_forward_pre_hook(masked.begin, with_kwargs=True))
        for place in plan["places"]:
            layer = layers[place["layer"]]
            if _missing(layer):  # in another process of a pipeline
                continue
            vector = torch.tensor(place["vector"], dtype=torch.float64)
            operator = Operator(place["operator"], vector, place["strength"])
            hooks.append(_hook(layer, place["site"], masked.confine(operator)))
    except BaseException:
        for hook in hooks:
            hook.remove()
        raise
    return hooks


def shared_scope(steer: Steer) -> Scope:
    """The scope of a steering that treats all requests alike, else BackendError."""
    if reason := varies_by(steer, scopes=False):
        raise BackendError(f"on vLLM all requests are steered alike, but {reason}")
    scope = steer.scope
    own = getattr(scope.touches, "__module__", "") != scopes.__name__
    if own or scope.name not in _SCOPES:
        raise BackendError(
            f"the scope {scope.name!r} is made for certain texts, or by a function of your own, "
            f"and a worker of vLLM knows scopes by name; use {', '.join(_SCOPES)}"
        )
    return scope


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, those in other processes as placeholders; BackendError if unknown."""
    lists = [list(one) for one in model.modules() if isinstance(one, nn.ModuleList)]
    for layers in sorted(lists, key=len, reverse=True):
        here = {family(layer) for layer in layers if not _missing(layer)}
        if here and here <= FAMILIES.keys():
            return layers
    kinds = sorted({family(one) for layers in lists for one in layers if not _missing(one)})
    raise BackendError(
        f"vLLM runs this model as {type(model).__name__}, whose layers ({', '.join(kinds)}) "
        "were not compared with those of transformers; use hooks there, or see lirefs.export.ways"
    )


def family(layer: nn.Module) -> str:
    """The name under which `FAMILIES` has a layer."""
    return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"


def _missing(layer: nn.Module) -> bool:
    return type(layer).__name__ == "PPMissingLayer"


class _Masked:
    """Confines operators to the tokens of the present forward pass that a scope holds."""

    def __init__(self, scope: Scope, batch: Batch) -> None:
        self._scope = scope
        self._batch = batch
        self._mask: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = inspect.signature(model.forward).bind(*args, **kwargs).arguments["positions"]
        tokens = pass_tokens(positions, *self._batch())
        self._mask = self._scope.touches(tokens).unsqueeze(-1)  # type: ignore[arg-type]

    def confine(self, operator: Operator) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The operator on a stream that is one tensor, or the sum of a pair."""

        def change(hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
            mask = self._mask
            new = operator(hidden if residual is None else hidden + residual)
            if mask is None:
                return new, None if residual is None else torch.zeros_like(residual)
            # Other tokens keep their pair, whose sum would be rounded here.
            rest = None if residual is None else residual.masked_fill(mask, 0.0)
            return torch.where(mask, new, hidden), rest

        return change


def pass_tokens(positions: Tensor, prompts: Any, ends: Any) -> PassTokens:
    """The tokens of a forward pass that holds several requests, one behind the other.

    Args:
        positions: Of each token in its request, (tokens,), padding at the end.
        prompts: Tokens of the prompt of each request, (requests,).
        ends: One past the last token of each request, (requests,).
    """
    if positions.dim() != 1:
        raise BackendError("this model numbers positions on several axes; use the scope 'all'")
    # Padding gets a request of its own, with position -1.
    index = torch.arange(len(positions), device=positions.device)
    ends = torch.as_tensor(np.asarray(ends, dtype=np.int64), device=positions.device)
    lengths = torch.as_tensor(np.asarray([*prompts, 0], dtype=np.int64), device=positions.device)
    request = torch.bucketize(index, ends, right=True)
    position = torch.where(request < len(ends), positions.long(), -1)
    return PassTokens(position, position - lengths[request])


def _hook(layer: nn.Module, site: str, change: Callable[..., Any]) -> Any:
    """Let a change act at a site of a layer; returns the hook."""
    if site == "resid_pre":
        return layer.register_forward_pre_hook(_on_input(layer, change), with_kwargs=True)
    if site == "resid_post":
        return layer.register_forward_hook(_on_output(change))
    attention, mlp = FAMILIES[family(layer)]
    if not (name := attention if site == "attn_out" else mlp):
        having = "resid_pre and resid_post" + (" and mlp_out" if mlp else "")
        raise BackendError(
            f"vLLM has no module that gives {site} in {family(layer)}; it has {having}"
        )
    return layer.get_submodule(name).register_forward_hook(_on_part(change))


def _on_input(layer: nn.Module, change: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(layer.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        hidden, residual = change(given["hidden_states"], given.get("residual"))
        given["hidden_states"] = hidden
        if residual is not None:
            given["residual"] = residual
        return bound.args, bound.kwargs

    return hook


def _on_output(change: Callable[..., Any]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output, None)[0]
        hidden, residual = change(*output)
        return hidden, residual

    return hook


def _on_part(change: Callable[..., Any]) -> Callable[..., Any]:
    """On what a module adds to the stream: a tensor, or a tuple that begins with it."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return change(output, None)[0]
        return (change(output[0], None)[0], *output[1:])

    return hook
