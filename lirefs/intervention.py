"""Interventions: reversible changes of a model. Steering with hooks, and composition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lirefs.directions import Direction, Directions
from lirefs.errors import InterventionError
from lirefs.layout import (
    Layout,
    hidden_input,
    hidden_of,
    layout_of,
    with_hidden,
    with_hidden_input,
)

OPERATORS = ("add", "ablate", "amplify")


class Handle(Protocol):
    """What `attach` returns: `remove` takes the intervention off again, once."""

    def remove(self) -> None:
        """Leave the model as it was before."""
        ...


@runtime_checkable
class Intervention(Protocol):
    """Anything that changes a model reversibly: steering, a weight edit, a composition."""

    def attach(self, model: nn.Module) -> Handle:
        """Change the model until the handle's `remove` is called."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object."""
        ...


@contextmanager
def applied(intervention: Intervention | None, model: nn.Module) -> Iterator[nn.Module]:
    """The model under an intervention (None: as it is); restored whatever happens inside."""
    if intervention is None:
        yield model
        return
    handle = intervention.attach(model)
    try:
        yield model
    finally:
        handle.remove()


class _Handles:
    """Several handles as one, removed in reverse order."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def add(self, remove: Callable[[], None]) -> None:
        self._stack.callback(remove)

    def remove(self) -> None:
        self._stack.close()


class Steer:
    """Steering: an operator on hidden states, applied by hooks at every token.

    With v the unit vector and d the direction itself, a hidden state h becomes

    * `add`: h + a d
    * `amplify`: h + a (h.v) v (what the official LiReF code does)
    * `ablate`: h - (h.v) v

    Args:
        directions: One direction, or `Directions`, each acting at its own place.
        operator: One of the above.
        strength: a; any finite float for `add` and `amplify`, 1 for `ablate`.
        layers: For a single direction: None for its own layer, `"all"`, or layer indices.

    Raises:
        InterventionError: If an argument is not one of these.
    """

    def __init__(
        self,
        directions: Direction | Directions,
        operator: str,
        strength: float = 1.0,
        *,
        layers: str | Iterable[int] | None = None,
    ) -> None:
        if operator not in OPERATORS:
            raise InterventionError(f"operator {operator!r} is not one of {', '.join(OPERATORS)}")
        if operator == "ablate" and strength != 1:
            raise InterventionError(
                f"ablate takes no strength (got {strength}); amplify with -s removes the share s"
            )
        if not torch.isfinite(torch.tensor(float(strength))):
            raise InterventionError(f"strength {strength} is not a finite number")
        if isinstance(layers, str) and layers != "all":
            raise InterventionError(f"layers {layers!r} is neither None, 'all' nor indices")
        if layers is not None and isinstance(directions, Directions):
            raise InterventionError("layers goes with one direction; Directions have their own")
        self.directions: list[Direction] = (
            [directions] if isinstance(directions, Direction) else list(directions.values())
        )
        self.operator = operator
        self.strength = float(strength)
        self.layers: str | list[int] | None = (
            layers if layers is None or isinstance(layers, str) else sorted(set(layers))
        )

    def places(self, layout: Layout) -> list[tuple[int, str, Direction]]:
        """Where it acts on a model of this layout: (layer, site, direction).

        Raises:
            InterventionError: If a layer or a width does not exist there.
        """
        places = []
        for direction in self.directions:
            layers: Iterable[int] = [direction.layer]
            if isinstance(self.layers, list):
                layers = self.layers
            elif self.layers == "all":
                layers = range(layout.n_layers)
            if direction.vector.shape != (layout.width,):
                raise InterventionError(
                    f"the direction has width {tuple(direction.vector.shape)}, the model "
                    f"{layout.width}"
                )
            if not bool(torch.isfinite(direction.vector).all()):
                raise InterventionError(f"the direction at layer {direction.layer} is not finite")
            for layer in layers:
                if not 0 <= layer < layout.n_layers:
                    raise InterventionError(
                        f"layer {layer} does not exist; the model has 0 to {layout.n_layers - 1}"
                    )
                places.append((layer, direction.site, direction))
        return places

    def attach(self, model: nn.Module) -> Handle:
        """Install the hooks.

        Args:
            model: The model, as given to `lirefs.load` or `lirefs.wrap` (its `.model`).

        Returns:
            A handle whose `remove` takes them off.

        Raises:
            InterventionError: If the direction does not fit the model, or it is no module.
        """
        if not isinstance(model, nn.Module):
            raise InterventionError(
                f"steering needs the model itself, got {type(model).__name__}; give lm.model"
            )
        layout = layout_of(model)
        handles = _Handles()
        places = [
            (*layout.module(model, site, layer), direction)
            for layer, site, direction in self.places(layout)
        ]
        # Strength 0 must leave every bit as it is (h + 0 would turn -0.0 into 0.0): no hook.
        for module, side, direction in places if self.strength != 0 else []:
            change = self._change(direction)
            if side == "input":
                hook = module.register_forward_pre_hook(_on_input(change), with_kwargs=True)
            else:
                # Prepended, so that hooks which record the output see the steered one.
                hook = module.register_forward_hook(_on_output(change), prepend=True)
            handles.add(hook.remove)
        return handles

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model steered inside the `with`, as it was after it."""
        with applied(self, model):
            yield model

    def _change(self, direction: Direction) -> Callable[[Tensor], Tensor]:
        factor = -1.0 if self.operator == "ablate" else self.strength
        ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

        def change(h: Tensor) -> Tensor:
            # Half precision would lose the projection's last bits: it is taken in float32.
            dtype = torch.float32 if h.dtype in (torch.float16, torch.bfloat16) else h.dtype
            if (h.device, dtype) not in ready:
                exact = direction.vector.double()
                vector = factor * exact if self.operator == "add" else exact / exact.norm()
                if not bool(exact.any()):  # a zero direction has no unit vector
                    vector = exact
                ready[h.device, dtype] = vector.to(h.device, dtype)
            vector = ready[h.device, dtype]
            if self.operator == "add":
                return h + vector.to(h.dtype)
            coefficient = (h.to(dtype) @ vector).unsqueeze(-1)
            return torch.addcmul(h.to(dtype), coefficient, vector, value=factor).to(h.dtype)

        return change

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object."""
        return {
            "kind": "steer",
            "operator": self.operator,
            "strength": self.strength,
            "layers": self.layers,
            "directions": [
                {"layer": one.layer, "site": one.site, "norm": one.norm} for one in self.directions
            ],
        }

    def __add__(self, other: Intervention) -> Composition:
        return compose(self, other)

    def __radd__(self, other: Intervention) -> Composition:
        return compose(other, self)


class Composition:
    """Several interventions, attached in order and removed in reverse order."""

    def __init__(self, members: tuple[Intervention, ...]) -> None:
        self.members = members

    def attach(self, model: nn.Module) -> Handle:
        """Attach every member; if one fails, those before it are removed again."""
        handles = _Handles()
        try:
            for member in self.members:
                handles.add(member.attach(model).remove)
        except BaseException:
            handles.remove()
            raise
        return handles

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

    Raises:
        InterventionError: If something is not an intervention.
    """
    members: list[Intervention] = []
    for one in interventions:
        if not isinstance(one, Intervention):
            raise InterventionError(f"{type(one).__name__} is not an intervention")
        members += one.members if isinstance(one, Composition) else [one]
    return Composition(tuple(members))


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return with_hidden_input(args, kwargs, change(hidden_input(args, kwargs)))

    return hook


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return with_hidden(output, change(hidden_of(output)))

    return hook
