"""Interventions: reversible changes of a model, their composition, and who may make them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lirefs.errors import InterventionError, LirefsError
from lirefs.model.layout import Layout


class Handle(Protocol):
    """What `attach` returns: `remove` takes the intervention off again, once."""

    def remove(self) -> None:
        """Leave the model as it was before."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """Anything that changes a model reversibly: steering, a weight edit, a composition.

    A model is changed by one thread at a time. While a thread has something attached, it may
    attach more; another thread is refused with a named error, until all is removed or the first
    thread has ended. Nobody waits, since a handle may be kept for good: threads that take turns
    take a lock of their own around `attach` and `remove`. What other threads run on the model
    meanwhile is changed like the rest; a scope, gate or schedule follows one forward pass, so they
    too take turns. Threads with models of their own never meet.
    """

    def attach(self, model: nn.Module) -> Handle:
        """Change the model until the handle's `remove` is called.

        Args:
            model: The bare model, `lm.model`.

        Returns:
            A handle whose `remove` leaves the model as it was, bit for bit.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object.

        Returns:
            JSON values that tell it from any other: journals and reports use them.
        """
        ...


@runtime_checkable
class Checkable(Intervention, Protocol):
    """An intervention that can say beforehand whether it fits a model, as steering does."""

    def check(self, model: nn.Module) -> Layout:
        """Raise what `attach` would raise; change nothing."""
        ...

    def attach_checked(self, model: nn.Module, layout: Layout) -> Handle:
        """Attach without another check."""
        ...


# For each changed model the threads that changed it, with a token for each change.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, list[tuple[threading.Thread, object]]] = (
    weakref.WeakKeyDictionary()
)
_LOCK = threading.Lock()


def reserve(model: nn.Module, error: type[LirefsError] = InterventionError) -> Callable[[], None]:
    """Keep the changes of other threads off a model; a thread may reserve it many times.

    Args:
        model: The model.
        error: What to raise.

    Returns:
        A function that ends the reservation; a second call does nothing.

    Raises:
        LirefsError: Of the type `error`: another thread that is still running has changed the
            model, or this is not a module.
    """
    must_be_module(model)
    entry = (threading.current_thread(), object())
    with _LOCK:
        holders = _HOLDERS.setdefault(model, [])
        for thread, _ in holders:
            if thread is not entry[0] and thread.is_alive():
                raise error(
                    f"thread {thread.name!r} has changed this model and not yet restored it; let "
                    "threads take turns (a lock around attach and remove), or give each a model"
                )
        holders.append(entry)

    def release() -> None:
        with _LOCK:
            if entry in holders:
                holders.remove(entry)

    return release


def must_be_module(model: object) -> None:
    """Refuse what is not a model itself, such as an `lm`.

    Raises:
        InterventionError: It is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InterventionError(
            f"an intervention needs the model itself, got {type(model).__name__}; give lm.model"
        )


# The steerings that are attached to each model, in order.
_STEERINGS: weakref.WeakKeyDictionary[nn.Module, list[Checkable]] = weakref.WeakKeyDictionary()


def steerings_of(model: nn.Module) -> list[Checkable]:
    """The list of the steerings that are attached to a model, for them to keep."""
    return _STEERINGS.setdefault(model, [])


class UndoStack:
    """The steps of an attachment, taken back one by one, last first.

    As a context it takes them back where something is raised inside, and only there.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, back: Callable[[], object]) -> None:
        """Remember how a step that was just made is taken back."""
        self._steps.append(back)

    def remove(self) -> None:
        """Leave the model as it was before; a second time does nothing.

        A step that refuses (a weight edit under a later one) stays, with all before it, so that
        another call goes on from there.
        """
        while self._steps:
            self._steps[-1]()
            self._steps.pop()

    def __enter__(self) -> UndoStack:
        return self

    def __exit__(self, kind: type[BaseException] | None, *given: object) -> None:
        if kind is not None:
            self.remove()


@contextmanager
def applied(intervention: Intervention | None, model: nn.Module) -> Iterator[nn.Module]:
    """The model under an intervention (None: as it is); restored whatever happens inside."""
    with ExitStack() as stack:
        if intervention is not None:
            stack.callback(reserve(model))
            stack.callback(intervention.attach(model).remove)
        yield model


def refuse_steered(model: nn.Module, error: type[LirefsError], doing: str) -> None:
    """Refuse a model that is steered, for what would copy its hooks.

    Args:
        model: The model.
        error: What to raise.
        doing: What was to be done, as in "cannot be baked".

    Raises:
        LirefsError: Of the type `error`; the message says which steering is attached.
    """
    attached = _STEERINGS.get(model)
    if attached:
        raise error(
            f"a steered model cannot be {doing}: {'; '.join(map(str, attached))} is attached; take "
            "it off first (leave the `with`, or call the handle's remove)"
        )


class Composition:
    """Several interventions, attached in order and removed in reverse order."""

    def __init__(self, members: tuple[Intervention, ...]) -> None:
        self.members = members

    def attach(self, model: nn.Module) -> Handle:
        """Attach every member; if one fails, those before it are removed again.

        Steerings are checked first of all: a weight edit among the members would make the model
        look like another than the one that their directions were fitted on.
        """
        with UndoStack() as steps:
            steps.add(reserve(model))
            layouts = [
                one.check(model) if isinstance(one, Checkable) else None for one in self.members
            ]
            for member, layout in zip(self.members, layouts, strict=True):
                if isinstance(member, Checkable) and layout is not None:
                    steps.add(member.attach_checked(model, layout).remove)
                else:
                    steps.add(member.attach(model).remove)
            return steps

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model under all members inside the `with`, as it was after it."""
        with applied(self, model):
            yield model

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object."""
        return {"kind": "composition", "members": [one.describe() for one in self.members]}

    def __add__(self, other: Intervention) -> Composition:
        return compose(self, other)

    def __radd__(self, other: Intervention) -> Composition:
        return compose(other, self)


def compose(*interventions: Intervention) -> Composition:
    """The interventions one after the other, nested compositions flattened.

    Args:
        *interventions: Steerings, weight edits or compositions, in the order in which they are
            attached.

    Returns:
        A composition, itself an intervention; `a + b` is the same.

    Raises:
        InterventionError: If something is not an intervention.
    """
    members: list[Intervention] = []
    for one in interventions:
        if not isinstance(one, Intervention):
            raise InterventionError(f"{type(one).__name__} is not an intervention")
        members += one.members if isinstance(one, Composition) else [one]
    return Composition(tuple(members))
