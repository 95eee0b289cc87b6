"""Interventions: reversible changes of a model, and their composition."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.utils.hooks import RemovableHandle

from lirefs.errors import InterventionError, LirefsError, got, must_be
from lirefs.model.interrupts import interrupts_held, note, undone
from lirefs.model.layout import Layout


class Handle(Protocol):
    """What `attach` returns: `remove` takes the intervention off again, once."""

    def remove(self) -> None:
        """Leave the model as it was before."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """Anything that changes a model reversibly: steering, a weight edit, a composition.

    Any object with these two methods is one; there is nothing to inherit from. `lirefs.compare`
    takes it as it is, and `lirefs.compose(it)` gives it `apply` and `+`.

    Only one thread, or task of asyncio, at a time may change a model. While it has something
    attached, it and the tasks that it starts may attach more; another gets a named error at once,
    until everything is removed or the first has ended. Those that take turns need a lock of their
    own around `attach` and `remove`. An intervention also acts on what others run on the model
    meanwhile; a scope, gate or schedule follows one forward pass, so these must take turns too.
    Threads with models of their own never interfere.
    """

    def attach(self, model: nn.Module) -> Handle:
        """Change the model (`lm.model`) until the handle's `remove` restores it bit for bit.

        The handle that PyTorch returns for a hook is one already.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """A dict of JSON values that tell it from any other, for journals and reports.

        Where that cannot be said, a key `unknown` gives the reason; journals refuse it then.
        """
        ...


@runtime_checkable
class Checkable(Intervention, Protocol):
    """An intervention that can say beforehand whether it fits a model, as steering does."""

    def check(self, model: nn.Module) -> Layout:
        """Raise what `attach` would raise; change nothing."""
        ...

    def attach_checked(self, model: nn.Module, layout: Layout, undo: UndoStack) -> None:
        """Attach without another check; what undoes it goes on the stack."""
        ...


_Worker = threading.Thread | asyncio.Task[Any]
# For each changed model the threads and tasks that changed it, with a token for each change.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, list[tuple[_Worker, object]]] = (
    weakref.WeakKeyDictionary()
)
# Tasks that have changed a model: this one, and those that started it.
_TASKS: ContextVar[frozenset[asyncio.Task[Any]]] = ContextVar("tasks", default=frozenset())
# For each model what an `apply` could not remove, as a later edit was in place.
_LATE: weakref.WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def reserve(model: nn.Module, error: type[LirefsError] = InterventionError) -> Callable[[], None]:
    """Reserve a model for changes by this thread or task, many times if need be.

    Returns the release. Raises `error` if another one that is still running has changed the model.
    """
    must_be_module(model)
    thread, task = threading.current_thread(), _current_task()
    entry = (task or thread, object())
    holders = _HOLDERS.setdefault(model, [])

    def release() -> None:
        with interrupts_held():
            with _LOCK:
                if entry not in holders:
                    return
                holders.remove(entry)
                late = _LATE.pop(model, [])
            for remove in reversed(late):  # each that succeeds releases in turn, tries the others
                try:
                    remove()
                except LirefsError:
                    _leave(model, remove)

    if task is not None:
        _TASKS.set(_TASKS.get() | {task})
    try:
        with _LOCK:
            for other, _ in holders:
                if other is not thread and other not in _TASKS.get() and _runs(other):
                    kind, name = _named(other)
                    raise error(
                        f"{kind} {name!r} has changed this model and not yet restored it; let "
                        f"{kind}s take turns (a lock around attach and remove), or give each a "
                        "model"
                    )
            holders.append(entry)
        return release
    except BaseException:
        release()
        raise


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


def _runs(worker: _Worker) -> bool:
    return worker.is_alive() if isinstance(worker, threading.Thread) else not worker.done()


def _named(worker: _Worker) -> tuple[str, str]:
    if isinstance(worker, threading.Thread):
        return "thread", worker.name
    return "task", worker.get_name()


def _leave(model: nn.Module, remove: Callable[[], None]) -> None:
    """Remove something with the next change of a model that is removed."""
    with _LOCK:
        _LATE.setdefault(model, []).append(remove)


def must_be_module(model: object) -> None:
    """Raise InterventionError for anything but a model itself, such as an `lm`."""
    if not isinstance(model, nn.Module):
        raise InterventionError(
            f"an intervention needs the model itself, got {type(model).__name__}; give lm.model"
        )


def must_be_intervention(value: object, name: str) -> None:
    """Raise InterventionError unless an argument of this name is an intervention."""
    if isinstance(value, type):
        raise InterventionError(
            f"{name} must be an object, got the class {value.__name__} itself; call it: "
            f"{value.__name__}(...)"
        )
    must_be(value, Intervention, name, InterventionError)


def attach_to(model: nn.Module, intervention: Intervention) -> Callable[[], None]:
    """Attach an intervention; returns what removes it.

    Raises:
        InterventionError: `attach` did not return a handle. The hooks that it has added are
            removed again, as they are where it raises an error of its own or is interrupted.
    """
    first_hook = RemovableHandle.next_id
    handles: list[Any] = []
    try:
        note(handles, intervention.attach, model)
        remove: Callable[[], None] | None = getattr(handles[0], "remove", None)
        if not callable(remove):
            raise InterventionError(
                f"{type(intervention).__name__}.attach returned {got(handles[0])}; it must return "
                "a handle, whose remove() restores the model (what register_forward_hook returns "
                "is one). The hooks that it added were removed; a weight that it changed is not "
                "restored"
            )
        return remove
    except BaseException:
        for handle in handles:  # the interrupt came after it was attached
            if callable(getattr(handle, "remove", None)):
                handle.remove()
        for module in model.modules():
            tables = [table for name, table in vars(module).items() if name.endswith("_hooks")]
            for hooks in tables:
                for key in [key for key in hooks if key >= first_hook]:
                    del hooks[key]
        raise


def is_hand_written(one: object) -> bool:
    """Whether an intervention, a part of it, or a task is of a class outside these two packages."""
    if isinstance(one, Composition):
        return any(map(is_hand_written, one.members))
    return type(one).__module__.partition(".")[0] not in ("lirefs", "kfac")


# The steerings and prompts that are attached to each model, in order.
_STEERINGS: weakref.WeakKeyDictionary[nn.Module, list[Intervention]] = weakref.WeakKeyDictionary()


def steerings_of(model: nn.Module) -> list[Intervention]:
    """The list of what steers a model, by hooks or by a prompt; they keep it up to date."""
    return _STEERINGS.setdefault(model, [])


def steerings_on(model: nn.Module) -> list[Intervention]:
    """The steerings that act on a model, also if attached to a wrapper of it or to its inside."""
    steered = [(one, attached) for one, attached in list(_STEERINGS.items()) if attached]
    parts = set(model.modules()) if steered else set()
    shared = (attached for one, attached in steered if not parts.isdisjoint(one.modules()))
    return list(chain.from_iterable(shared))


def refuse_steered(model: nn.Module, error: type[LirefsError], doing: str) -> None:
    """Raise `error` if a model is steered; `doing` completes "a steered model cannot be ..."."""
    if attached := steerings_on(model):
        raise error(
            f"a steered model cannot be {doing}: {'; '.join(map(str, attached))} is attached; "
            "remove it first (leave the `with`, or call the handle's remove)"
        )


@contextmanager
def one_at_a_time(lock: threading.Lock) -> Iterator[None]:
    """Hold the lock of a handle that is being removed, whole: an interrupt waits for the end.

    Raises InterventionError if another thread is removing it.
    """
    with interrupts_held():
        if not lock.acquire(blocking=False):
            raise InterventionError(
                "another thread is removing this intervention right now; let one of them remove it"
            )
        try:
            yield
        finally:
            lock.release()


class UndoStack:
    """A handle made of what undoes the steps of an attachment, last first.

    It is made, and known to a `try`, before the first step, since an interrupt may come when a
    call that has made it returns.

    Attributes:
        steps: What undoes each step; see `note`.
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def remove(self) -> None:
        """Undo all steps; one that refuses (a weight edit under a later one) stays for a retry."""
        with one_at_a_time(self._lock):
            while self.steps:
                self.steps[-1]()
                self.steps.pop()


@contextmanager
def attaching(undo: UndoStack) -> Iterator[None]:
    """Take the steps of an attachment, all quick, in the `with`; an error in it undoes them.

    An interrupt waits for the end, and undoes them then.
    """
    try:
        with interrupts_held():
            yield
    except BaseException:
        undo.remove()
        raise


@contextmanager
def applied(intervention: Intervention | None, model: nn.Module) -> Iterator[nn.Module]:
    """The model under an intervention (None: as it is); restored whatever happens inside."""
    with undone() as steps:
        if intervention is not None:
            note(steps, reserve, model)
            note(steps, attach_to, model, intervention)
        yield model


class Composable:
    """What steerings, weight edits and compositions share: `with x.apply(model):` and `a + b`."""

    @contextmanager
    def apply(self: Intervention, model: nn.Module) -> Iterator[nn.Module]:
        """The model (`lm.model`), changed inside the `with` and restored after it; see `attach`."""
        attached: list[Handle] = []

        def remove() -> None:
            for handle in attached:
                try:
                    handle.remove()
                except LirefsError:  # under a later edit, which may outlive this `with`
                    _leave(model, handle.remove)
                    raise

        with undone() as steps:
            steps.append(remove)
            note(attached, self.attach, model)
            yield model

    def __add__(self: Intervention, other: Intervention) -> Composition:
        return compose(self, other)

    def __radd__(self: Intervention, other: Intervention) -> Composition:
        return compose(other, self)


class Composition(Composable):
    """Several interventions, attached in order and removed in reverse order."""

    def __init__(self, members: tuple[Intervention, ...]) -> None:
        self.members = members

    def __repr__(self) -> str:
        return f"Composition({' + '.join(map(repr, self.members))})"

    def attach(self, model: nn.Module) -> Handle:
        """Attach every member; if one fails, those before it are removed again.

        All steerings are checked first: after a weight edit among the members, the model would no
        longer look like the one that their directions were fitted on.
        """
        undo = UndoStack()  # and not `attaching`: checks, edits and others' code may take long
        try:
            note(undo.steps, reserve, model)
            layouts = [
                one.check(model) if isinstance(one, Checkable) else None for one in self.members
            ]
            for member, layout in zip(self.members, layouts, strict=True):
                if isinstance(member, Checkable) and layout is not None:
                    member.attach_checked(model, layout, undo)
                else:
                    note(undo.steps, attach_to, model, member)
            return undo
        except BaseException:
            undo.remove()
            raise

    def describe(self) -> dict[str, Any]:
        """The descriptions of all members as a JSON object."""
        return {"kind": "composition", "members": [one.describe() for one in self.members]}


def compose(*interventions: Intervention) -> Composition:
    """Combine interventions, to be attached in this order; nested compositions are flattened.

    Args:
        *interventions: Steerings, weight edits, compositions, or objects of your own with `attach`
            and `describe` (see `lirefs.Intervention`).

    Returns:
        A composition, itself an intervention. Where a or b is of this library, `a + b` is the same.
        An intervention of your own has neither `+` nor `apply`; `compose(mine)` has both.

    Raises:
        InterventionError: An argument is not an intervention.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> questions = lirefs.load_questions("organism")
        >>> found = lirefs.fit(lm, questions, layers=[1, 2], progress=False).directions
        >>> steer = lirefs.Steer(found[1], "add", 1.0)
        >>> both = lirefs.compose(steer, lirefs.Steer(found[2], "ablate"))
        >>> with both.apply(lm.model):
        ...     lm.generate("Math: 31 + 27 =", max_new_tokens=2)
        '58'
    """
    members: list[Intervention] = []
    for one in interventions:
        must_be_intervention(one, "each part of a composition")
        members += one.members if isinstance(one, Composition) else [one]
    return Composition(tuple(members))
