"""The engine as a model of lm-evaluation-harness (which must be installed to import this)."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lirefs.errors import TaskError
from lirefs.model.intervention import Intervention, applied
from lirefs.model.language_model import LanguageModel
from lirefs.tasks.batches.memory import tokens_that_fit
from lirefs.tasks.inference import greedy, score_continuations

# Decoding settings that a request may have; the last two change nothing without sampling.
_SETTINGS = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k"}


class EngineLM(TemplateLM):
    """See `lirefs.lm_eval_model`."""

    def __init__(
        self, lm: LanguageModel, intervention: Intervention | None, batch_tokens: int | None
    ) -> None:
        super().__init__()
        self.lm = lm
        self.intervention = intervention
        self.batch_tokens = batch_tokens
        self.tokenizer = lm.tokenizer
        self.max_length = resolve_max_length(lm.model.config, lm.tokenizer)
        self.max_gen_toks = 256  # HFLM's default

    @property
    def eot_token_id(self) -> int | None:
        """Id of the end-of-text token."""
        return cast(int | None, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int | None:
        """Id of the token before a text that has no context."""
        token = cast(int | None, self.tokenizer.bos_token_id)
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm-eval caches requests with a chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Description of the model that lm-eval saves with its results."""
        made_on = self.lm.provenance
        return {
            "model": self.lm.name,
            "model_sha256": made_on.get("model"),
            **{key: made_on[key] for key in ("identity", "model_unknown") if key in made_on},
            "intervention": self.intervention and self.intervention.describe(),
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids as `lm.encode` gives them."""
        return self.lm.encode([string], add_special_tokens=add_special_tokens is not False)[0]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, written with the tokenizer's template."""
        template = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return cast(str, template(chat_history))
        except TemplateError:  # some templates refuse a system prompt; HFLM leaves it out as well
            return cast(str, template([one for one in chat_history if one["role"] != "system"]))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        logits: bool = False,
    ) -> list[tuple[float, bool]]:
        prompts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise TaskError(
                    f"log-likelihood request {index} has {len(context)} tokens of context and "
                    f"{len(continuation)} to score; it needs at least 1 of each, and at most "
                    f"{self.max_length} to score"
                )
            # The last token is only scored, so one more than the model's length fits.
            kept = max(1, self.max_length + 1 - len(continuation))
            prompts[tuple(context[-kept:])].append(index)
        items = [(prompt, [requests[i][2] for i in rows]) for prompt, rows in prompts.items()]
        budget = self.batch_tokens
        if logits:  # of all tokens of a batch are held
            budget = tokens_that_fit(self.lm, 1.0) if budget is None else max(1, budget // 4)
        with applied(self.intervention, self.lm.model), _bar(len(items), disable_tqdm) as bar:
            found = score_continuations(self.lm, items, batch_tokens=budget, advance=bar.update)
        rows = itertools.chain.from_iterable(prompts.values())
        results = dict(zip(rows, itertools.chain.from_iterable(found), strict=True))
        return [results[row] for row in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts; longer ones are scored in windows of the model's length.

        For steering in scopes, the token before the text is the prompt.
        """
        first, length = self.prefix_token_id, self.max_length
        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, first, max_seq_len=length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        flat = [window for some in windows for window in some]
        scored = iter(self._loglikelihood_tokens(flat, disable_tqdm, logits=True))
        return [sum((next(scored)[0] for _ in some), 0.0) for some in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first stop string."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._greedy_settings(request.args[1])].append(index)
        results = [""] * len(requests)
        with applied(self.intervention, self.lm.model), _bar(len(requests), disable_tqdm) as bar:
            for (until, limit), rows in groups.items():
                room = self.max_length - limit
                outputs = greedy(
                    self.lm,
                    [self.tok_encode(requests[row].args[0])[-room:] for row in rows],
                    limit,
                    stop=self.lm.end_tokens.__contains__,
                    until=until,
                    batch_tokens=self.batch_tokens,
                    advance=bar.update,
                )
                for row, output in zip(rows, outputs, strict=True):
                    text = self.tokenizer.decode(output, skip_special_tokens=True)
                    results[row] = postprocess_generated_text(text, list(until), None)
        return results

    def _greedy_settings(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Stop strings and length limit of a request."""
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        unknown = ", ".join(sorted(set(known) - _SETTINGS))
        if known["do_sample"] or unknown:
            raise TaskError(
                f"generation is greedy here, but the task asks for {unknown or 'sampling'} in its "
                f"generation_kwargs: {settings}"
            )
        limit: int = known["max_gen_toks"]
        if not 0 < limit < self.max_length:
            raise TaskError(
                f"the task generates {limit} tokens (max_gen_toks), which leaves no room for a "
                f"prompt in the model's {self.max_length}"
            )
        end = self.eot_token_id
        eos = None if end is None else self.tokenizer.decode([end])
        return tuple(handle_stop_sequences(known["until"], eos=eos)), limit


def _bar(total: int, disable: bool) -> Any:
    return tqdm(total=total, unit="item", desc="lm-eval requests", disable=disable or None)
