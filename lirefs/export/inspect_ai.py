"""Steered and edited models as models of inspect_ai (https://inspect.aisi.org.uk).

    inspect eval task.py --model lirefs/organism -M directions=FILE -M layer=1 -M strength=4

Of the settings of an evaluation, `max_tokens`, `temperature`, `top_p`, `top_k`, `seed` and
`stop_seqs` are used; others that would change an answer are refused, and so are tools.
"""

from __future__ import annotations

from typing import Any

import torch
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from lirefs.directions.directions import Directions
from lirefs.errors import BackendError
from lirefs.model.intervention import Intervention, applied
from lirefs.model.language_model import LanguageModel
from lirefs.model.loading import load
from lirefs.model.prompts import with_prompts
from lirefs.steering.steer import Steer

__all__ = ["LirefsAPI", "model"]

_REFUSED = (
    "best_of", "frequency_penalty", "logit_bias", "logprobs", "num_choices", "presence_penalty",
    "prompt_logprobs", "response_schema", "top_logprobs",
)  # fmt: skip
_TOKENS = 2048
"""Most tokens of an answer where the evaluation sets no limit: inspect's own number."""


def model(
    lm: LanguageModel,
    intervention: Intervention | None = None,
    config: GenerateConfig | None = None,
) -> Model:
    """A model for `inspect_ai.eval(task, model=...)`; the log tells how it was changed.

    Args:
        lm: The model. Several models of inspect may share it, each with its own intervention,
            which is attached for the time of an answer.
        intervention: Steering, a weight edit or a composition; None: the model as it is.
        config: Settings for all its answers.
    """
    config = config or GenerateConfig()
    api = LirefsAPI(lm.name, config=config, lm=lm, intervention=intervention)
    changed = {} if intervention is None else {"intervention": intervention.describe()}
    return Model(api, config, changed)


@modelapi("lirefs")
class LirefsAPI(ModelAPI):
    """The provider of `lirefs/MODEL`, where MODEL is any name that `lirefs.load` takes.

    The direction of a file is added, or used as `operator` says, if `directions` is given. One
    prompt runs at a time. The prompt is the chat template's; without a template it is the text of
    the only message.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (the signature that inspect asks for)
        *,
        directions: str | None = None,
        layer: int | None = None,
        operator: str = "add",
        strength: float = 1.0,
        lm: LanguageModel | None = None,
        intervention: Intervention | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.lm = load(model_name, **settings) if lm is None else lm
        self.intervention = intervention
        if directions is not None:
            found = Directions.load(directions, self.lm)
            place = found.provenance.get("best_layer") if layer is None else layer
            one = next(iter(found.values())) if len(found) == 1 else found[place]  # type: ignore[index]
            self.intervention = Steer(one, operator, float(strength))

    def max_connections(self) -> int:
        """Prompts at a time."""
        return 1

    async def generate(
        self, input: list[ChatMessage], tools: Any, tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """The answer to a conversation, greedy unless the evaluation sets a temperature."""
        if tools:
            raise BackendError("lirefs models call no tools; use a task without them")
        if unused := [name for name in _REFUSED if getattr(config, name) is not None]:
            raise BackendError(f"lirefs models do not support {', '.join(unused)}; leave it out")
        prompt, most = self._prompt(input), config.max_tokens or _TOKENS
        settings: dict[str, Any] = {"return_dict_in_generate": True}
        if config.temperature:
            names = ("temperature", "top_p", "top_k")
            given = {name: getattr(config, name) for name in names}
            settings |= {name: value for name, value in given.items() if value is not None}
            settings["do_sample"] = True
        if config.stop_seqs:
            settings |= {"stop_strings": config.stop_seqs, "tokenizer": self.lm.tokenizer}
        with torch.random.fork_rng(enabled=config.seed is not None):
            if config.seed is not None:
                torch.manual_seed(config.seed)
            with applied(self.intervention, self.lm.model):
                out = self.lm.generate(prompt, most, **settings)
                ids = self.lm.encode([prompt])
                read = len(with_prompts(self.lm.model, self.lm.tokenizer, ids)[0])
        new = out.sequences[0, read:]
        text = self.lm.tokenizer.decode(new, skip_special_tokens=True)
        ended = len(new) < most
        for stop in config.stop_seqs or ():
            ended |= stop in text
            text = text.partition(stop)[0]
        answer = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        choice = ChatCompletionChoice(message=answer, stop_reason="stop" if ended else "max_tokens")
        usage = ModelUsage(input_tokens=read, output_tokens=len(new), total_tokens=read + len(new))
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage)

    def _prompt(self, messages: list[ChatMessage]) -> str:
        if self.lm.tokenizer.chat_template is None and len(messages) == 1:
            return str(messages[0].text)
        return self.lm.chat([{"role": one.role, "content": one.text} for one in messages])
