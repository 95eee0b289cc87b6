"""Weight edits: swap a model's weights for edited ones, and put the originals back bit for bit."""

from __future__ import annotations

import abc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from kfac.errors import EditError, EditOrderError
from kfac.target import Target

# For each edited parameter the attached edits, oldest first: a token of the handle, and the tensor
# that was replaced. Nothing here refers to the parameter, so a model dropped while edited is freed.
_STACKS: Any = WeakIdKeyDictionary()

# For each changed model the threads that changed it, with a token for each change.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, list[tuple[threading.Thread, object]]] = (
    weakref.WeakKeyDictionary()
)
_LOCK = threading.Lock()


def hold(model: nn.Module, error: type[Exception] = EditError) -> Callable[[], None]:
    """Keep the changes of other threads off a model. The thread itself may hold it many times.

    Args:
        model: The model.
        error: What to raise.

    Returns:
        A function that lets others at it again; a second call does nothing.

    Raises:
        EditError: Another thread that is still running holds it (or the class given as `error`).
    """
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


class EditHandle:
    """An edit that is in place. Remove it with `remove()` or by leaving a `with` block.

    Args:
        originals: Each parameter with the tensor that was replaced.
    """

    def __init__(self, originals: list[tuple[nn.Parameter, Tensor]]) -> None:
        self.token = object()
        self._originals = originals
        self._release: Callable[[], None] = lambda: None

    def remove(self) -> None:
        """Restore the original tensors; does nothing the second time.

        Raises:
            EditOrderError: A later edit of the same weight is still in place. Nothing is changed.
        """
        for parameter, _ in self._originals:
            if _STACKS[parameter][-1][0] is not self.token:
                raise EditOrderError(
                    "a later edit of the same weight is still attached; remove that one first"
                )
        for parameter, original in self._originals:
            parameter.data = original
            stack = _STACKS[parameter]
            stack.pop()
            if not stack:
                del _STACKS[parameter]
        self._originals = []
        self._release()

    def __enter__(self) -> EditHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


class WeightEdit(abc.ABC):
    """A reversible change of weights.

    Subclasses compute new weights in `prepare`; this class puts them in place and takes them out.
    """

    kind: ClassVar[str]

    @abc.abstractmethod
    def prepare(self, model: nn.Module) -> list[tuple[Target, Tensor]]:
        """Return the targets to change, each with its new weight (out, in) in any float dtype.

        Args:
            model: The model to be edited; it is not changed.

        Returns:
            One entry for each target that changes.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return kind and parameters as JSON values.

        Returns:
            An object; what made the edit is told apart by it.
        """

    def attach(self, model: nn.Module) -> EditHandle:
        """Put the edited weights in place.

        All new weights are computed and checked before the first one is put in place.

        Args:
            model: The model; its parameters stay the same objects, so tied weights stay tied.

        Returns:
            A handle that restores the original tensors.

        Raises:
            EditError: Two targets share one parameter, a new weight is not finite, or another
                thread has changed the model and not yet restored it.
        """
        with ExitStack() as stack:
            stack.callback(hold(model))
            changes = self._changes(model)
            originals = [(parameter, parameter.data) for parameter, _ in changes]
            handle = EditHandle(originals)
            handle._release = stack.pop_all().close
        for parameter, original in originals:
            _STACKS.setdefault(parameter, []).append((handle.token, original))
        try:
            for parameter, stored in changes:
                parameter.data = stored
        except BaseException:
            handle.remove()
            raise
        return handle

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """Edit the model inside a `with` block, and yield it.

        Args:
            model: The model.

        Yields:
            The model.

        Raises:
            EditError: As `attach`.
            EditOrderError: A later edit of the same weight is still in place at the end of the
                block.
        """
        with self.attach(model):
            yield model

    def bake(self, model: nn.Module) -> None:
        """Put the edited weights in place for good; the originals are given up.

        `model.save_pretrained(folder)` then writes a model that loads without this library.

        Args:
            model: The model.

        Raises:
            EditOrderError: A removable edit of the same weight is in place; its removal would
                undo this one.
            EditError: As for `attach`. Nothing is changed then.
        """
        with ExitStack() as stack:
            stack.callback(hold(model))
            changes = self._changes(model)
            if any(parameter in _STACKS for parameter, _ in changes):
                raise EditOrderError("an edit of the same weight is attached; remove it, then bake")
            for parameter, stored in changes:
                parameter.data = stored

    def _changes(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter to change with its new tensor, both as the module stores them."""
        changes: dict[int, tuple[nn.Parameter, Tensor]] = {}
        owners: dict[tuple[int, int | None], str] = {}
        for target, weight in self.prepare(model):
            parameter = target.parameter
            place = (id(parameter), target.expert)
            if place in owners or (target.expert is None and id(parameter) in changes):
                raise EditError(
                    f"targets {owners.get(place)!r} and {target.name!r} are tied to one "
                    "parameter; an edit can change it only once"
                )
            owners[place] = target.name
            # Experts of one stack are written into one new tensor.
            _, into = changes.get(id(parameter), (parameter, None))
            stored = target.placed(weight, into=into)
            if not bool(target.view(stored).isfinite().all()):
                raise EditError(f"target {target.name!r}: its edited weight is not finite")
            changes[id(parameter)] = (parameter, stored)
        return list(changes.values())


def originals_of(target: Target) -> list[Tensor]:
    """Return the weights (out, in) that the edits in place have replaced, oldest first."""
    return [target.view(original) for _, original in _STACKS.get(target.parameter, [])]
