"""Whether edited-out memories come back: fine-tune on some of them and test the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from kfac.analysis.losses import passage_losses, teacher_forced_matches
from kfac.collection.batches import check_model_and_batches, must_be_causal
from kfac.collection.finite import ADVICE, first_not_finite_row, not_finite, not_finite_row_error
from kfac.edits.weight_edit import WeightEdit
from lirefs.errors import BatchError, EditError, NonFiniteError, checked_seed, must_be
from lirefs.model.training.copies import trainable
from lirefs.model.training.steps import checked_step, shuffled
from lirefs.statistics.intervals import Estimate, mean_estimate


@dataclass(frozen=True, eq=False)
class Relearning:
    """Share of texts that are recited, by arm and training step, with 95 % intervals over texts.

    Attributes:
        steps: Numbers of training steps after which the model was tested.
        known: For each arm and step, share recited of the texts that are trained on.
        rest: For each arm and step, share recited of the other texts.
    """

    steps: list[int]
    known: dict[str, list[Estimate]]
    rest: dict[str, list[Estimate]]

    def __repr__(self) -> str:
        return f"Relearning(arms {list(self.known)}, steps {self.steps})"


def relearn(
    model: nn.Module,
    arms: Mapping[str, WeightEdit | None],
    known: Iterable[Any],
    rest: Iterable[Any],
    *,
    other: Iterable[Any] | None = None,
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20, 50),
    lr: float = 1e-5,
    seed: int = 0,
    progress: bool = True,
) -> Relearning:
    """Fine-tune the model under each edit on part of what it recited, and test the rest.

    Every arm trains all parameters with AdamW on the same batches in the same order, in evaluation
    mode (no dropout), and ends with all weights as they were. If an edit only hides memories, texts
    that were not trained on are recited again; if it removed them, they are not.

    Args:
        model: A causal language model, left as it was found.
        arms: Name to edit; None is the model as it is, the never-edited control.
        known: Batches of memorized texts to train on, see `kfac.collect`; labels of -100 mark what
            is not counted (the prefix).
        rest: Batches of other memorized texts, labelled in the same way: the test.
        other: Batches of unrelated text. If given, each edited arm is trained on these as well,
            under its name with " (other text)": what comes back there is fluency, not memory.
        steps: When to test, ascending, from 0.
        lr: Learning rate.
        seed: Seed of the order of batches.
        progress: Show a bar.

    Raises:
        BatchError: A set is empty, or one of its texts has no counted position.
        EditError: A setting is out of range, or no arm.
        NonFiniteError: The loss, a gradient or a logit is NaN or infinite.
    """
    check_model_and_batches(model, known, rest)
    must_be_causal(model)
    must_be(arms, Mapping, "arms", EditError)
    for name, edit in arms.items():
        must_be(edit, (WeightEdit, type(None)), f"arms[{name!r}]", EditError)
    seed = checked_seed(seed, EditError)
    wanted = list(steps)
    if not arms or not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or lr <= 0:
        raise EditError(
            f"relearning needs an arm, ascending steps from 0 (got {wanted}) and lr > 0 (got {lr})"
        )
    sets = {"known": list(known), "rest": list(rest)}
    runs = [(name, edit, sets["known"]) for name, edit in arms.items()]
    if other is not None:
        sets["other"] = list(other)
        edits = [(name, edit) for name, edit in arms.items() if edit is not None]
        runs += [(f"{name} (other text)", edit, sets["other"]) for name, edit in edits]
    if empty := [name for name, batches in sets.items() if not batches]:
        raise BatchError(f"sets of texts without a batch: {', '.join(empty)}")
    result = Relearning(wanted, {}, {})
    with tqdm(total=len(runs) * wanted[-1], desc="relearn", disable=not progress or None) as bar:
        for name, edit, texts in runs:
            bar.set_postfix_str(name)
            result.known[name], result.rest[name] = [], []
            with ExitStack() as stack:
                # The edit comes first: it was made for the weights, not for their float32 copies.
                if edit is not None:
                    stack.enter_context(edit.apply(model))
                stack.enter_context(trainable(model))
                for step in _train(model, texts, wanted, lr, seed, bar, name):
                    for which, table in (("known", result.known), ("rest", result.rest)):
                        when = f"arm {name!r} after {step} steps, {which}"
                        table[name].append(_recited(model, sets[which], when))
    return result


def _train(
    model: nn.Module, batches: list[Any], steps: list[int], lr: float, seed: int, bar: Any, arm: str
) -> Iterator[int]:
    """Train, and yield after each of the wanted numbers of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    order = shuffled(len(batches), seed)
    done = 0
    for wanted in steps:
        while done < wanted:
            index = next(order)
            step = f"arm {arm!r} after {done} steps, batch {index} of those trained on"
            advice = "lower lr" if done else ADVICE
            losses = passage_losses(model, batches[index])
            if not_finite([losses]):
                row = first_not_finite_row(losses[:, None])
                raise not_finite_row_error(step, row, losses.shape, "the loss holds", advice)
            optimizer.zero_grad()
            losses.mean().backward()  # type: ignore[no-untyped-call]
            checked_step(model, optimizer, step, advice)
            done += 1
            bar.update()
        yield done


def _recited(model: nn.Module, batches: list[Any], when: str) -> Estimate:
    try:
        return mean_estimate(teacher_forced_matches(model, batches).numpy())
    except NonFiniteError as error:
        raise NonFiniteError(f"{when}: {error}; training may need a lower lr") from error
