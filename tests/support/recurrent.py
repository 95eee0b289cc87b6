"""Tiny models whose caches are recurrent states, in some layers or in all."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from tiny import build

_IDS = {"vocab_size": 128, "hidden_size": 32, "pad_token_id": 2, "bos_token_id": 0}
_PLAIN = {**_IDS, "num_hidden_layers": 4, "eos_token_id": None}
_ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": [*3 * ["linear_attention"], "full_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}

# family: configuration class, settings
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_ATTENTION, "lru_width": 32, "attention_window_size": 16},
    ),
    "lfm2": (
        "Lfm2Config",
        {**_ATTENTION, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**_ATTENTION, **_LINEAR}),
    "bamba": ("BambaConfig", {**_ATTENTION, **_MAMBA, "attn_layer_indices": [1, 3]}),
    "falcon_h1": (
        "FalconH1Config",
        {**_ATTENTION, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **_ATTENTION,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 4,
            "layer_types": 2 * ["linear_attention", "full_attention"],
        },
    ),
}
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv")
HYBRID = tuple(family for family in _FAMILIES if family not in RECURRENT)


@functools.cache
def recurrent_model(family: str) -> Any:
    """The shared model of a family: 4 layers of width 32."""
    name, settings = _FAMILIES[family]
    return build(getattr(transformers, name)(**_PLAIN, **settings))
