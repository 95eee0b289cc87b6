"""How many tokens a batch may have: as many as its share of the memory holds."""

from __future__ import annotations

import os

import torch

from lirefs.model.guest import text_config
from lirefs.model.language_model import LanguageModel

SHARE = 16
"""A batch may fill this part of all memory of the device, so equal machines make equal batches."""
LEAST = 256
MOST_ON_CPU, MOST = 8192, 65_536
"""On a CPU larger batches take as long for each token."""
STATES = 16
"""Vectors as wide as the model that a block holds for each token while it runs, at most."""
UNKNOWN = 4 * 2**30
"""Bytes taken to be there, or free, where the system does not say."""


def batch_tokens(lm: LanguageModel, *, logits: bool = False) -> int:
    """Tokens of a batch, padding included.

    Args:
        lm: The model.
        logits: Whether the logits of all its tokens are held, and their softmax in float32.
    """
    size = next((one.element_size() for one in lm.model.parameters()), 4)
    cached = 2 * lm.n_layers * lm.width  # as with a key and a value of each head
    bytes_each = size * (cached + STATES * lm.width)
    most = MOST_ON_CPU if lm.device.type == "cpu" else MOST
    if logits:
        bytes_each += (size + 8) * (getattr(text_config(lm.model), "vocab_size", 0) or 0)
        most //= 8
    return min(most, max(LEAST, total_bytes(lm.device) // SHARE // bytes_each))


def total_bytes(device: torch.device) -> int:
    """Memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _pages("SC_PHYS_PAGES") if device.type == "cpu" else UNKNOWN


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; of the computer's for devices other than CUDA's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int:
    if name in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    return UNKNOWN
