"""A language model with its tokenizer and its verified layout."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lirefs.errors import (
    ProvenanceError,
    SettingError,
    as_list,
    first_line_of_error,
    got,
    must_be,
    whole_number,
)
from lirefs.files import html_table
from lirefs.model.batching import check_length, checked_ids, token_ids, tokenizer_hash
from lirefs.model.guest import evaluating, input_device, maybe_call, plain_greedy, virtual_tokens
from lirefs.model.identity import fingerprint, identity
from lirefs.model.layout import Layout
from lirefs.model.layout_search import find_layout
from lirefs.model.prompts import with_prompts
from lirefs.model.traits import Traits, traits_of

BATCH_TOKENS = 1024
"""Default number of tokens in a batch."""
_OWN = {"input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids"}  # of a prompt


class LanguageModel:
    """A decoder and its tokenizer. Made by ``load`` or ``wrap``.

    The model is a guest: nothing here changes its weights, hooks or training mode.

    Attributes:
        model: The ``transformers`` model.
        tokenizer: Its tokenizer.
        layout: Where its parts are, verified.
        name: Its name in reports.
    """

    def __init__(self, model: Any, tokenizer: Any, layout: Layout, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.name = name

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, layers={self.n_layers}, width={self.width})"

    def _repr_html_(self) -> str:
        numbers = {"device": self.device, "model": type(self.model).__name__}
        row = {"name": self.name, "layers": self.n_layers, "width": self.width, **numbers}
        return html_table(repr(self), [row])

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its token ids."""
        return input_device(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self.layout.n_layers

    @property
    def width(self) -> int:
        """Size of the residual stream."""
        return self.layout.width

    @property
    def traits(self) -> Traits:
        """Which padding and caches leave a row as it is alone; print it for a list.

        Found by a few forward passes on six tokens when the model is loaded or wrapped (where
        weights are offloaded: at the first use), and kept for the configuration. Everything here
        pads and caches accordingly.
        """
        return traits_of(self.model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the model computes apart from rounding, as 64 hex digits.

        Of configuration, parameters, saved buffers, quantized state, adapters, and the steerings
        and weight edits that are attached. Directions record it, and steering compares it.

        Computed at the first use, and again after a tensor was replaced or changed in place.
        (A change through ``parameter.data`` is invisible to PyTorch, and so to this.) What was set
        on a module itself, such as ``attention.scaling``, counts in ``identity`` alone.

        Raises:
            ProvenanceError: A weight is offloaded or opaque and cannot be read, or a steering with
                a scope of your own is attached.
        """
        return fingerprint(self.model)

    @property
    def identity(self) -> str:
        """SHA-256 of all that decides the numbers that come out now, as 64 hex digits.

        The key of caches, journals and checkpoints: the fingerprint, and the attention
        implementation, autocast, buffers that are not saved, the layout, and the class, settings
        and forward method of every module.

        Raises:
            ProvenanceError: As for `fingerprint`; or a module has a forward hook, or a replaced
                forward method, of which nothing is known.
        """
        return identity(self.model, self.layout.describe())

    @property
    def provenance(self) -> dict[str, str]:
        """What results record about the model: its `model_name`, and by hashes its state.

        These are `model` (the fingerprint), `identity` and `tokenizer`. What cannot be computed is
        left out, and `model_unknown` says why.
        """
        found = {"model_name": self.name, "tokenizer": self.tokenizer_fingerprint}
        try:
            found["model"] = self.fingerprint
            found["identity"] = self.identity
        except ProvenanceError as problem:
            found["model_unknown"] = str(problem)
        return found

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the rules and the special tokens, as 64 hex digits."""
        return tokenizer_hash(self.tokenizer)

    def encode(self, prompts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each prompt, without padding.

        A prompt ends with the last token of its text: what the tokenizer appends is left out. One
        that begins with the tokenizer's first token, as after a chat template, has it once.

        Args:
            prompts: Texts.
            add_special_tokens: Whether the tokenizer adds its own at the beginning. If not, the
                ids are exactly those of ``tokenizer(text, add_special_tokens=False)``.

        Raises:
            SettingError: ``prompts`` is one string, or holds something that is not a string.
        """
        texts = as_list(prompts, "prompts")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise SettingError(f"prompt {index} is not a string but {type(text).__name__}")
        return token_ids(self.tokenizer, texts, add_special_tokens) if texts else []

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat: messages in the tokenizer's template, up to where an answer begins.

        Messages that end with one of the assistant are left open there, to be continued.

        Args:
            messages: Each with `role` and `content`; or one text, the message of a user.

        Raises:
            SettingError: The tokenizer has no chat template, or the template refuses the messages.
        """
        given = messages
        if isinstance(messages, str):
            given = [{"role": "user", "content": messages}]
        talk = as_list(given, "messages", Mapping)
        if not talk:
            raise SettingError("messages are empty: give at least one")
        opened = talk[-1].get("role") == "assistant"
        try:
            ends = {"add_generation_prompt": not opened, "continue_final_message": opened}
            return str(self.tokenizer.apply_chat_template(talk, tokenize=False, **ends))
        except Exception as problem:  # of the template, which may raise anything
            reason = first_line_of_error(problem)
            raise SettingError(f"{self.name}: no prompt for this chat ({reason})") from problem

    def pad(self, ids: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Return a batch for the model.

        Args:
            ids: Token ids of each sequence; at least one token each.
            side: Where the padding goes, ``left`` or ``right``.

        Returns:
            ``input_ids`` and ``attention_mask``, and ``position_ids`` if the model heeds them:
            integers, ``(batch, tokens)``, on the model's device. Positions count real tokens
            from 0; padding on the left has position 0.

        Raises:
            SettingError: An unknown side, no sequence, or an empty sequence.
        """
        if side not in ("left", "right"):
            raise SettingError(f"side must be 'left' or 'right', got {side!r}")
        given = enumerate(as_list(ids, "ids"))
        ids = [checked_ids(self.model, row, f"sequence {index}") for index, row in given]
        if not ids:
            raise SettingError("nothing to pad: the list of sequences is empty")
        rows = [torch.as_tensor(row, dtype=torch.long) for row in ids]
        padded = functools.partial(pad_sequence, batch_first=True, padding_side=side)
        mask = padded([torch.ones_like(row) for row in rows])
        batch = {"input_ids": padded(rows, padding_value=self._pad_id), "attention_mask": mask}
        if self.traits.positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def batches(
        self, texts: Sequence[str] | Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS
    ) -> list[dict[str, Tensor]]:
        """Return texts as batches for the model, in their order, padded on the right.

        Args:
            texts: Texts, or the token ids of each.
            batch_tokens: Largest number of tokens in a batch, padding included; a longer text
                gets a batch of its own.

        Returns:
            Batches as ``pad`` makes them.

        Raises:
            SettingError: No text, one has no token, some are strings and others token
                ids, or ``batch_tokens`` is less than 1.
        """
        whole_number(batch_tokens, "batch_tokens", least=1)
        texts = as_list(texts, "texts")
        kinds = {isinstance(text, str) for text in texts}
        if len(kinds) != 1:
            problem = "strings and lists of token ids are mixed" if kinds else "no texts"
            raise SettingError(f"{problem}: batches takes a list of texts, or the ids of each")
        ids = self.encode(cast("Sequence[str]", texts)) if kinds == {True} else texts
        traits = self.traits.within(max(len(as_list(row, "text")) for row in ids))
        groups: list[list[Sequence[int]]] = []
        width = 0
        for index, row in enumerate(ids):
            if not len(as_list(row, f"text {index}")):
                raise SettingError(f"text {index} has no token: leave it out")
            mixed = width != len(row) and not traits.right
            width = max(width, len(row))
            full = groups and width * (len(groups[-1]) + 1) > batch_tokens
            if not groups or full or mixed or not traits.batch:
                groups.append([])
                width = len(row)
            groups[-1].append(cast("Sequence[int]", row))
        return [self.pad(group, side="right") for group in groups]

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 40, **kwargs: Any) -> Any:
        """Continue one prompt, or a batch of prompts padded on the left.

        Decoding is plain greedy, whatever the model's ``generation_config.json`` says: of its
        settings only the special tokens are used. With ``do_sample=True`` or a
        ``generation_config`` of your own, the model's settings are the defaults, as in
        ``model.generate``.

        Args:
            prompt: One prompt or a sequence of them.
            max_new_tokens: Largest number of tokens to add.
            **kwargs: For ``model.generate``.

        Returns:
            The new text alone, without special tokens: a string for a string, else a list. With
            ``num_return_sequences`` above 1 there is a list for each prompt; with
            ``return_dict_in_generate`` the output of ``model.generate`` itself.

        Raises:
            SettingError: An argument is decided by the prompt (``attention_mask``) or unknown to
                ``model.generate``, a prompt is empty or longer than the model's positions,
                ``max_new_tokens`` is less than 1, the model does not number positions as
                ``model.generate`` does (``traits.positions`` is false), or the prompts of a call
                that returns the output of ``model.generate`` need several batches (``traits``).

        Examples:
            >>> import lirefs
            >>> lm = lirefs.load("organism")
            >>> lm.generate(["Math: 31 + 27 =", "Logic: not true is"], max_new_tokens=2)
            ['58', 'false.']
        """
        prompts = [prompt] if isinstance(prompt, str) else as_list(prompt, "prompt", str)
        new_tokens = whole_number(max_new_tokens, "max_new_tokens", least=1)
        if own := sorted(_OWN & kwargs.keys()):
            raise SettingError(
                f"generate makes {own[0]} of the prompt itself; leave it out, or call "
                "lm.model.generate"
            )
        if not prompts:
            return []
        ids = with_prompts(self.model, self.tokenizer, self.encode(prompts))
        for index, row in enumerate(ids):
            check_length(self.model, len(row) + new_tokens - 1, f"prompt {index}")
        if self.traits.positions is False:
            raise SettingError(
                f"model.generate numbers positions from 0 and {self.name} does not, so its answers "
                "would not be those of a forward pass; use lirefs.tasks.greedy"
            )
        groups = [list(range(len(ids)))]  # in their order, which strengths by row rely on
        traits = self.traits.within(max(map(len, ids)) + new_tokens)
        if not traits.left:
            groups = traits.groups(list(map(len, ids)), sum(map(len, ids)), None)
        found: dict[int, Any] = {}
        for rows in groups:
            out = self._generate([ids[row] for row in rows], new_tokens, traits.cache, kwargs)
            if not isinstance(out, list):
                if len(groups) > 1:
                    raise SettingError(
                        f"{self.name} cannot pad prompts of different lengths, so there is not one "
                        "output of generate for all of them: give them one by one"
                    )
                return out
            found |= zip(rows, out, strict=True)
        return found[0] if isinstance(prompt, str) else [found[row] for row in range(len(ids))]

    def _generate(
        self, ids: list[Sequence[int]], new_tokens: int, cache: bool, kwargs: Mapping[str, Any]
    ) -> Any:
        """The new text of each prompt of one batch, or what `generate` returns if not tokens."""
        batch = self.pad(ids)
        batch.pop("position_ids", None)  # generate makes its own, step by step, from the mask
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": self._pad_id, **kwargs}
        if not cache and not virtual_tokens(self.model):  # which live in the cache
            settings.setdefault("use_cache", False)
        plain = not settings["do_sample"] and "generation_config" not in kwargs
        try:
            with evaluating(self.model), plain_greedy(self.model) if plain else nullcontext():
                out = self.model.generate(**batch, max_new_tokens=new_tokens, **settings)
        except ValueError as problem:
            if "model_kwargs" not in str(problem):
                raise
            raise SettingError(f"{self.name}: {first_line_of_error(problem)}") from problem
        if not isinstance(out, Tensor):
            return out
        start = batch["input_ids"].shape[1]
        new = [row[start:].tolist() for row in out]
        if not {"eos_token_id", "generation_config"} & kwargs.keys():
            new = [self.before_end(row) for row in new]
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        each = len(texts) // len(ids)
        return texts if each == 1 else [texts[k : k + each] for k in range(0, len(texts), each)]

    @property
    def end_tokens(self) -> frozenset[int]:
        """Ids of every token at which an answer ends: the tokenizer's and those of ``generate``."""
        of_model = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = of_model if isinstance(of_model, list | tuple) else [of_model]
        return frozenset(one for one in (self.tokenizer.eos_token_id, *ends) if one is not None)

    def before_end(self, ids: Sequence[int]) -> list[int]:
        """Token ids up to the first end token, which is not part of an answer."""
        return list(itertools.takewhile(lambda token: token not in self.end_tokens, ids))

    @property
    def _pad_id(self) -> int:
        """The id to pad with; any that the embedding has will do, because padding is masked."""
        embedding = maybe_call(self.model, "get_input_embeddings")
        rows = getattr(embedding, "num_embeddings", math.inf)
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None and token < rows)


def wrap(
    model: nn.Module,
    tokenizer: Any,
    *,
    layout: Mapping[str, str] | None = None,
    name: str | None = None,
) -> LanguageModel:
    """Make a ``LanguageModel`` of a model and a tokenizer that are already in memory.

    Args:
        model: A decoder; it is not changed.
        tokenizer: Its tokenizer.
        layout: Names of parts, for a model whose parts are not found automatically.
        name: Its name in reports; the model's ``name_or_path`` or its class by default.

    Raises:
        LayoutError: The parts of the model were not found.
        SettingError: ``layout`` has an unknown part.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> mine = lirefs.wrap(lm.model, lm.tokenizer, name="mine")
        >>> mine.layout.blocks, mine.n_layers
        ('model.layers', 4)
    """
    must_be(model, nn.Module, "model")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise SettingError(f"tokenizer must be a tokenizer, got {got(tokenizer)}")
    called = name or getattr(model, "name_or_path", "") or type(model).__name__
    lm = LanguageModel(model, tokenizer, find_layout(model, layout), str(called))
    if not any(weight.is_meta for weight in model.parameters()):
        _ = lm.traits  # now, so that hooks of the caller's see none of these passes
    return lm
