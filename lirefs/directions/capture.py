"""Activations of prompts at chosen layers, sites and positions, in one forward per batch."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
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

from lirefs.errors import CaptureError, NonFiniteStateError, WriteError
from lirefs.files import atomic_path
from lirefs.model.batching import batches_by_tokens
from lirefs.model.guest import evaluating
from lirefs.model.hidden_states import hidden_input, hidden_of
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import indices
from lirefs.model.observe import in_this_thread

_log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
_ROWS = 1024
"""Prompts tokenized or checked at a time, so that what this takes does not grow with them."""


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
            Leave it out while a hook of your own changes the model. Where it cannot be written,
            a warning says so.
        progress: Show a progress bar.

    Returns:
        float32 states on the CPU, in the order of the prompts.

    Raises:
        CaptureError: If there are no prompts, a prompt is shorter than a position asks for, or a
            layer does not exist.
        NonFiniteStateError: If a value is NaN or infinite; the message says at which prompt, layer,
            site and position first.
        LayoutError: If the architecture lacks a site.
    """
    offsets = (positions,) if isinstance(positions, int) else tuple(map(int, positions))
    ids, places = _asked(lm, prompts, layers, sites, offsets)
    shape = (len(ids), len(places), len(offsets), lm.width)
    file = None if cache is None else cache / f"{_key(lm, ids, places, offsets)}.safetensors"
    if file is not None and (stored := _stored(file, shape)) is not None:
        return Activations(stored, places, offsets)

    values = torch.empty(shape)
    for rows, states in _batches(lm, ids, places, offsets, batch_tokens, padding_side, progress):
        values[rows] = states
    check_finite(values, places, offsets, range(len(ids)), lambda prompt: _origin(lm, ids[prompt]))
    if file is not None:
        try:
            with atomic_path(file) as temporary:
                save_file({"values": values}, temporary)
        except WriteError as problem:
            _log.warning("%s; going on, but this is captured again next time", problem)
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
    ids, places = _asked(lm, prompts, layers, sites, (position,))
    for rows, states in _batches(lm, ids, places, (position,), batch_tokens, "left", progress):
        check_finite(states, places, (position,), rows, lambda prompt: _origin(lm, ids[prompt]))
        yield rows, states[:, :, 0]


def _batches(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
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
    ids: Sequence[Sequence[int]],
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
            hook = in_this_thread(_reader(keep, place, part, batch=len(ids)))
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
) -> list[array[int]]:
    """Token ids of each prompt, at 4 bytes a token; lists would take up to tenfold."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        return [array("i", map(int, prompt)) for prompt in prompts]
    starts = range(0, len(prompts), _ROWS)
    return [
        array("i", row)
        for start in starts
        for row in lm.encode([str(prompt) for prompt in prompts[start : start + _ROWS]])
    ]


def _asked(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    layers: Sequence[int] | None,
    sites: Sequence[str],
    offsets: tuple[int, ...],
) -> tuple[list[array[int]], tuple[tuple[int, str], ...]]:
    """Token ids of each prompt, and the places to read, once it is known that they are there."""
    chosen = list(range(lm.n_layers)) if layers is None else indices(layers)
    places = tuple((layer, site) for layer in chosen for site in sites)
    if not len(prompts):
        raise CaptureError("no prompts to capture activations of")
    if not places or not offsets:
        raise CaptureError("nothing to capture: layers, sites or positions are empty")
    for layer in chosen:
        if not 0 <= layer < lm.n_layers:
            raise CaptureError(
                f"layer {layer} does not exist; the model has 0 to {lm.n_layers - 1}"
            )
    ids = _token_ids(lm, prompts)
    for index, row in enumerate(ids):
        for offset in offsets:
            if not -len(row) <= offset < len(row):
                raise CaptureError(
                    f"prompt {index} has {len(row)} token(s), none at position {offset}"
                )
    return ids, places


def check_finite(
    values: Tensor,
    places: tuple[tuple[int, str], ...],
    positions: tuple[int, ...],
    prompts: Sequence[int],
    origin: Callable[[int], str] = lambda prompt: "",
) -> None:
    """Look for states that are not finite.

    Args:
        values: Shape (prompts, places, positions, width).
        places: The (layer, site) pairs of the second axis.
        positions: The token positions of the third axis.
        prompts: Indices of the prompts of the first axis.
        origin: Says where in a prompt it begins, for the message; asked only if it is needed.

    Raises:
        NonFiniteStateError: One is not; the message says where.
    """
    parts = torch.split(values, _ROWS)
    bad = torch.cat([~torch.isfinite(part).all(dim=-1) for part in parts])
    if bool(bad.any()):
        prompt, place, position = bad.nonzero()[0].tolist()
        layer, site = places[place]
        state = values[prompt, place, position]
        raise NonFiniteStateError(
            prompts[prompt],
            f"layer {layer}, {site}, position {positions[position]}: "
            f"{'NaN' if bool(state.isnan().any()) else 'inf'}{origin(prompts[prompt])}",
        )


def _origin(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Where the states of a prompt begin not to be finite, found by another forward of it alone."""
    places = ((0, "resid_pre"), *((layer, "resid_post") for layer in range(lm.n_layers)))
    with evaluating(lm.model):
        states = _read(lm, [ids], places, tuple(range(len(ids))), "left")[0]
    bad = (~torch.isfinite(states).all(dim=-1)).nonzero()
    if not len(bad):
        return ""
    place, token = bad[0].tolist()
    where = f"layer {places[place][0]}" if place else "the embedding"
    return f", which begins in {where} at token {token} of {len(ids)}"


def _key(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    places: tuple[tuple[int, str], ...],
    offsets: tuple[int, ...],
) -> str:
    made_of = [lm.fingerprint, str(lm.device), places, offsets]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for row in ids:
        digest.update(f"{list(row)}".encode())
    return digest.hexdigest()[:32]


def _stored(file: Path, shape: tuple[int, ...]) -> Tensor | None:
    try:
        values = load_file(file)["values"]
    except (OSError, SafetensorError, KeyError):
        return None  # absent, unreadable or damaged: it is made again
    whole = values.dtype == torch.float32 and values.shape == shape
    return values if whole and bool(values.isfinite().all()) else None
