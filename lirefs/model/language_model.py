"""A language model with its tokenizer and its verified layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lirefs.errors import SettingError
from lirefs.model.fingerprint import fingerprint, tokenizer_hash
from lirefs.model.guest import accepts, evaluating, input_device
from lirefs.model.layout import Layout
from lirefs.model.layout_search import find_layout

BATCH_TOKENS = 1024
"""Default number of tokens in a batch."""


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
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every parameter, as 64 hex digits.

        Computed at the first use, and again after a parameter was replaced or changed in place.
        (A change through ``parameter.data`` is invisible to PyTorch, and so to this.)

        Raises:
            ProvenanceError: A weight is offloaded and cannot be read.
        """
        return fingerprint(self.model)

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary, the rules and the special tokens, as 64 hex digits."""
        return tokenizer_hash(self.tokenizer)

    def encode(self, prompts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each prompt, without padding.

        Args:
            prompts: Texts.
            add_special_tokens: Whether the tokenizer adds its own, such as one at the beginning.

        Raises:
            SettingError: ``prompts`` is one string, or holds something that is not a string.
        """
        if isinstance(prompts, str):
            raise SettingError("encode takes a list of prompts, got one string: use [prompt]")
        texts = list(prompts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise SettingError(f"prompt {index} is not a string but {type(text).__name__}")
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, padding=False)
        return [list(map(int, ids)) for ids in encoded["input_ids"]]

    def pad(self, ids: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Return a batch for the model.

        Args:
            ids: Token ids of each sequence; at least one token each.
            side: Where the padding goes, ``left`` or ``right``.

        Returns:
            ``input_ids`` and ``attention_mask``, and ``position_ids`` if the model takes them:
            integers, ``(batch, tokens)``, on the model's device. Positions count real tokens
            from 0; padding on the left has position 0.

        Raises:
            SettingError: An unknown side, no sequence, or an empty sequence.
        """
        if side not in ("left", "right"):
            raise SettingError(f"side must be 'left' or 'right', got {side!r}")
        if not ids:
            raise SettingError("nothing to pad: the list of sequences is empty")
        for index, row in enumerate(ids):
            if not len(row):
                raise SettingError(f"sequence {index} has no token: the prompt is empty")
        rows = [torch.as_tensor(list(row), dtype=torch.long) for row in ids]
        padded = functools.partial(pad_sequence, batch_first=True, padding_side=side)
        mask = padded([torch.ones_like(row) for row in rows])
        batch = {"input_ids": padded(rows, padding_value=self._pad_id), "attention_mask": mask}
        if accepts(self.model, "position_ids"):
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
        if batch_tokens < 1:
            raise SettingError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if isinstance(texts, str):
            raise SettingError("batches takes a list of texts, got one string: use [text]")
        kinds = {isinstance(text, str) for text in texts}
        if len(kinds) != 1:
            problem = "strings and lists of token ids are mixed" if kinds else "no texts"
            raise SettingError(f"{problem}: batches takes a list of texts, or the ids of each")
        ids = self.encode(cast("Sequence[str]", texts)) if kinds == {True} else texts
        groups: list[list[Sequence[int]]] = []
        width = 0
        for index, row in enumerate(ids):
            if not len(row):
                raise SettingError(f"text {index} has no token: leave it out")
            width = max(width, len(row))
            if not groups or width * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
                width = len(row)
            groups[-1].append(cast("Sequence[int]", row))
        return [self.pad(group, side="right") for group in groups]

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 40, **kwargs: Any) -> Any:
        """Continue one prompt, or a batch of prompts padded on the left.

        Args:
            prompt: One prompt or a sequence of them.
            max_new_tokens: Largest number of tokens to add.
            **kwargs: For ``model.generate``. Decoding is greedy unless ``do_sample`` is set.

        Returns:
            The new text alone, without special tokens: a string for a string, else a list.

        Raises:
            SettingError: A prompt is empty.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        batch = self.pad(self.encode(prompts))
        batch.pop("position_ids", None)  # generate makes its own, step by step, from the mask
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": self._pad_id, **kwargs}
        if not settings["do_sample"]:
            # A model's own sampling settings would only raise a warning that they are unused.
            settings = {"temperature": None, "top_p": None, "top_k": None, **settings}
        with evaluating(self.model):
            out = self.model.generate(**batch, max_new_tokens=max_new_tokens, **settings)
        start = batch["input_ids"].shape[1]
        texts = [self.tokenizer.decode(row[start:], skip_special_tokens=True) for row in out]
        return texts[0] if isinstance(prompt, str) else texts

    @property
    def _pad_id(self) -> int:
        """The id to pad with; any will do, because padding is masked."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)


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
    """
    called = name or getattr(model, "name_or_path", "") or type(model).__name__
    return LanguageModel(model, tokenizer, find_layout(model, layout), str(called))
