"""Tiny models and a tiny tokenizer, made in memory from configurations."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WIDTH, LAYERS, VOCABULARY = 32, 4, 128

_MODERN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# family: configuration class, settings
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _MODERN),
    "olmo2": ("Olmo2Config", {k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "qwen2": ("Qwen2Config", {k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", _MODERN),
    "gemma2": ("Gemma2Config", {**_MODERN, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {**_MODERN, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "mistral": ("MistralConfig", _MODERN),
    "phi3": ("Phi3Config", {k: v for k, v in _MODERN.items() if k != "head_dim"}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 128,
            **IDS,
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **IDS,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": WIDTH,
            **IDS,
        },
    ),
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            **IDS,
        },
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4, **IDS},
    ),
}
FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a model of ``family``: 4 layers of width 32."""
    name, settings = _FAMILIES[family]
    return getattr(transformers, name)(**{**settings, **changes})


def build(config: Any, seed: int = 0) -> Any:
    """Return a new float32 model with seeded weights, in evaluation mode.

    Weights are larger than at initialisation, so that attention and MLP outputs are as large as
    the residual stream, and a wrong value cannot be mistaken for the right one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@functools.cache
def tiny_model(family: str) -> Any:
    """Return the shared model of ``family``; tests that change a model use ``fresh_model``."""
    return build(tiny_config(family))


def fresh_model(family: str, **changes: Any) -> Any:
    """Return a model of ``family`` that no other test uses."""
    return build(tiny_config(family, **changes))


def tiny_tokenizer(pad: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single ASCII characters, 128 ids: ``<s>`` ``</s>`` ``<pad>`` first."""
    special = ["<s>", "</s>", "<pad>"]
    characters = [chr(code) for code in range(32, 127)]
    words = [*special, *characters]
    words += [f"<unused{index}>" for index in range(VOCABULARY - len(words))]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
