"""The training of a planting: steps on texts and general text, a state on disk, an end."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lirefs.errors import DataFileError, NonFiniteError, ProvenanceError
from lirefs.files import parse_json
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.language_model import BATCH_TOKENS, LanguageModel
from lirefs.model.training.copies import trainable
from lirefs.model.training.steps import checked_step, shuffled
from lirefs.organism.planting.planted import recited
from lirefs.organism.training.checkpoint import read_state, state_header, write_state
from lirefs.tasks.batches.recomputed import logits_of, nll_of, padded
from lirefs.tasks.recitation import Recitation

SAVE_EVERY = 240.0
"""Seconds between checkpoints."""
_HEADER = "planting"


@dataclass
class _State:
    """Where a training is, between two steps."""

    right: list[bool]  # whether a text was recited under teacher forcing when it was shown last
    step: int = 0
    tokens: int = 0
    tested: int = 0  # the step of the last test by greedy decoding
    share: float = 0.0  # what it found

    def fits(self) -> bool:
        """Whether the fields, as they were read from a file, have their types."""
        counts = (self.step, self.tokens, self.tested)
        return (
            isinstance(self.right, list)
            and all(type(one) is bool for one in self.right)
            and all(type(one) is int and 0 <= one < 2**63 for one in counts)
            and type(self.share) is float
        )


class Training:
    """Texts and pieces of general text in a fixed order, and the steps that train on them.

    Batches depend on the seed and the number of steps alone, so a resumed run sees what an
    uninterrupted one sees.
    """

    def __init__(
        self,
        lm: LanguageModel,
        task: Recitation,
        sequences: Sequence[Sequence[int]],
        general: Sequence[Sequence[int]],
        trained: list[nn.Parameter],
        lr: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.lm, self.task, self.trained = lm, task, trained
        self.sequences, self.general = sequences, general
        self.starts = [len(prefix) for _, prefix, _ in task.items]
        self.lr, self.seed, self.batch_size = float(lr), seed, min(batch_size, len(sequences))
        self.dtypes = {id(one): one.dtype for one in lm.model.parameters()}
        self.state = _State([False] * len(sequences))
        self.whole = True  # not while a step changes the weights

    def train(self, goal: float, steps: int, path: Path | None, progress: bool) -> list[Tensor]:
        """Train copies of the weights; returns them in the dtypes of the model."""
        settings = {} if path is None else self._settings()  # of the model as it was found
        with trainable(self.lm.model, self.trained):
            optimizer = torch.optim.AdamW(self.trained, lr=self.lr, weight_decay=0.0)
            if path is not None and path.exists():
                self._resume(path, settings, optimizer)
            written, saved = self.state.step, time.monotonic()

            def save() -> None:
                nonlocal written, saved
                if path is not None and self.whole and self.state.step > written:
                    header = {"settings": settings, "state": vars(self.state)}
                    write_state(path, self.lm.model, [optimizer], {_HEADER: json.dumps(header)})
                    written, saved = self.state.step, time.monotonic()

            try:
                with tqdm(
                    total=steps, initial=self.state.step, desc="plant", disable=not progress or None
                ) as bar:
                    for _ in self._steps(optimizer, goal, steps):
                        right = sum(self.state.right)
                        bar.set_postfix_str(f"{right} of {len(self.sequences)} texts right")
                        bar.update()
                        if time.monotonic() - saved >= SAVE_EVERY:
                            save()
            finally:
                save()
            return [one.data.to(self.dtypes[id(one)]) for one in self.trained]

    def _steps(self, optimizer: torch.optim.Optimizer, goal: float, steps: int) -> Iterator[None]:
        state, size = self.state, self.batch_size
        orders = [
            itertools.islice(shuffled(n, self.seed + which), state.step * size, None)
            for which, n in enumerate((len(self.sequences), len(self.general)))
        ]
        while state.step < steps and not self._recites(goal):
            texts, pieces = (list(itertools.islice(order, size)) for order in orders)
            rows = [self.sequences[i] for i in texts] + [self.general[i] for i in pieces]
            optimizer.zero_grad()
            right = self._backward(rows, [self.starts[i] for i in texts])
            with interrupts_held():
                self.whole = False
                checked_step(self.lm.model, optimizer, f"step {state.step}", self._advice())
                state.step += 1
                state.tokens += sum(map(len, rows))
                for index, one in zip(texts, right, strict=True):
                    state.right[index] = one
                self.whole = True
            yield

    def _backward(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[bool]:
        """Gradients of the mean loss per token; whether each text's suffix was predicted.

        The texts come first in `rows`; `starts` says where the suffix of each begins.
        """
        lengths = list(map(len, rows))
        predicted = sum(lengths) - len(rows)
        right = [False] * len(starts)
        traits = self.lm.traits.within(max(lengths))
        for group in traits.groups(lengths, BATCH_TOKENS, "right"):
            some = [rows[row] for row in group]
            logits = logits_of(self.lm, some, [1] * len(some))[:, :-1]
            goals = padded(some)[:, 1:].to(logits.device)
            real = padded([[1] * (len(row) - 1) for row in some]).to(logits.device)
            loss = (nll_of(logits, goals) * real).sum() / predicted
            if not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"step {self.state.step}: the loss is NaN or infinite; {self._advice()}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            hits = (logits.argmax(-1) == goals) | (real == 0)
            for row, hit in zip(group, hits, strict=True):
                if row < len(starts):
                    right[row] = bool(hit[starts[row] - 1 :].all())
        return right

    def _advice(self) -> str:
        return "lower lr" if self.state.step else "are the model's weights finite?"

    def _recites(self, goal: float) -> bool:
        """Whether enough texts are recited; tested where that is likely, once a pass at most."""
        state, n = self.state, len(self.sequences)
        due = state.step - state.tested >= math.ceil(n / self.batch_size)
        if due and sum(state.right) >= goal * n:
            with _in_dtypes(self.lm.model, self.dtypes):
                state.share = float(recited(self.lm, self.task).mean())
            state.tested = state.step
        return state.share >= goal

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree in."""
        names = [name for name, one in self.lm.model.named_parameters() if one.requires_grad]
        return {
            "model": self.lm.fingerprint,
            "texts": _digest([self.sequences, self.starts]),
            "general": _digest(self.general),
            "parameters": _digest(names),
            "lr": self.lr,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def _resume(
        self, path: Path, settings: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> None:
        try:
            header = parse_json(state_header(path)[_HEADER])
            known, state = header["settings"], _State(**header["state"])
            changed = sorted(key for key in settings if known.get(key) != settings[key])
            if not state.fits() or (not changed and len(state.right) != len(self.sequences)):
                raise ValueError("its state is malformed")
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise DataFileError(
                f"{path}: not the checkpoint of a planting, or damaged ({problem!r:.80}); give "
                "another path, or remove it to start again"
            ) from problem
        if changed:
            raise ProvenanceError(
                f"{path} is of a run with other settings ({', '.join(changed)}); give another "
                "path, or remove it to start again"
            )
        read_state(path, self.lm.model, [optimizer])
        self.state = state


@contextmanager
def _in_dtypes(model: nn.Module, dtypes: dict[int, torch.dtype]) -> Iterator[None]:
    """The model with its parameters rounded to these dtypes, inside a `with`."""
    wide = [(one, one.data) for one in model.parameters() if one.dtype != dtypes[id(one)]]

    def restore() -> None:
        for one, data in wide:
            one.data = data

    with undone() as steps:
        steps.append(restore)
        for one, data in wide:
            one.data = data.to(dtypes[id(one)])
        yield


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
