"""Stop the making of a model that is larger than its files, while it is still without memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import module as hooks

from lirefs.model.untrusted.folder import Weights

_SLACK = 16 << 20
"""Weights, and bytes of buffers, that any model may have."""


@contextmanager
def no_larger_than(weights: Callable[[], Weights]) -> Iterator[None]:
    """A context in which a model with far more weights, buffers or modules is a ValueError.

    transformers makes a model on the meta device before it takes memory and reads weights. Each
    weight, buffer and module is counted when it is registered, so a hostile configuration is
    stopped at its first excess. `weights` is asked once, at the first of them, because files of the
    hub are there by then. A weight that two modules share counts twice, and so does one that a
    quantizer replaces.
    """
    mine, found = threading.get_ident(), {"weights": 0, "bytes of buffers": 0, "modules": 0}
    most: dict[str, float] = {}

    def count(what: str, number: int) -> None:
        if not most:
            held = weights()
            most["weights"] = 3 * held.elements + _SLACK
            most["bytes of buffers"] = 8 * held.elements + 4 * _SLACK
            most["modules"] = 4 * held.tensors + 1000
        found[what] += number
        if found[what] > most[what]:
            raise ValueError(
                f"its configuration is of a larger model than its files hold: more than "
                f"{most[what]:,.0f} {what}"
            )

    def parameter(module: Any, name: str, one: Any) -> None:
        if one is not None and one.is_meta and threading.get_ident() == mine:
            count("weights", one.numel())

    def buffer(module: Any, name: str, one: Any) -> None:
        if one is not None and one.is_meta and threading.get_ident() == mine:
            count("bytes of buffers", one.numel() * one.element_size())

    def child(module: Any, name: str, one: Any) -> None:
        if threading.get_ident() == mine:
            count("modules", 1)

    handles = [
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_buffer_registration_hook(buffer),
        hooks.register_module_module_registration_hook(child),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
