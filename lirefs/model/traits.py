"""What padding, positions and caches do to a row of a model, believed only after forward passes.

Models are free to ignore a mask, to take positions from columns, or to lose a recurrent state: then
a row in a batch, or after a cache, is not the row that it is alone. So a few tokens are run alone
and in each of these ways, and what differs is not used. Windows are read off the configuration,
since a few tokens do not reach them.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from lirefs.errors import WriteError
from lirefs.files import atomic_write_text, cache_dir, html_table, parse_json
from lirefs.model.batching import batches_by_tokens, equal_batches, rope_limit
from lirefs.model.code import runs_known_code
from lirefs.model.guest import accepts, evaluating, text_config
from lirefs.model.interrupts import undone
from lirefs.model.observe import sample_ids

PROBING: ContextVar[bool] = ContextVar("probing", default=False)
"""Whether this thread is asking a model for its traits: steering then stands back."""

_TOKENS = 6
_MORE = 4
"""Columns of padding beyond those that rows of different length need."""
_PROBES = 1
"""Number of the questions below; another one makes what earlier versions kept void."""
_CACHES = ("past_key_values", "cache_params")
# Their cache drops what is outside the window, which their forward pass attends to.
_WINDOW_IN_CACHE_ALONE = {"moshi"}
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Traits]] = weakref.WeakKeyDictionary()
_BY_CONFIG: dict[str, Traits] = {}


@dataclass(frozen=True)
class Traits:
    """Which ways of running a model leave each row as it is alone.

    Attributes:
        causal: Tokens do not see later ones; otherwise their log-likelihood means nothing.
        batch: Several rows of equal length in one batch.
        right: Rows padded on the right.
        left: Rows padded on the left.
        positions: Explicit ``position_ids``; None if the model does not take them.
        cache: One token at a time after a cache, whose rows can be picked.
        continued: Several tokens after a cache: prompts in chunks, options after a prompt.
        shared: The cache of a common beginning, followed by rows padded on the left.
        window: Tokens that the narrowest attention window or chunk of the configuration holds;
            None without one. Longer rows do not use ``shared``.
        rope: Tokens beyond which rotary positions are scaled otherwise (``longrope``); None if
            they are not. Longer rows use neither padding nor caches.
    """

    causal: bool = True
    batch: bool = True
    right: bool = True
    left: bool = True
    positions: bool | None = None
    cache: bool = False
    continued: bool = False
    shared: bool = False
    window: int | None = None
    rope: int | None = None

    def __str__(self) -> str:
        names = {
            "batch": "rows of equal length in a batch",
            "right": "padding on the right",
            "left": "padding on the left",
            "positions": "explicit positions",
            "cache": "a cache",
            "continued": "several tokens after a cache",
            "shared": "a shared beginning",
        }
        said = {True: "as alone", False: "differs, so it is not used", None: "not taken"}
        lines = ["causal" if self.causal else "not causal: tokens see later ones"]
        lines += [f"{what}: {said[getattr(self, name)]}" for name, what in names.items()]
        lines.append(f"attention window: {self.window or 'none'}")
        return "\n".join([*lines, f"rotary positions change at: {self.rope or 'no length'}"])

    def within(self, tokens: int) -> Traits:
        """The traits for batches whose longest row has so many tokens."""
        if self.rope is not None and tokens > self.rope:
            ways = dict.fromkeys(("right", "left", "cache", "continued", "shared"), False)
            return replace(self, **ways)
        if self.window is not None and tokens > self.window:
            return replace(self, shared=False)
        return self

    def _repr_html_(self) -> str:
        lines = (line.partition(": ") for line in str(self).split("\n"))
        return html_table("Traits", [{"way": way, "rows": said} for way, _, said in lines])

    def side(self, preferred: Literal["left", "right"]) -> Literal["left", "right"]:
        """The side to pad on: the preferred one, unless only the other leaves rows as they are."""
        other: Literal["left", "right"] = "right" if preferred == "left" else "left"
        return other if getattr(self, other) and not getattr(self, preferred) else preferred

    def groups(
        self, lengths: Sequence[int], budget: int, side: str | None, enough: int | None = None
    ) -> list[list[int]]:
        """Item indices by batch, as `batches_by_tokens`; without padding where padding differs.

        `side` is where the batches get their padding, None for batches without any.
        """
        if side is not None and getattr(self, side):
            return batches_by_tokens(lengths, budget, enough)
        return equal_batches(lengths, budget if self.batch else 1)


def traits_of(model: nn.Module) -> Traits:
    """The traits of a model; found by about six forward passes on a few tokens, and kept.

    They are kept for each configuration, in the folder `traits` of the cache too. The model's
    hooks, training flags and random state are left as they were, and steering does not take part.
    """
    settings = _switches(model)
    known = _KNOWN.get(model)
    if known is not None and known[0] == settings:
        return known[1]
    # What hooks or functions of others do is in no configuration.
    kept = hasattr(model, "config") and runs_known_code(model)
    key = _key(model)
    found = (_BY_CONFIG.get(key) or _stored(key)) if kept else None
    if found is None:
        found = _probe(model)
        with suppress(WriteError):
            if kept:
                atomic_write_text(_file(key), json.dumps(asdict(found)))
    if kept:
        _BY_CONFIG[key] = found
    _KNOWN[model] = (settings, found)
    return found


def cache_name(model: nn.Module) -> str | None:
    """The name under which a model takes and returns its cache; None if it has none to hand on."""
    return next((name for name in _CACHES if accepts(model, name)), None)


def quantizes_tokens_together(model: nn.Module) -> bool:
    """Whether bitsandbytes keeps a column of states in floats if any token is large there.

    Dettmers et al. 2022, arXiv 2208.07339, section 3.2: what one token becomes then depends on all
    others of its batch, by as much as quantization changes it.
    """
    states = (getattr(module, "state", None) for module in model.modules())
    return any((getattr(state, "threshold", None) or 0) > 0 for state in states)


def _switches(model: nn.Module) -> list[Any]:
    """The plain settings of a model's configuration, which may be changed after loading."""
    configs = (getattr(model, "config", None), text_config(model))
    values = [value for one in configs if one is not None for value in vars(one).values()]
    return [value for value in values if isinstance(value, bool | int | float | str)]


def _key(model: nn.Module) -> str:
    """SHA-256 of all that decides the traits."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else id(model)
    kinds = sorted({f"{type(one).__module__}.{type(one).__qualname__}" for one in model.modules()})
    versions = (_PROBES, torch.__version__, transformers.__version__)
    weights = sorted({f"{one.dtype} {one.device.type}" for one in model.parameters()})
    content = [settings, _switches(model), kinds, versions, weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _file(key: str) -> Any:
    return cache_dir() / "traits" / f"{key[:32]}.json"


def _stored(key: str) -> Traits | None:
    """What an earlier process found; None if it is absent or damaged."""
    names = {one.name for one in fields(Traits)}
    try:
        values = parse_json(_file(key).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.keys() != names:
        return None
    lengths = {name: values.pop(name) for name in ("window", "rope")}
    switches = all(isinstance(one, bool) for name, one in values.items() if name != "positions")
    fits = switches and values["positions"] in (None, True, False)
    fits &= all(one is None or (type(one) is int and one > 0) for one in lengths.values())
    return Traits(**values, **lengths) if fits else None


def window_of(model: nn.Module) -> int | None:
    """Tokens that the narrowest window or chunk of attention holds, by the configuration."""
    config = text_config(model)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    widths = [
        value
        for name, value in settings.items()
        if ("window" in name or "attention_chunk" in name)
        and name != "max_window_layers"
        and type(value) is int
        and value > 0
    ]
    return min(widths, default=None)


class _Probe:
    """Runs six tokens of a model alone and in company, and compares the logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # The last one pads: a token of its own, since the embedding of a padding token may be 0,
        # which hides that the model heeds it.
        *row, self.padding = sample_ids(model, 1, _TOKENS + 1)[0]
        self.row = torch.stack(row)
        self.positions: bool | None = True if accepts(model, "position_ids") else None
        self.cache = cache_name(model)
        self.alone = self.run([self.row])[0]

    def run(
        self,
        rows: Sequence[Tensor],
        side: str | None = None,
        cache: Any = None,
        mask: Tensor | None = None,
        keep: bool = False,
    ) -> Any:
        """Logits, (rows, tokens, vocabulary); with `keep` also the cache and the mask.

        Args:
            rows: Token ids of each row.
            side: Where to pad; None for rows of equal length, which then get no mask.
            cache: What an earlier run returned, with its mask.
            mask: The mask of the tokens in the cache.
            keep: Whether the model is to make a cache.
        """
        width = max(map(len, rows)) + (_MORE if side is not None else 0)
        padded, real = [], []
        for row in rows:
            pad = self.padding.expand(width - len(row))
            ones, zeros = torch.ones_like(row), torch.zeros_like(pad)
            left = side == "left"
            padded.append(torch.cat([pad, row] if left else [row, pad]))
            real.append(torch.cat([zeros, ones] if left else [ones, zeros]))
        given: dict[str, Any] = {"input_ids": torch.stack(padded)}
        whole = torch.stack(real)
        if mask is not None:
            whole = torch.cat([mask, whole], dim=1)
        if (side is not None or mask is not None) and (mask is None or self.cache == _CACHES[0]):
            given["attention_mask"] = whole
        if self.positions and (side is not None or mask is not None):
            given["position_ids"] = (whole.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        if accepts(self.model, "use_cache"):
            given["use_cache"] = keep
        if cache is not None and self.cache is not None:
            given[self.cache] = cache
        out = self.model(**given)
        logits = getattr(out, "logits", None)
        logits = (out[0] if logits is None else logits).detach()
        return (logits, self.cache and getattr(out, self.cache, None), whole) if keep else logits

    def same(self, logits: Tensor, spans: Sequence[tuple[int, int]], side: str = "right") -> bool:
        """Whether the rows hold the logits that the tokens `spans` of the row have alone."""
        for found, (start, end) in zip(logits, spans, strict=True):
            size = end - start
            part = found[-size:] if side == "left" else found[:size]
            if not _close(part, self.alone[start:end]):
                return False
        return True


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal up to rounding, at every position: (tokens, vocabulary) both."""
    eps = torch.finfo(expected.dtype).eps
    found, expected = found.double().nan_to_num(), expected.double().nan_to_num()
    scale = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    tolerance = max(2e-4, 8 * eps)
    return bool(((found - expected).norm(dim=-1) <= tolerance * scale).all())


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with undone() as steps, torch.random.fork_rng(devices=cuda), evaluating(model):
        steps.append(partial(PROBING.set, PROBING.get()))
        PROBING.set(True)
        yield


def _probe(model: nn.Module) -> Traits:
    """Find the traits of a model."""
    with _probing(model):
        probe = _Probe(model)
        row = probe.row

        def right() -> bool:
            return probe.same(probe.run([row, row[:4]], "right"), [(0, 6), (0, 4)])

        found: dict[str, Any] = {"right": _holds(right)}
        if not found["right"] and probe.positions:
            probe.positions = False
            found["right"] = _holds(right)
            probe.positions = not found["right"]
        found["positions"] = probe.positions
        found["causal"] = found["right"] or probe.same(probe.run([row[:4]]), [(0, 4)])
        found["batch"] = found["right"] or _holds(
            lambda: probe.same(probe.run([row, row], "right"), [(0, 6), (0, 6)])
        )
        kept: dict[str, Any] = {}

        def left() -> bool:
            keep = probe.cache is not None
            out = probe.run([row[:4], row[:2]], "left", keep=keep)
            logits, kept["cache"], kept["mask"] = out if keep else (out, None, None)
            return probe.same(logits, [(0, 4), (0, 2)], "left")

        def after_cache(width: int) -> bool:
            logits = probe.run(
                [row[4 : 4 + width], row[2 : 2 + width]], None, kept["cache"], kept["mask"]
            )
            return probe.same(logits, [(4, 4 + width), (2, 2 + width)])

        found["left"] = _holds(left)
        usable = hasattr(kept.get("cache"), "reorder_cache")
        found["continued"] = found["left"] and usable and _holds(lambda: after_cache(2))
        found["cache"] = found["continued"] or _holds(lambda: _steps(probe, found["left"]))
        found["shared"] = found["continued"] and _holds(lambda: _shares(probe))
    window = window_of(model)
    if window and getattr(text_config(model), "model_type", None) in _WINDOW_IN_CACHE_ALONE:
        found |= dict.fromkeys(("cache", "continued", "shared"), False)
    return Traits(**found, window=window, rope=rope_limit(model, "longrope"))


def _steps(probe: _Probe, padded: bool) -> bool:
    """Whether single tokens after the cache of two rows, padded if possible, are as without it."""
    row = probe.row
    starts = [4, 2] if padded else [4, 4]
    side = "left" if padded else None
    logits, cache, mask = probe.run([row[:start] for start in starts], side, keep=True)
    if not hasattr(cache, "reorder_cache"):
        return False
    order = torch.tensor([1, 0], device=row.device)
    cache.reorder_cache(order)
    starts, mask = starts[::-1], mask[order]
    for _ in range(2):
        logits, cache, mask = probe.run([row[s : s + 1] for s in starts], None, cache, mask, True)
        if not probe.same(logits, [(start, start + 1) for start in starts]):
            return False
        starts = [start + 1 for start in starts]
    return True


def _shares(probe: _Probe) -> bool:
    """Whether rows of different length after the cache of a common beginning are as alone."""
    row = probe.row
    _, cache, mask = probe.run([row[:2]], None, keep=True)
    rows = torch.zeros(2, dtype=torch.long, device=row.device)
    cache.reorder_cache(rows)
    logits = probe.run([row[2:6], row[2:3]], "left", cache, mask[rows])
    return probe.same(logits, [(2, 6), (2, 3)], "left")


def _holds(claim: Callable[[], bool]) -> bool:
    """Whether a claim holds; one that fails with an exception does not."""
    try:
        return claim()
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception:  # of any kind: models fail in many ways
        return False
