"""The code that a model runs, as texts to compare: hooks, forward methods, classes, functions."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lirefs.errors import ProvenanceError

# Their hooks and forward methods only do what follows from the state that is hashed here.
_KNOWN = {"accelerate", "kfac", "lirefs", "nnsight", "peft", "torch", "transformers"}


def hooks_of(name: str, module: nn.Module) -> list[Any]:
    """The forward hooks of a module; ProvenanceError if nothing is known of one."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if (moving := vars(module).get("_hf_hook")) is not None:  # accelerate: moves inputs to weights
        hooks += getattr(moving, "hooks", [moving])
    if hooks:
        must_be_known(hooks, f"module {name or type(module).__name__!r}")
    return hooks


def must_be_known(hooks: Sequence[Any], where: str) -> None:
    """Raise ProvenanceError for a hook of a package whose hooks are not known."""
    for hook in hooks:
        if package_of(origin_of(hook)) not in _KNOWN:
            named = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise unknown(f"{where} has a forward hook of unknown effect ({named})")


def forward_of(name: str, module: nn.Module) -> str:
    """Name of the method that a module runs; ProvenanceError if a function replaces it."""
    own, of_class = vars(module), type(module).forward
    forward: Any = own.get("_old_forward" if "_hf_hook" in own else "forward", of_class)
    forward = getattr(forward, "__func__", forward)
    borrowed = f"{origin_of(forward)}.{getattr(forward, '__qualname__', '')}"
    if forward is of_class:
        return borrowed
    # A function may borrow the name of another (functools.wraps), but not its code.
    code = getattr(forward, "__code__", None)
    called = "<unnamed>" if code is None else code.co_qualname
    origin = "" if code is None else forward.__globals__["__name__"]
    if ("<" in called or origin == "__main__") and package_of(origin) not in _KNOWN:
        where = f"module {name or type(module).__name__!r}"
        raise unknown(f"the forward method of {where} is replaced by a function ({called})")
    return f"{borrowed} {origin}.{called}"


def code_of(function: Any, where: str) -> Any:
    """Name of a function that a module calls, with what is bound to it; ProvenanceError if none."""
    if isinstance(function, functools.partial):
        bound = [function.args, function.keywords]
        if not is_plain(bound):
            raise unknown(f"{where} is a partial of values that cannot be read")
        return [code_of(function.func, where), str(bound)]
    code = getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))
    called = getattr(function, "__qualname__", type(function).__qualname__)
    origin = origin_of(function)
    if code is not None and package_of(origin) not in _KNOWN:
        if not hasattr(function, "__code__") and is_plain(getattr(function, "__dict__", None)):
            return [origin, class_of(type(function)), str(vars(function))]
        if getattr(function, "__closure__", None) or not hasattr(function, "__code__"):
            raise unknown(f"{where} is a function whose values cannot be read ({called})")
        return [origin, called, _text_of(code)]
    return [origin, called]


def class_of(kind: type) -> list[Any]:
    """Name of the class of a module, and the code of those outside the known packages."""
    own = [one for one in kind.__mro__ if package_of(one.__module__) not in {*_KNOWN, "builtins"}]
    codes = [
        [one.__qualname__, name, _text_of(value.__code__)]
        for one in own
        for name, value in sorted(vars(one).items())
        if hasattr(value, "__code__")
    ]
    return [kind.__qualname__, *codes]


def _text_of(code: types.CodeType) -> str:
    """What a function does, as text that is the same in every process."""
    constants = [
        _text_of(one)
        if isinstance(one, types.CodeType)
        else sorted(map(repr, one))  # whose order is another in every process
        if isinstance(one, frozenset)
        else repr(one)
        for one in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def runs_known_code(model: nn.Module) -> bool:
    """Whether all hooks and forward methods of a model are of known packages or of its classes."""
    try:
        for name, module in model.named_modules():
            hooks_of(name, module)
            forward_of(name, module)
    except ProvenanceError:
        return False
    return not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def origin_of(function: Any) -> str:
    """Name of the module in which a function, or the class of a callable object, was defined."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__


def package_of(module: str) -> str:
    """The first part of a module's name."""
    return module.partition(".")[0]


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or a type, or a container of these."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    return is_scalar(value)


def is_scalar(value: Any) -> bool:
    """Whether a value is a number, a text, a dtype or None."""
    return isinstance(value, bool | int | float | str | torch.dtype | None)


def unknown(reason: str) -> ProvenanceError:
    """The error for a state of a model that cannot be told from others."""
    return ProvenanceError(
        f"{reason}: leave out cache=, journal= and checkpoint= (any_model=True fits and steers a "
        "model that is not recognized)"
    )
