"""What the blocks below everything that is changed make of prompts, computed once for variants."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lirefs.model.guest import eagerly
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.intervention import Composition, Intervention, is_hand_written
from lirefs.model.language_model import LanguageModel
from lirefs.model.observe import hidden_input, hidden_of, with_hidden
from lirefs.model.prompts import Prompted
from lirefs.model.traits import cache_name
from lirefs.model.weight_swap import originals_of
from lirefs.tasks.batches.memory import free_bytes

SHARE = 4
"""At most a fourth of the memory that is free is filled."""
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Caches of a block that are replaced when they grow and never written into."""
_Run = Callable[[], Any]
"""A forward pass, which may be repeated: it returns what the model does."""


def first_changed(lm: LanguageModel, intervention: Intervention | None) -> int:
    """The first block that an attached intervention changes; 0 also where that is not known.

    Steering says it itself (`first_block`), edits are found by the weights they have replaced.
    """
    parts = intervention.members if isinstance(intervention, Composition) else (intervention,)
    layers, of_block = [lm.n_layers], _block_of_parameter(lm)
    for one in filter(None, parts):
        if is_hand_written(one) or isinstance(one, Prompted):
            return 0
        if hasattr(one, "first_block"):
            layers.append(one.first_block(lm.layout))
    edited = [one for one in lm.model.parameters() if originals_of(one)]
    return min([*layers, *(of_block.get(id(one), 0) for one in edited)])


def _block_of_parameter(lm: LanguageModel) -> dict[int, int]:
    """The first block that each parameter is in, by the identity of the parameter."""
    found: dict[int, int] = {}
    for layer in range(lm.n_layers):
        for parameter in lm.layout.block(lm.model, layer).parameters():
            found.setdefault(id(parameter), layer)
    return found


@dataclass
class _Known:
    """What is known of one batch: outputs of blocks by the layer after them, and their caches."""

    outputs: dict[int, Any] = field(default_factory=dict)
    caches: list[Any] = field(default_factory=list)


class LowerBlocks:
    """Outputs and caches of lower blocks, for passes that begin above them.

    A pass on the same batch under an intervention that changes nothing below block `first` begins
    there. The first such pass is also run in full: unless both agree bit for bit (a block may leave
    something to later ones in a way of its own), no pass begins at that block any more. This is put
    off until the batches and interventions that are known can save what it costs. Where somebody
    else has changed what is below, or looks at it, passes are run in full as well.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._wanted: Counter[int] = Counter()
        self._proved: dict[tuple[Any, ...], bool] = {}
        self._known: dict[bytes, _Known] = {}
        self._room = free_bytes(lm.device) // SHARE
        self._block_of = _block_of_parameter(lm)
        self._weights = {id(one): _state(one) for one in lm.model.parameters()}

    def expect(self, intervention: Intervention | None) -> int:
        """The first block that an attached intervention changes: what it takes is kept from now."""
        first = first_changed(self._lm, intervention)
        self._wanted[first] += 1
        return first

    @contextmanager
    def under(self, intervention: Intervention | None) -> Iterator[None]:
        """Let passes inside the `with` begin at the first block that what is attached changes."""
        first = first_changed(self._lm, intervention)
        self._wanted.setdefault(first, 1)
        with undone() as steps:
            steps.append(partial(_HERE.set, _HERE.get()))
            _HERE.set((self, first))
            yield

    def passed(
        self, model: nn.Module, first: int, inputs: Sequence[Tensor], shared: bool, run: _Run
    ) -> Any:
        """What `run` returns, in whichever way; see `begun_above`."""
        levels = [one for one in self._wanted if 0 < one <= first and one < self._lm.n_layers]
        if model is not self._lm.model or not levels or not self._untouched(max(levels)):
            return run()
        digest = hashlib.sha256(repr([tuple(one.shape) for one in inputs]).encode())
        for one in inputs:
            digest.update(one.cpu().numpy().tobytes())
        known = self._known.setdefault(digest.digest(), _Known())
        if first in known.outputs:
            return self._replayed(first, known, shared, run)
        missing = [one for one in levels if one not in known.outputs]
        return self._recorded(missing, known, run) if missing else run()

    def _untouched(self, first: int) -> bool:
        """Whether what is below runs as its classes say, as it was, with nobody looking on."""
        modules = chain.from_iterable(block.modules() for block in self._blocks(first))
        return not any(
            "forward" in vars(one) or one._forward_hooks or one._forward_pre_hooks
            for one in modules
        ) and all(
            self._weights.get(id(one)) == _state(one)
            for one in self._lm.model.parameters()
            if self._block_of.get(id(one), -1) < first
        )

    def _blocks(self, first: int) -> list[nn.Module]:
        return [self._lm.layout.block(self._lm.model, layer) for layer in range(first)]

    def _cache(self, output: Any) -> Any:
        return getattr(output, cache_name(self._lm.model) or "", None)

    def _recorded(self, levels: Sequence[int], known: _Known, run: _Run) -> Any:
        outputs: dict[int, Any] = {}

        def kept(level: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            # Cloned, because later blocks may change it in place.
            outputs[level] = with_hidden(output, hidden_of(output).clone())
            return output

        lasts = [(level, self._lm.layout.block(self._lm.model, level - 1)) for level in levels]
        with _forwards([(last, partial(kept, level, last.forward)) for level, last in lasts]):
            result = run()
        caches = []
        if (cache := self._cache(result)) is not None:
            caches = [copy.copy(one) for one in getattr(cache, "layers", ())[: max(levels)]]
            if len(caches) < max(levels) or not all(type(one) in _PLAIN for one in caches):
                return result
        # A cache that was known of fewer blocks is part of the new one.
        tensors = [hidden_of(one) for one in outputs.values()]
        tensors += [one for layer in caches[len(known.caches) :] for one in _tensors(layer)]
        size = sum(one.numel() * one.element_size() for one in tensors)
        if len(outputs) == len(levels) and size <= self._room:
            self._room -= size
            known.outputs |= outputs
            known.caches = max(known.caches, caches, key=len)
        return result

    def _replayed(self, first: int, known: _Known, shared: bool, run: _Run) -> Any:
        kind = (first, shared, bool(known.caches))
        if self._proved.get(kind):
            return self._begun_at(first, known, run)
        full = run()
        if kind not in self._proved and self._pays(first):
            self._proved[kind] = False
            # An error here is of a family whose blocks hand on more than their hidden states.
            with suppress(Exception):
                self._proved[kind] = self._same(full, self._begun_at(first, known, run))
        return full

    def _pays(self, first: int) -> bool:
        """Whether the known batches, under all that is expected, save as much as a pass costs."""
        batches = sum(first in one.outputs for one in self._known.values())
        return batches * self._wanted[first] * first >= self._lm.n_layers - first

    def _begun_at(self, first: int, known: _Known, run: _Run) -> Any:
        like = known.outputs[first]

        def again(*_: Any, **__: Any) -> Any:
            return with_hidden(like, hidden_of(like).clone())

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_input(args, kwargs)
            return type(like)([hidden, *like[1:]]) if isinstance(like, tuple | list) else hidden

        *lower, last = self._blocks(first)
        with _forwards([*((one, hand_on) for one in lower), (last, again)]):
            result = run()
        if known.caches:
            self._cache(result).layers[:first] = map(copy.copy, known.caches[:first])
        return result

    def _same(self, one: Any, other: Any) -> bool:
        pairs = [(one.logits, other.logits)]
        if (cache := self._cache(one)) is not None:
            layers = zip(cache.layers, self._cache(other).layers, strict=True)
            pairs += [
                pair for a, b in layers for pair in zip(_tensors(a), _tensors(b), strict=True)
            ]
        return all(
            a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
            for a, b in pairs
        )


_HERE: ContextVar[tuple[LowerBlocks, int] | None] = ContextVar("lower_blocks", default=None)


def begun_above(model: nn.Module, run: _Run, inputs: Sequence[Tensor], shared: bool = False) -> Any:
    """What a forward pass returns, which begins above the blocks that are known if some are.

    Args:
        model: The model that runs.
        run: The pass. It may be called twice.
        inputs: All that decides it: token ids, those before them in a cache, and masks.
        shared: Whether it continues a cache.
    """
    here = _HERE.get()
    return run() if here is None else here[0].passed(model, here[1], inputs, shared, run)


def _state(parameter: nn.Parameter) -> tuple[int, int]:
    """Where the numbers of a parameter are, and how often they were written over."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _tensors(layer: Any) -> tuple[Tensor, ...]:
    return (layer.keys, layer.values) if layer.is_initialized else ()


@contextmanager
def _forwards(given: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Give modules other forward methods inside the `with`."""
    with eagerly(), undone() as steps:
        with interrupts_held():
            for module, forward in given:
                steps.append(partial(vars(module).pop, "forward", None))
                vars(module)["forward"] = forward
        yield
