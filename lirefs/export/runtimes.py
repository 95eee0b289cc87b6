"""What runs a steering without changed weights, each asked by its own exporter's check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lirefs.errors import LirefsError
from lirefs.export.gguf import control_vector
from lirefs.export.operators import operators_on
from lirefs.export.vllm_layers import shared_scope
from lirefs.steering.steer import Steer


@dataclass(frozen=True)
class Runtime:
    """Something that runs a steered model.

    Attributes:
        name: As users call it.
        check: Raises a LirefsError if it cannot carry a steering of a model.
        run: What to run.
    """

    name: str
    check: Callable[[Steer, nn.Module], object]
    run: str

    def refusal(self, steer: Steer, model: nn.Module) -> str:
        """Why it cannot carry this steering of this model; empty where it can."""
        try:
            self.check(steer, model)
        except LirefsError as problem:
            return str(problem)
        return ""


def _vllm(steer: Steer, model: nn.Module) -> None:
    steer.check(model)
    shared_scope(steer)


RUNTIMES = (
    Runtime(
        "transformers hooks",
        lambda steer, model: steer.check(model),
        "with steer.apply(lm.model): lm.generate(prompt)",
    ),
    Runtime(
        "TransformerLens",
        operators_on,
        "bridge = transformer_lens.boot(lm); "
        "with bridge.hooks(fwd_hooks=transformer_lens.hooks(steer, bridge, lm)): bridge(prompt)",
    ),
    Runtime(
        "nnsight",
        operators_on,
        "model = nnsight.wrap(lm); with model.trace(prompt): nnsight.steer_here(steer, model, lm)",
    ),
    Runtime(
        "vLLM",
        _vllm,
        "llm = vllm.LLM(model, enable_prefix_caching=False, **lirefs.export.vllm.OPTIONS); "
        "with lirefs.export.vllm.steered(llm, steer): llm.generate(prompt)",
    ),
    Runtime(
        "llama.cpp control vector",
        control_vector,
        'lirefs.export.to_gguf(steer, "c.gguf", lm); '
        "llama-server -m MODEL.gguf --control-vector c.gguf",
    ),
)
