"""How many tokens a batch may have: as many as its share of the memory holds."""

from __future__ import annotations

import os
from typing import Any

import torch

from lirefs.model.guest import text_config
from lirefs.model.language_model import LanguageModel

SHARE = 8
"""A batch may fill an eighth of all memory of the device, so equal machines make equal batches."""
LEAST = 256
MOST_ON_CPU = 8192
"""Larger batches take as long for each token there."""
MOST = 65_536
STATES = 16
"""Vectors as wide as the model that a block holds for each token while it runs, at most."""
UNKNOWN = 4 * 2**30
"""Bytes taken to be there, or free, where the system does not say."""


def tokens_that_fit(lm: LanguageModel, logits: float = 0.0) -> int:
    """Tokens of a batch, padding included.

    Args:
        lm: The model.
        logits: Share of the tokens whose logits are held, with their softmax in float32.
    """
    config = text_config(lm.model)
    parameters = lm.model.parameters()
    size = next((one.element_size() for one in parameters if one.is_floating_point()), 4)
    bytes_each = size * (2 * lm.n_layers * _cached_width(config, lm.width) + STATES * lm.width)
    bytes_each += int(logits * (size + 8) * (getattr(config, "vocab_size", 0) or 0))
    most = MOST_ON_CPU if lm.device.type == "cpu" else MOST
    if logits == 1:
        most //= 8
    return min(most, max(LEAST, total_bytes(lm.device) // SHARE // bytes_each))


def _cached_width(config: Any, width: int) -> int:
    """Numbers of a key or a value of one token and block, at most."""
    heads = getattr(config, "num_attention_heads", None)
    kept = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(kept, int):
        return width
    return kept * (getattr(config, "head_dim", None) or width // heads)


def total_bytes(device: torch.device) -> int:
    """Memory of a device; `UNKNOWN` for kinds other than CPU, CUDA, MPS and XPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return _pages("SC_PHYS_PAGES") if device.type == "cpu" else UNKNOWN


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that nobody uses; for other devices, the computer's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int:
    if name in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    return UNKNOWN
