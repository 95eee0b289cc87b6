"""Directions on nnsight: steer in its traces, and in the steps of its generation.

nnsight runs the model itself and no copy, so `lirefs.capture` reads the states that it would read.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from lirefs.export.operators import operators
from lirefs.model.language_model import LanguageModel
from lirefs.model.observe import hidden_of, with_hidden
from lirefs.steering.steer import Steer

__all__ = ["logits", "steer_here", "wrap"]


def wrap(lm: LanguageModel) -> Any:
    """The model for nnsight: its modules as they are, and a copy of its tokenizer."""
    tokenizer = copy.deepcopy(lm.tokenizer)  # nnsight sets padding side and token
    return TransformersModel(lm.model, tokenizer=tokenizer, task="text-generation")


def steer_here(steer: Steer, model: Any, lm: LanguageModel) -> None:
    """Steer the trace, or the step of a generation, inside which it is called.

    nnsight wants modules touched in the order of the forward pass: what the same trace reads must
    come after the last layer that is steered, or be read in a trace of its own. To steer the
    prompt and every generated token, call it once for each step of the generation:

        with model.generate(max_new_tokens=40) as tracer:
            with tracer.invoke("Q: ..."):
                for _ in tracer.iter[:]:
                    steer_here(steer, model, lm)
            with tracer.invoke():
                result = tracer.result.save()

    Args:
        steer: Steering of every token (see `operators`).
        model: What `wrap` returned.
        lm: The model that was wrapped.

    Raises:
        BackendError: The steering cannot be carried over.
        InterventionError: The steering does not fit the model.
    """
    names = {module: name for name, module in model._module.named_modules()}
    for layer, site, operator in operators(steer, lm):
        module, side = lm.layout.module(model._module, site, layer)
        envoy = model.get(names[module])
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
