"""Run a model as a guest: ask what it takes, and leave its modes and flags as they were."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from lirefs.errors import SettingError
from lirefs.model.interrupts import interrupts_held, note, undone
from lirefs.model.weight_swap import fsdp_modules, reshard


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel, DistributedDataParallel and PEFT."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = model._modules.get("_orig_mod")
    inner = compiled or getattr(model, "get_base_model", lambda: model)()
    return model if inner is model else unwrapped(inner)


def accepts(model: nn.Module, name: str) -> bool:
    """Return whether the forward method of ``model`` has a parameter called ``name``."""
    # Wrappers hide it behind **kwargs.
    return name in inspect.signature(unwrapped(model).forward).parameters


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which ``model`` expects its token ids."""
    embedding = maybe_call(model, "get_input_embeddings")
    hook = getattr(embedding, "_hf_hook", None)  # accelerate: an offloaded weight lies on "meta"
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(getattr(hook, "execution_device"))  # noqa: B009 (untyped)
    source = embedding if isinstance(embedding, nn.Module) else model
    tensor = next(itertools.chain(source.parameters(), source.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language part, or None without one."""
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def virtual_tokens(model: nn.Module) -> int:
    """Return how many tokens, or places in the cache, an adapter of PEFT puts before a text."""
    active = getattr(model, "active_peft_config", None)
    return getattr(active, "num_virtual_tokens", None) or 0


def maybe_call(model: nn.Module, method: str) -> Any:
    """Call a method of ``transformers`` models; return None if this model lacks it."""
    function = getattr(model, method, None)
    try:
        return None if function is None else function()
    except (NotImplementedError, AttributeError):
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in evaluation mode without gradients; restore each module's own mode."""
    with _evaluation_mode(model), without_gradients():
        yield


@contextmanager
def without_gradients() -> Iterator[None]:
    """As `torch.no_grad`, whose end an interrupt can skip; that of one inside is made good."""
    with undone() as steps:
        steps.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        torch.set_grad_enabled(False)
        yield


@contextmanager
def as_guest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients of activations: parameters are frozen, then restored.

    Activation checkpointing stays on. Compiled code runs eagerly, so that hooks act. TF32, whose 10
    bits of mantissa turn the flat end of a spectrum into noise, is off. SettingError if the
    parameters were made in inference mode.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise SettingError(
            f"{type(model).__name__} was made under torch.inference_mode(), so no gradient passes "
            "through it; load it outside, or copy its state_dict into a model made outside"
        )
    for module in fsdp_modules(model):
        module._get_fsdp_state()._lazy_init()  # which notes what is trained: below, nothing is
    reshard(model)
    with _evaluation_mode(model), _without_tf32(), eagerly(), undone() as steps:
        steps.append(partial(reshard, model))  # what is gathered again gets its flags again
        steps.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        for parameter in model.parameters():
            steps.append(partial(parameter.requires_grad_, parameter.requires_grad))
            parameter.requires_grad_(False)
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                _let_checkpoint(module, steps)
        with torch.inference_mode(False), torch.enable_grad():
            yield


_EAGER: list[object] = []
"""A token for each use of `start_eager` that has not ended."""
_STANCE: list[Any] = []
_STANCE_LOCK = threading.Lock()


def start_eager() -> Callable[[], None]:
    """Run everything that `torch.compile` made eagerly, until the function returned is called.

    Compiled code ignores hooks that were added after its compilation and keeps those that were
    removed: torch checks neither (`skip_nnmodule_hook_guards`). Nothing is compiled meanwhile, so
    no graph keeps a hook; afterwards compiled code runs as before. The switch is the one of
    `torch.compiler.set_stance` and holds for the whole process.
    """
    token = object()

    def end() -> None:
        with interrupts_held(), _STANCE_LOCK:
            if token in _EAGER:
                _EAGER.remove(token)
                if not _EAGER:
                    _STANCE.pop().__exit__(None, None, None)

    try:
        with interrupts_held(), _STANCE_LOCK:
            if not _EAGER:
                _STANCE.append(torch.compiler.set_stance("force_eager"))
            _EAGER.append(token)
        return end
    except BaseException:
        end()
        raise


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models eagerly inside the `with`, so that hooks act; see `start_eager`."""
    with undone() as steps:
        note(steps, start_eager)
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and TF32 off, so that the caller's settings do not round sums."""
    with torch.autocast(device.type, enabled=False), _without_tf32():
        yield


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least: half precision is for storage, not for arithmetic."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    with undone() as steps:
        steps.append(restore)
        model.eval()
        yield


def _let_checkpoint(module: nn.Module, steps: list[Callable[[], object]]) -> None:
    """Let a checkpointing layer of transformers checkpoint, with its inside in evaluation mode.

    The layer checkpoints only if its own `training` flag is set; inside, the flag would switch
    dropout on. Re-entrant checkpoints would cut the graph, as no input requires a gradient.
    What undoes it is added to `steps`.
    """
    name = "_gradient_checkpointing_func"
    own = module.__dict__.get(name)
    if own is None:
        return

    def run(function: Callable[..., Any], *args: Any) -> Any:
        def inside(*inputs: Any) -> Any:
            module.training = False
            try:
                return function(*inputs)
            finally:
                module.training = True

        return checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False)

    steps.append(partial(setattr, module, name, own))
    module.training = True  # `_evaluation_mode` restores it
    setattr(module, name, run)


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a new switch, and refuses to read the old one once the new one was used.
    name, off = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    with undone() as steps:
        steps.append(partial(setattr, matmul, name, getattr(matmul, name)))
        setattr(matmul, name, off)
        yield


@contextmanager
def plain_greedy(model: Any) -> Iterator[None]:
    """Let ``model.generate`` use its own special tokens and the library's defaults otherwise."""
    models = (model, unwrapped(model))  # PEFT hands its configuration on to the model inside
    names = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(model.generation_config, name) for name in names}
    with undone() as steps:
        for one in models:
            steps.append(partial(setattr, one, "generation_config", one.generation_config))
        model.generation_config = GenerationConfig(**special)  # type: ignore[no-untyped-call]
        yield
