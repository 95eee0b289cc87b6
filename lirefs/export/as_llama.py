"""Models that compute what Llama computes, as Llama, whose class has a bias at every matrix."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

_SAME = (
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM",
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM",
)
_OWN = ("architectures", "layer_types", "max_window_layers", "model_type", "sliding_window",
        "transformers_version", "use_sliding_window")  # fmt: skip


def is_llama_inside(model: Any) -> bool:
    """Whether it is a Mistral or a Qwen2 without a window, which differ from Llama in name only."""
    kind = type(model)
    if f"{kind.__module__}.{kind.__qualname__}" not in _SAME:
        return False
    kinds = set(getattr(model.config, "layer_types", None) or [])
    return model.config.sliding_window is None and kinds <= {"full_attention"}


def as_llama(model: Any) -> Any:
    """The same weights in a new Llama, with biases; those that the model lacks are zero."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _OWN}
    settings |= {"attention_bias": True, "mlp_bias": True}
    with torch.random.fork_rng(devices=[]):
        llama = transformers.LlamaForCausalLM._from_config(  # type: ignore[no-untyped-call]
            transformers.LlamaConfig(**settings),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    llama.to(model.device).train(model.training)
    own = dict(model.named_parameters(remove_duplicate=False))
    trained = next(iter(own.values())).requires_grad
    with torch.no_grad():
        for name, parameter in llama.named_parameters(remove_duplicate=False):
            parameter.copy_(own[name]) if name in own else parameter.zero_()
            parameter.requires_grad_(own[name].requires_grad if name in own else trained)
    llama.generation_config = copy.deepcopy(model.generation_config)
    return llama
