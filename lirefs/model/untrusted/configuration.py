"""Refuse a configuration that asks for code of the hub, or for more parts than memory holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.import_utils import is_kernels_available

_LAYERS = {"num_hidden_layers", "num_layers", "n_layers", "n_layer"}
_PARTS = re.compile("layer|block|depth|stage|expert|label|group")
_MOST_PARTS = 1_000_000
"""Configurations keep a list entry for each of them."""
_SIZES = re.compile("r|.*_r|.*(rank|dim|size|tokens|layers|blocks)")
_SMALL_RANK = 1024
_OF_TORCH = {"eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm"}
"""Implementations of attention and experts for which nothing is ever fetched."""


def check_configuration(config: Mapping[str, Any], most_layers: int) -> None:
    """Raise ValueError if a configuration, a parsed config.json, is not safe to make a model of.

    It may ask for at most so many layers. An implementation with a slash is a repository of the
    hub, whose code transformers would run; where the `kernels` package is installed, names that are
    not torch's own are fetched too.
    """
    if not isinstance(config, Mapping):
        raise ValueError("it is not a JSON object")
    for key, value in _entries(config):
        if re.search("_implementation(_internal)?$", key):
            for name in value.values() if isinstance(value, Mapping) else [value]:
                if name is not None and (
                    not isinstance(name, str)
                    or "/" in name
                    or (name not in _OF_TORCH and is_kernels_available())
                ):
                    raise ValueError(
                        f"{key} is {name!r:.80}, code that would be fetched; remove it from the "
                        "configuration"
                    )
        most = most_layers if key in _LAYERS else _MOST_PARTS if _PARTS.search(key) else None
        if most is not None and type(value) in (int, float) and value > most:
            raise ValueError(f"{key} is {value}, more than {most}")


def check_adapter(config: Mapping[str, Any], sizes: Sequence[int]) -> None:
    """Raise ValueError if an adapter is larger than its file, whose tensors have these sizes.

    PEFT takes memory for an adapter by its configuration, before it reads the file.
    """
    most = max(_SMALL_RANK, *sizes)
    ranks = config.get("rank_pattern") or {}
    asked = {key: one for key, one in config.items() if _SIZES.fullmatch(key)} | dict(ranks)
    for key, value in asked.items():
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"{key} is {value}, more than any size in its file, {most}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth."""
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, Mapping):
            yield from ((str(key), entry) for key, entry in one.items())
            stack += one.values()
        elif isinstance(one, list):
            stack += one
