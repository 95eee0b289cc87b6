"""Directions on nnsight: fit them from its traces, steer in traces and in generation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from nnsight import save
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from lirefs.directions.capture import Activations, check_finite
from lirefs.errors import CaptureError
from lirefs.export.operators import operators
from lirefs.model.hidden_states import hidden_of, with_hidden
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import Layout
from lirefs.steering.steer import Steer

__all__ = ["capture", "generate", "logits", "steer_here", "wrap"]


def wrap(lm: LanguageModel) -> Any:
    """The model for nnsight. Its modules are used as they are; only the tokenizer is copied.

    (nnsight sets the tokenizer's padding side and token.)
    """
    return TransformersModel(
        lm.model, tokenizer=copy.deepcopy(lm.tokenizer), task="text-generation"
    )


def steer_here(steer: Steer, model: Any, lm: LanguageModel) -> None:
    """Steer the trace, or the step of a generation, inside which it is called.

    nnsight wants modules touched in the order of the forward pass: what the same trace reads
    must come after the last layer that is steered, or be read in a trace of its own.

    Args:
        steer: Steering of every token (see `operators`).
        model: What `wrap` returned.
        lm: The model that was wrapped.

    Raises:
        BackendError: The steering cannot be carried over.
        InterventionError: The steering does not fit the model.
    """
    for layer, site, operator in operators(steer, lm):
        envoy, side = _envoy(model, lm.layout, layer, site)
        if side == "input":
            envoy.input = operator(envoy.input)
        else:
            output = envoy.output
            envoy.output = with_hidden(output, operator(hidden_of(output)))


def logits(model: Any, lm: LanguageModel, inputs: Any, steer: Steer | None = None) -> Tensor:
    """Logits of one forward pass, (rows, tokens, vocabulary), steered or not.

    Args:
        model: What `wrap` returned.
        lm: The model that was wrapped.
        inputs: Anything that `model.trace` takes: texts or token ids, padded on the left.
        steer: The steering, if any.

    Raises:
        BackendError: The steering cannot be carried over.
    """
    with torch.no_grad(), model.trace(inputs):
        if steer is not None:
            steer_here(steer, model, lm)
        result = model.output.logits.save()
    return torch.as_tensor(result)


def generate(
    model: Any,
    lm: LanguageModel,
    inputs: Any,
    steer: Steer | None = None,
    max_new_tokens: int = 40,
) -> Tensor:
    """Token ids of greedy generation, prompt included, (rows, tokens).

    Args:
        model: What `wrap` returned.
        lm: The model that was wrapped.
        inputs: Anything that `model.generate` takes.
        steer: The steering, if any: of the prompt and of every generated token.
        max_new_tokens: The most tokens to add.

    Raises:
        BackendError: The steering cannot be carried over.
    """
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with torch.no_grad(), warnings.catch_warnings():
        # The open loop ends with the last step, which nnsight warns of every time.
        warnings.filterwarnings("ignore", message=".*was never reached")
        with model.generate(**settings) as tracer:
            with tracer.invoke(inputs):
                if steer is not None:
                    for _ in tracer.iter[:]:
                        steer_here(steer, model, lm)
            with tracer.invoke():
                result = tracer.result.save()
    return torch.as_tensor(result)


def capture(
    model: Any,
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_pre",
    batch: int = 16,
) -> Activations:
    """Activations of the last prompt token, read in traces that end after the last layer needed.

    Args:
        model: What `wrap` returned.
        lm: The model; its tokenizer is used.
        prompts: Texts.
        layers: Layers to read; None for all.
        site: Where in the block.
        batch: Prompts per trace.

    Raises:
        CaptureError: There are no prompts, or a value is not finite.
        LayoutError: The architecture lacks the site.
    """
    if not prompts:
        raise CaptureError("no prompts to capture activations of")
    chosen = sorted(range(lm.n_layers) if layers is None else layers)
    ids = lm.encode(prompts)
    rows = []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        inputs = lm.pad(part)  # on the left: the last token is at -1
        with torch.no_grad(), model.trace(inputs) as tracer:
            states = save([])
            for layer in chosen:
                envoy, side = _envoy(model, lm.layout, layer, site)
                found = envoy.input if side == "input" else envoy.output
                hidden = hidden_of(found, batch=len(part))  # some modules flatten the batch (OPT)
                states.append(hidden[:, -1].detach().float().cpu())
            tracer.stop()
        rows.append(torch.stack(list(states), dim=1))
    values, places = torch.cat(rows)[:, :, None], tuple((one, site) for one in chosen)
    check_finite(values, places, (-1,), range(len(values)))
    return Activations(values, places, (-1,))


def _envoy(model: Any, layout: Layout, layer: int, site: str) -> tuple[Any, str]:
    """The envoy, as nnsight calls its wrappers, of the module of a site; and the site's side."""
    module, side = layout.module(model._module, site, layer)
    path = next(name for name, one in model._module.named_modules() if one is module)
    envoy = model
    for part in path.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy, side
