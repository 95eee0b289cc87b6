"""Steering on an engine of vLLM, in all of its workers, and directions for vllm-lens.

vLLM is imported when something here is called. The engine needs `lirefs.export.vllm.OPTIONS`.
"""

from __future__ import annotations

import importlib
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lirefs.errors import BackendError, TaskError, first_line_of_error
from lirefs.export.operators import operators
from lirefs.export.vllm_layers import shared_scope
from lirefs.model.intervention import Intervention, compose
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import Layout
from lirefs.steering.scope import ALL
from lirefs.steering.steer import Steer

WORKER = "lirefs.export.vllm_worker.Worker"
OPTIONS: Mapping[str, Any] = {"enforce_eager": True, "worker_cls": WORKER}
"""What an engine needs to be steered: `vllm.LLM(model, **OPTIONS)`."""
OLDEST = (0, 32)


@contextmanager
def steered(llm: Any, intervention: Intervention) -> Iterator[Any]:
    """An engine of vLLM, steered inside the `with`, and afterwards as it was before.

    Each worker finds those layers in its own process, so tensor and pipeline parallelism need
    nothing more. Cached prefixes are dropped on entry and exit, since they hold states of the other
    model. An engine has neither the modules nor all the weights that a direction was fitted on, so
    of its model only width and number of layers are compared; `Engine.check` compares more.

    Args:
        llm: A `vllm.LLM`, made with `**OPTIONS`, that runs no request now.
        intervention: A steering or a composition of them: any operator, with one strength or one
            for each layer. Scopes other than `all` and `from_position` need an engine with
            `enable_prefix_caching=False`: a cached prefix may be one request's prompt and another
            one's answer.

    Raises:
        BackendError: vLLM is missing or too old, the engine compiles its model or has another
            worker class, its family is unknown, or the steering cannot be carried over or does not
            fit. Nothing is left on the engine then.
    """
    config = _config_of(llm)
    steerings = steerings_of(intervention)
    must_carry(config, steerings)
    plans = [plan_of(one, config) for one in steerings]
    key = uuid.uuid4().hex
    _forget_prefixes(llm)
    try:
        problems = llm.collective_rpc("lirefs_steer", args=(key, plans))
        if problem := next(filter(None, problems), ""):
            raise BackendError(problem)
        yield llm
    finally:
        llm.collective_rpc("lirefs_release", args=(key,))
        _forget_prefixes(llm)


def steerings_of(intervention: Intervention) -> list[Steer]:
    """The steerings of an intervention, else BackendError."""
    members = compose(intervention).members
    for one in members:
        if not isinstance(one, Steer):
            raise BackendError(f"{type(one).__name__} cannot act on vLLM; only steering can")
    return [one for one in members if isinstance(one, Steer)]


def plan_of(steer: Steer, config: Any) -> dict[str, Any]:
    """What a worker needs to know of a steering, as JSON values; BackendError if it does not fit.

    Args:
        steer: The steering.
        config: The engine's `vllm_config`.
    """
    model = config.model_config
    layers, width = model.get_total_num_hidden_layers(), model.get_hidden_size()
    layout = Layout("", (), (), None, None, layers, width, ())
    steer.check_shapes(layout)
    return {
        "scope": steer.scope.describe(),
        "places": [
            {
                "layer": layer,
                "site": site,
                "operator": operator.name,
                "strength": operator.strength,
                "vector": operator.direction.tolist(),
            }
            for layer, site, operator in steer.operators(layout)
        ],
    }


def must_carry(config: Any, steerings: Sequence[Steer]) -> None:
    """Raise BackendError if an engine of this `vllm_config` cannot carry these steerings."""
    if not config.model_config.enforce_eager:
        raise BackendError(
            "this engine compiles its model, and compiled layers run no hooks; make it with "
            "enforce_eager=True (vllm serve --enforce-eager)"
        )
    if config.parallel_config.worker_cls != WORKER:
        raise BackendError(
            "the workers of this engine cannot be steered; make it with "
            f'worker_cls="{WORKER}" (lirefs.export.vllm.OPTIONS)'
        )
    for one in steerings:
        scope = shared_scope(one)
        if scope is not ALL and config.use_v2_model_runner:
            raise BackendError(
                f"the scope is {scope.name!r}, and the second model runner of vLLM does not say "
                "which token belongs to which request; set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        if not scope.absolute and config.cache_config.enable_prefix_caching:
            raise BackendError(
                f"the scope is {scope.name!r}, but this engine caches prefixes, and a cached token "
                "may be prompt in one request and generated in another; make it with "
                "enable_prefix_caching=False (vllm serve --no-enable-prefix-caching)"
            )


def _config_of(llm: Any) -> Any:
    """The `vllm_config` of an engine, else BackendError."""
    try:
        vllm: Any = importlib.import_module("vllm")
    except ImportError as problem:
        reason = first_line_of_error(problem)
        raise BackendError(f"vLLM cannot be imported ({reason}); pip install vllm") from problem
    if tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(f"vLLM {vllm.__version__} is too old; install {oldest} or newer")
    if not isinstance(llm, vllm.LLM):
        raise BackendError(f"llm must be a vllm.LLM, got {type(llm).__name__}")
    return llm.llm_engine.vllm_config


def _forget_prefixes(llm: Any) -> None:
    if llm.llm_engine.has_unfinished_requests() or not llm.reset_prefix_cache():
        raise BackendError("the engine still runs requests; steer it when they have finished")


class Engine:
    """A vLLM engine on which `lirefs.compare` runs the tasks that generate their answers.

    Args:
        llm: A `vllm.LLM`, made with `**OPTIONS`.
    """

    def __init__(self, llm: Any) -> None:
        self._config = _config_of(llm)
        must_carry(self._config, [])
        self.llm = llm

    def describe(self) -> dict[str, Any]:
        """What decides its numbers, as JSON values."""
        version = importlib.import_module("vllm").__version__
        dtype = str(self._config.model_config.dtype).removeprefix("torch.")
        return {"runtime": "vllm", "version": version, "dtype": dtype}

    def check(self, lm: LanguageModel) -> None:
        """Raise BackendError unless the engine seems to run this model.

        Layers, width, and the weights of the final norm are compared, the latter where every
        worker holds them whole and under the name that they have in `transformers`.
        """
        model = self._config.model_config
        sizes = (model.get_total_num_hidden_layers(), model.get_hidden_size())
        name = f"{lm.layout.final_norm}.weight"
        own = dict(lm.model.named_parameters()).get(name)
        differs = sizes != (lm.n_layers, lm.width)
        if not differs and own is not None:
            expected = own.detach().cpu().to(model.dtype).float()
            found = filter(None, self.llm.collective_rpc("lirefs_weight", args=(name,)))
            differs = any(not torch.equal(torch.tensor(one), expected) for one in found)
        if differs:
            raise BackendError(f"the engine runs {model.model}, which is not {lm.name}")

    def steered(self, intervention: Intervention) -> AbstractContextManager[Any]:
        """The engine, steered inside a `with`; see `steered`."""
        return steered(self.llm, intervention)

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Collection[int],
        until: Sequence[str],
    ) -> list[list[int]]:
        """Greedy continuations, each at most up to a token or a text that ends it."""
        sampling = importlib.import_module("vllm").SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            ignore_eos=True,
            stop_token_ids=sorted(ends),
            stop=list(until),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            found = self.llm.generate(given, sampling, use_tqdm=False)
        except ValueError as problem:  # a prompt is longer than max_model_len
            raise TaskError(f"vLLM: {first_line_of_error(problem)}") from problem
        return [list(one.outputs[0].token_ids) for one in found]


def to_vllm_lens(steer: Steer, lm: LanguageModel) -> dict[str, Any]:
    """A steering by `add` as the plug-in vllm-lens takes it with a request.

    vllm-lens adds to the output of a layer, at every token. Adding to the input of layer L is
    adding to the output of layer L - 1.

    Args:
        steer: Steering by `add`, of every token, with one strength or one for each layer.
        lm: The model to be steered.

    Returns:
        Arguments of `vllm_lens.SteeringVector`: `activations`, float32, (layers, width), and
        `layer_indices`.

    Raises:
        BackendError: The steering is not an addition, or acts where vllm-lens cannot.
        InterventionError: The steering does not fit the model.
    """
    summed: dict[int, Any] = {}
    for layer, site, operator in operators(steer, lm):
        block = layer - 1 if site == "resid_pre" else layer
        if operator.name != "add" or site == "attn_out" or block < 0:
            raise BackendError(
                f"vllm-lens adds to the output of layers, and cannot {operator.name} at layer "
                f"{layer}, {site}"
            )
        summed[block] = summed.get(block, 0) + operator.strength * operator.direction
    if not summed:
        raise BackendError("there is nothing to write: the strength is 0")
    layers = sorted(summed)
    activations = torch.stack([summed[layer] for layer in layers]).float()
    return {"activations": activations, "layer_indices": layers}
