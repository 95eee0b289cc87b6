"""Activations of prompts at chosen layers, sites and positions, in one forward pass per batch."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from lirefs.directions.direction import places_text
from lirefs.errors import (
    CaptureError,
    MissingError,
    NonFiniteStateError,
    WriteError,
    as_list,
    must_be,
)
from lirefs.files import atomic_path, html_table
from lirefs.model.batching import check_length
from lirefs.model.guest import eagerly, evaluating
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.language_model import LanguageModel
from lirefs.model.layout import layer_indices, missing_layer
from lirefs.model.observe import hidden_input, hidden_of, in_this_thread

_log = logging.getLogger(__name__)

BATCH_TOKENS = 2048
_ROWS = 1024
"""Prompts tokenized or checked at a time, so that memory does not grow with them."""


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

    def __repr__(self) -> str:
        shape = tuple(self.values.shape)
        return f"Activations({shape}; {places_text(self.places)}; positions {self.positions})"

    def _repr_html_(self) -> str:
        norms = self.values.norm(dim=-1).mean(dim=(0, 2)).tolist()
        rows = [
            {"layer": layer, "site": site, "mean norm": norm}
            for (layer, site), norm in zip(self.places, norms, strict=True)
        ]
        return html_table(repr(self), rows)

    def __getitem__(self, place: tuple[int, str] | int) -> Tensor:
        """States at (layer, site): (n, width) for one position, else (n, positions, width).

        A layer alone stands for its only site. MissingError (also a KeyError): none, or several.
        """
        found = [i for i, one in enumerate(self.places) if place in (one, one[0])]
        if not found or (isinstance(place, int) and len(found) > 1):
            problem = "several states" if found else "no states"
            raise MissingError(f"{problem} at {place!r}; there are {places_text(self.places)}")
        values = self.values[:, found[0]]
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
    cache: str | Path | None = None,
    progress: bool = True,
) -> Activations:
    """Read activations from a model, as float32 on the CPU, in the order of the prompts.

    One forward pass per batch serves all layers. Hooks copy only the wanted positions, and the
    pass ends after the last block that is needed, so the unembedding never runs.

    Args:
        lm: The model.
        prompts: Texts, or lists of token ids.
        layers: Layers to read; None for all.
        sites: Sites to read at each of these layers.
        positions: Token positions in the unpadded prompt, negative ones from its end. The default
            is the last prompt token (Hong et al. 2025, section 3).
        batch_tokens: Tokens per batch, padding included.
        padding_side: `left` or `right`; it does not change the values. What the model does not
            honour (`lm.traits`) is not used.
        cache: Folder that keeps the values, by `lm.identity`, tokens and settings: states under a
            steering, an edit or another adapter are others. A warning says if it cannot be written.
        progress: Show a progress bar.

    Raises:
        CaptureError: No prompts, a prompt is too short for a position, or a layer
            does not exist.
        NonFiniteStateError: If a value is NaN or infinite; the message names the first prompt,
            layer, site and position.
        LayoutError: If the architecture lacks a site.
        ProvenanceError: With a cache, if the model has no identity: a weight is offloaded, or a
            hook of your own may change it.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> prompts = ["Math: 31 + 27 =", "Logic: not true is", "Math: 5 * 5 ="]
        >>> states = lirefs.capture(lm, prompts, layers=[1, 2], progress=False)
        >>> states.values.shape  # prompts, layers, positions, width
        torch.Size([3, 2, 1, 256])
    """
    offsets = tuple(
        layer_indices([positions] if isinstance(positions, int) else positions, "positions")
    )
    request = _request(lm, prompts, layers, sites, offsets, padding_side)
    shape = (len(request.ids), len(request.places), len(offsets), lm.width)
    file = None if cache is None else Path(cache) / f"{request.key}.safetensors"
    if file is not None and (stored := _stored(file, shape)) is not None:
        return Activations(stored, request.places, offsets)

    values = torch.empty(shape)
    for rows, states in request.batches(batch_tokens, padding_side, progress):
        values[rows] = states
    check_finite_states(values, request.places, offsets, range(len(values)), request.origin)
    if file is not None:
        try:
            with atomic_path(file) as temporary:
                save_file({"values": values}, temporary)
        except WriteError as problem:
            _log.warning("%s; continuing, but this will be captured again next time", problem)
    return Activations(values, request.places, offsets)


def stream_states(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("resid_pre",),
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Read the last prompt token as `capture` does, batch by batch, for sets too large for memory.

    Yields prompt indices, and float32 states on the CPU, shape (rows, places, width).
    """
    request = _request(lm, prompts, layers, sites, (-1,))
    for rows, states in request.batches(batch_tokens, "left", progress):
        check_finite_states(states, request.places, (-1,), rows, request.origin)
        yield rows, states[:, :, 0]


def check_finite_states(
    values: Tensor,
    places: tuple[tuple[int, str], ...],
    positions: tuple[int, ...],
    prompts: Sequence[int],
    origin: Callable[[int], str] = lambda prompt: "",
) -> None:
    """Raise NonFiniteStateError, saying where, if a state is not finite.

    Values, places and positions are as in `Activations`; `prompts` are the indices of the prompts,
    and `origin` tells, for the message, where in a prompt the problem begins.
    """
    parts = torch.split(values, _ROWS)
    bad = torch.cat([~torch.isfinite(part).all(dim=-1) for part in parts])
    if bool(bad.any()):
        row, place, position = bad.nonzero()[0].tolist()
        layer, site = places[place]
        kind = "NaN" if bool(values[row, place, position].isnan().any()) else "inf"
        where = f"layer {layer}, {site}, position {positions[position]}"
        raise NonFiniteStateError(prompts[row], f"{where}: {kind}{origin(prompts[row])}")


class _Enough(Exception):
    """Ends a forward pass whose remaining blocks are not needed."""


@dataclass(frozen=True)
class _Request:
    """Which states to read: token ids of each prompt, places, and positions in each prompt."""

    lm: LanguageModel
    ids: Sequence[Sequence[int]]
    places: tuple[tuple[int, str], ...]
    offsets: tuple[int, ...]

    @property
    def key(self) -> str:
        """Name of the cached states."""
        settings = [self.lm.identity, str(self.lm.device), self.places, self.offsets]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for row in self.ids:
            digest.update(f"{list(row)}".encode())
        return digest.hexdigest()[:32]

    def batches(
        self, batch_tokens: int, side: Literal["left", "right"], progress: bool
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Prompt indices of each batch, and its states, (rows, places, positions, width)."""
        lengths = [len(row) for row in self.ids]
        traits = self.lm.traits.within(max(lengths))
        side = traits.side(side)
        with tqdm(
            total=sum(lengths), unit="tok", desc="activations", disable=not progress or None
        ) as bar:
            for rows in traits.groups(lengths, batch_tokens, side):
                with evaluating(self.lm.model):  # not around the yield, which runs others' code
                    states = self.read([self.ids[row] for row in rows], side)
                yield rows, states
                bar.update(sum(lengths[row] for row in rows))

    def read(self, ids: Sequence[Sequence[int]], side: Literal["left", "right"]) -> Tensor:
        """States of one batch, shape (rows, places, positions, width)."""
        inputs = self.lm.pad(ids, side=side)
        width = inputs["input_ids"].shape[1]
        spans = [
            range(width - len(row), width) if side == "left" else range(len(row)) for row in ids
        ]
        columns = torch.tensor([[span[offset] for offset in self.offsets] for span in spans])
        rows = torch.arange(len(ids))[:, None]
        found: dict[int, Tensor] = {}

        def keep(
            place: int, part: str, module: nn.Module, args: Any, kwargs_or_output: Any
        ) -> None:
            if part == "input":
                h = hidden_input(args, kwargs_or_output)
            else:
                h = hidden_of(kwargs_or_output, len(ids))  # some modules flatten the batch
            found[place] = h[rows.to(h.device), columns.to(h.device)]
            if len(found) == len(self.places):
                raise _Enough

        with undone() as steps:
            with interrupts_held():
                for place, (layer, site) in enumerate(self.places):
                    module, part = self.lm.layout.module(self.lm.model, site, layer)
                    hook = in_this_thread(partial(keep, place, part))
                    if part == "input":
                        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    else:
                        handle = module.register_forward_hook(hook)
                    steps.append(handle.remove)
            with eagerly(), suppress(_Enough):
                self.lm.model(**inputs, use_cache=False)
                idle = [place for index, place in enumerate(self.places) if index not in found]
                raise CaptureError(
                    f"layer {idle[0][0]}, {idle[0][1]} did not run in a forward pass of the model: "
                    "was a module replaced, or config.num_hidden_layers changed? wrap it again"
                )
        # One transfer per place and batch, from whichever device the states are on.
        return torch.stack([found[place].float().cpu() for place in range(len(self.places))], dim=1)

    def origin(self, prompt: int) -> str:
        """Where the states of a prompt stop being finite, found by a forward pass of it alone."""
        ids, layers = self.ids[prompt], range(self.lm.n_layers)
        places = ((0, "resid_pre"), *((layer, "resid_post") for layer in layers))
        everywhere = replace(self, places=places, offsets=tuple(range(len(ids))))
        with evaluating(self.lm.model):
            states = everywhere.read([ids], "left")[0]
        bad = (~torch.isfinite(states).all(dim=-1)).nonzero()
        if not len(bad):
            return ""
        place, token = bad[0].tolist()
        where = f"layer {places[place][0]}" if place else "the embedding"
        return f", which begins in {where} at token {token} of {len(ids)}"


def _request(
    lm: LanguageModel,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    layers: Sequence[int] | None,
    sites: Sequence[str],
    offsets: tuple[int, ...],
    padding_side: str = "left",
) -> _Request:
    """The request, checked: every layer exists, every prompt is long enough, and not too long."""
    must_be(lm, LanguageModel, "lm", CaptureError)
    if not isinstance(sites, list | tuple) or not all(isinstance(site, str) for site in sites):
        raise CaptureError(f"sites must be a list such as ['resid_pre'], got {sites!r:.60}")
    if padding_side not in ("left", "right"):
        raise CaptureError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    chosen = list(range(lm.n_layers)) if layers is None else layer_indices(layers)
    places = tuple((layer, site) for layer in chosen for site in sites)
    prompts = as_list(prompts, "prompts", error=CaptureError)
    if not prompts:
        raise CaptureError("no prompts to capture activations of")
    if not places or not offsets:
        raise CaptureError("nothing to capture: layers, sites or positions are empty")
    if problem := missing_layer(chosen, lm.n_layers):
        raise CaptureError(problem)
    if all(isinstance(prompt, str) for prompt in prompts):
        # Arrays take 4 bytes a token; lists would take up to tenfold.
        parts = (prompts[start : start + _ROWS] for start in range(0, len(prompts), _ROWS))
        ids = [array("i", row) for part in parts for row in lm.encode([str(one) for one in part])]
    else:
        rows = (as_list(one, f"prompt {i}", error=CaptureError) for i, one in enumerate(prompts))
        ids = [array("i", layer_indices(row, f"prompt {i}")) for i, row in enumerate(rows)]
    for index, row in enumerate(ids):
        n = len(row)
        check_length(lm.model, n, f"prompt {index}", CaptureError)
        for offset in offsets:
            if not -n <= offset < n:
                raise CaptureError(f"prompt {index} has {n} token(s), none at position {offset}")
    return _Request(lm, ids, places, offsets)


def _stored(file: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The cached states; None if they are absent, unreadable or damaged, to be captured again."""
    try:
        values = load_file(file)["values"]
    except (OSError, SafetensorError, KeyError):
        return None
    whole = values.dtype == torch.float32 and values.shape == shape
    return values if whole and bool(values.isfinite().all()) else None
