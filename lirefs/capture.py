"""Activations of prompts at chosen layers, sites and positions, in one forward per batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lirefs.batching import batches_by_tokens
from lirefs.errors import CaptureError
from lirefs.files import atomic_path
from lirefs.guest import evaluating, hidden_input, hidden_of
from lirefs.layout import indices
from lirefs.models import LanguageModel

BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Activations:
    """Hidden states of n prompts.

    Attributes:
        values: float32 on the CPU, shape (n prompts, n places, n positions, width).
        places: The (layer, site) pairs, in the order of the second axis.
        positions: The token positions, in the order of the third axis.
    """

    values: Tensor
    places: tuple[tuple[int, str], ...]
    positions: tuple[int, ...]

    def __getitem__(self, place: tuple[int, str] | int) -> Tensor:
        """States at (layer, site): (n, width) for one position, else (n, positions, width)."""
        if isinstance(place, int):
            sites = [site for layer, site in self.places if layer == place]
            if len(sites) != 1:
                raise KeyError(place)
            place = (place, sites[0])
        try:
            values = self.values[:, self.places.index(place)]
        except ValueError:
            raise KeyError(place) from None
        return values[:, 0] if len(self.positions) == 1 else values


def capture(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("resid_pre",),
    positions: int | Sequence[int] = -1,
    batch_tokens: int = BATCH_TOKENS,
    padding_side: Literal["left", "right"] = "left",
    cache: Path | None = None,
    progress: bool = True,
) -> Activations:
    """Read activations from a model.

    One forward per batch serves all layers: hooks copy the wanted positions only, and the forward
    ends after the last block that is needed, so the unembedding never runs.

    Args:
        lm: The model.
        prompts: Texts, or lists of token ids.
        layers: Layers to read; None for all.
        sites: Sites to read at each of these layers.
        positions: Token positions in the unpadded prompt, negative ones from its end. The default
            is the last prompt token (Hong et al. 2025, section 3).
        batch_tokens: Tokens per batch, padding included.
        padding_side: `left` or `right`; it does not change the values.
        cache: Folder in which the values are kept under a key of model, tokens and settings.
            Leave it out while a hook of your own changes the model.
        progress: Show a progress bar.

    Raises:
        CaptureError: If there are no prompts, a prompt is shorter than a position asks for, a
            layer does not exist, or a value is not finite (the message says where).
        LayoutError: If the architecture lacks a site.
    """
    chosen = list(range(lm.n_layers)) if layers is None else indices(layers)
    offsets = (positions,) if isinstance(positions, int) else tuple(map(int, positions))
    places = tuple((layer, site) for layer in chosen for site in sites)
    ids = _token_ids(lm, prompts)
    _check(lm, ids, chosen, offsets, places)

    shape = (len(ids), len(places), len(offsets), lm.width)
    file = None if cache is None else cache / f"{_key(lm, ids, places, offsets)}.safetensors"
    if file is not None and (stored := _stored(file, shape)) is not None:
        return Activations(stored, places, offsets)

    values = torch.empty(shape)
    for rows, states in _batches(lm, ids, places, offsets, batch_tokens, padding_side, progress):
        values[rows] = states
    check_finite(values, places, range(len(ids)))
    if file is not None:
        with atomic_path(file) as temporary:
            save_file({"values": values}, temporary)
    return Activations(values, places, offsets)


def stream(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("resid_pre",),
    position: int = -1,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read activations as `capture` does, one batch at a time, for sets too large for memory.

    Args:
        lm: The model.
        prompts: Texts, or lists of token ids.
        layers: Layers to read; None for all.
        sites: Sites to read at each of these layers.
        position: Token position in the unpadded prompt, from its end when negative.
        batch_tokens: Tokens per batch, padding included.
        progress: Show a progress bar.

    Yields:
        Indices of the prompts of a batch, and their states, float32 on the CPU, (rows, places,
        width).

    Raises:
        CaptureError: As `capture`.
        LayoutError: If the architecture lacks a site.
    """
    chosen = list(range(lm.n_layers)) if layers is None else indices(layers)
    places = tuple((layer, site) for layer in chosen for site in sites)
    ids = _token_ids(lm, prompts)
    _check(lm, ids, chosen, (position,), places)
    for rows, states in _batches(lm, ids, places, (position,), batch_tokens, "left", progress):
        check_finite(states, places, rows)
        yield rows, states[:, :, 0]


def _batches(
    lm: LanguageModel,
    ids: list[list[int]],
    places: tuple[tuple[int, str], ...],
    offsets: tuple[int, ...],
    batch_tokens: int,
    side: Literal["left", "right"],
    progress: bool,
) -> Iterator[tuple[list[int], Tensor]]:
    lengths = [len(row) for row in ids]
    bar = tqdm(total=sum(lengths), unit="tok", desc="activations", disable=not progress)
    with bar:
        for rows in batches_by_tokens(lengths, batch_tokens):
            with evaluating(lm.model):  # not around the yield: the caller's code is not ours
                states = _read(lm, [ids[row] for row in rows], places, offsets, side)
            yield rows, states
            bar.update(sum(lengths[row] for row in rows))


class _Enough(Exception):
    """Ends a forward whose remaining blocks nobody needs."""


def _read(
    lm: LanguageModel,
    ids: list[list[int]],
    places: tuple[tuple[int, str], ...],
    offsets: tuple[int, ...],
    side: Literal["left", "right"],
) -> Tensor:
    inputs = lm.pad(ids, side=side)
    width = inputs["input_ids"].shape[1]
    columns = torch.tensor(
        [
            [
                (offset if offset >= 0 else len(row) + offset)
                + (width - len(row) if side == "left" else 0)
                for offset in offsets
            ]
            for row in ids
        ]
    )
    rows = torch.arange(len(ids))[:, None]
    found: dict[int, Tensor] = {}

    def keep(place: int, h: Tensor) -> None:
        found[place] = h[rows.to(h.device), columns.to(h.device)]
        if len(found) == len(places):
            raise _Enough

    with ExitStack() as stack:
        for place, (layer, site) in enumerate(places):
            module, part = lm.layout.module(lm.model, site, layer)
            hook = _reader(keep, place, part, batch=len(ids))
            handle = (
                module.register_forward_pre_hook(hook, with_kwargs=True)
                if part == "input"
                else module.register_forward_hook(hook)
            )
            stack.callback(handle.remove)
        with suppress(_Enough):
            lm.model(**inputs, use_cache=False)
    # One transfer per batch, to whichever device the states were on.
    return torch.stack([found[place].float().cpu() for place in range(len(places))], dim=1)


def _reader(keep: Callable[[int, Tensor], None], place: int, part: str, batch: int) -> Any:
    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(place, hidden_input(args, kwargs))

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(place, hidden_of(output, batch))  # some modules flatten the batch

    return on_input if part == "input" else on_output


def _token_ids(
    lm: LanguageModel, prompts: Sequence[str] | Sequence[Sequence[int]]
) -> list[list[int]]:
    if not len(prompts):
        raise CaptureError("no prompts to capture activations of")
    if all(isinstance(prompt, str) for prompt in prompts):
        return lm.encode([str(prompt) for prompt in prompts])
    return [[int(token) for token in prompt] for prompt in prompts]


def _check(
    lm: LanguageModel,
    ids: list[list[int]],
    layers: list[int],
    offsets: tuple[int, ...],
    places: tuple[tuple[int, str], ...],
) -> None:
    if not places or not offsets:
        raise CaptureError("nothing to capture: layers, sites or positions are empty")
    for layer in layers:
        if not 0 <= layer < lm.n_layers:
            raise CaptureError(
                f"layer {layer} does not exist; the model has 0 to {lm.n_layers - 1}"
            )
    for index, row in enumerate(ids):
        for offset in offsets:
            if not -len(row) <= offset < len(row):
                raise CaptureError(
                    f"prompt {index} has {len(row)} token(s), none at position {offset}"
                )


def check_finite(
    values: Tensor, places: tuple[tuple[int, str], ...], prompts: Sequence[int]
) -> None:
    """Look for states that are not finite.

    Args:
        values: Shape (prompts, places, ..., width).
        places: The (layer, site) pairs of the second axis.
        prompts: What the prompts of the first axis are called in the message.

    Raises:
        CaptureError: One is not; the message says where.
    """
    bad = ~torch.isfinite(values).flatten(2).all(dim=-1)
    if bool(bad.any()):
        prompt, place = bad.nonzero()[0].tolist()
        layer, site = places[place]
        raise CaptureError(
            f"activations are not finite: first at prompt {prompts[prompt]}, layer {layer}, {site} "
            f"({int(bad.sum())} places in all); try a wider dtype"
        )


def _key(
    lm: LanguageModel,
    ids: list[list[int]],
    places: tuple[tuple[int, str], ...],
    offsets: tuple[int, ...],
) -> str:
    made_of = [lm.fingerprint, str(lm.device), ids, places, offsets]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def _stored(file: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        values = load_file(file)["values"]
    except (OSError, SafetensorError, KeyError):
        return None  # absent or damaged: it is made again
    whole = values.dtype == torch.float32 and values.shape == shape
    return values if whole and bool(values.isfinite().all()) else None
