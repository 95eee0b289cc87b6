"""Steering: operators on hidden states, by hooks that leave no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lirefs.directions.direction import Direction, must_be_finite
from lirefs.directions.directions import Directions
from lirefs.errors import InterventionError, ProvenanceError, ScopeError
from lirefs.model.fingerprint import is_model
from lirefs.model.guest import text_config
from lirefs.model.intervention import (
    Composition,
    Handle,
    Intervention,
    UndoStack,
    applied,
    compose,
    must_be_module,
    reserve,
    steerings_of,
)
from lirefs.model.layout import SITES, Layout, indices
from lirefs.model.layout_search import layout_of
from lirefs.steering.gate import Gate
from lirefs.steering.hook_chain import change_at
from lirefs.steering.operators import IDLE_AT_ZERO, OPERATORS, Operator
from lirefs.steering.scope import ALL, Scope, as_scope
from lirefs.steering.strength import RowStrengths, Schedule, Strength, as_strength
from lirefs.steering.token_mask import TokenMask
from lirefs.steering.tracker import refuse_empty, tracker_of


class Steer:
    """Steering: an operator on hidden states, applied by hooks where the scope says.

    With v the unit vector and d the direction itself, a hidden state h becomes

    * `add`: h + a d
    * `amplify`: h + a (h.v) v (what the official LiReF code does)
    * `ablate`: h - (h.v) v (Arditi et al. 2024, arXiv 2406.11717, section 2.4)
    * `clamp`: h + (a - h.v) v, so that h.v = a
    * `norm_preserving_add`: h + a d, scaled to the length of h
    * `ablate_then_add`: h - (h.v) v + a d, so that h.v = a |d|

    Args:
        directions: One direction, or `Directions`, each acting at its own place.
        operator: One of the above.
        strength: a: a finite number; a mapping from layer to number; a list or tensor with one
            entry for each prompt of the batch (None: leave it as it is); a `Schedule`, or a
            function from the index of a generated token to a number. `ablate` takes none but 1.
        layers: For a single direction: None for its own layer, `"all"`, or layer indices.
        sites: Sites at each of these layers; None for the direction's own.
        scope: Which tokens: `"all"`, `"prompt"`, `"generated"`, `"last_prompt_token"`, or what a
            function of `lirefs.steering.scope` gives.
        gate: A condition on top of the scope, decided by a probe for each token or row.
        any_model: Whether to steer a model other than the one that the directions were fitted on
            (another dtype or edited weights, say).

    Raises:
        InterventionError: If an argument is not one of these, or a direction or a strength is not
            finite.
        SettingError: If `layers` are no indices.
        ScopeError: If there is no such scope.
    """

    def __init__(
        self,
        directions: Direction | Directions,
        operator: str,
        strength: Strength = 1.0,
        *,
        layers: str | Iterable[int] | None = None,
        sites: Sequence[str] | None = None,
        scope: Scope | str = "all",
        gate: Gate | None = None,
        any_model: bool = False,
    ) -> None:
        if operator not in OPERATORS:
            raise InterventionError(f"operator {operator!r} is not one of {', '.join(OPERATORS)}")
        self.strength = as_strength(strength)
        if operator == "ablate" and not _only_ones(self.strength):
            raise InterventionError(
                f"ablate takes no strength (got {strength}); amplify with -s removes the share s"
            )
        if isinstance(layers, str) and layers != "all":
            raise InterventionError(f"layers {layers!r} is neither None, 'all' nor indices")
        if isinstance(directions, Directions) and (layers is not None or sites is not None):
            raise InterventionError(
                "layers and sites go with one direction; Directions have their own"
            )
        if gate is not None and not isinstance(gate, Gate):
            raise InterventionError(
                f"gate needs lirefs.Gate, which holds the direction of a probe; got "
                f"{type(gate).__name__}"
            )
        self.directions: list[Direction] = (
            [directions] if isinstance(directions, Direction) else list(directions.values())
        )
        if not self.directions:
            raise InterventionError("there is no direction to steer with")
        for one in self.directions:
            must_be_finite(one)
        self.operator = operator
        self.layers: str | list[int] | None = (
            layers if layers is None or isinstance(layers, str) else sorted(set(indices(layers)))
        )
        self.sites = None if sites is None else tuple(sites)
        if self.layers == [] or self.sites == ():
            raise InterventionError("layers or sites are empty: there is no place to steer")
        self.scope = as_scope(scope)
        self.gate = gate
        self.any_model = any_model

    def places(self, layout: Layout) -> list[tuple[int, str, Direction]]:
        """Where it acts on a model of this layout: (layer, site, direction).

        Args:
            layout: From `LanguageModel.layout`.

        Returns:
            One entry for each place, layers ascending for each direction.

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
            _check_direction(direction, layout)
            for layer in layers:
                _check_layer(layer, layout)
                if isinstance(self.strength, dict) and layer not in self.strength:
                    raise InterventionError(f"there is no strength for layer {layer}")
                places += [(layer, site, direction) for site in self.sites or (direction.site,)]
        return places

    def check(self, model: nn.Module) -> Layout:
        """Raise what `attach` would raise; change nothing.

        Args:
            model: The bare model, `lm.model`.

        Returns:
            The layout of the model.

        Raises:
            InterventionError: If something does not fit the model, or it is no module.
            LayoutError: If the architecture lacks a site.
            ProvenanceError: If a direction was fitted on another model.
            ScopeError: The scope begins past the model's last position.
        """
        must_be_module(model)
        layout = layout_of(model)
        places = self.places(layout)
        for layer, site, _ in places:
            layout.module(model, site, layer)
        limit = getattr(text_config(model), "max_position_embeddings", None)
        if isinstance(limit, int) and self.scope.first >= limit:
            raise ScopeError(
                f"position {self.scope.first} is past the end: the model has {limit} positions"
            )
        if self.gate is not None:
            gate = self.gate.direction
            _check_direction(gate, layout)
            _check_layer(gate.layer, layout)
            layout.module(model, gate.site, gate.layer)
            first = min((layer, SITES.index(site)) for layer, site, _ in places)
            if (gate.layer, SITES.index(gate.site)) > first:
                raise InterventionError(
                    f"the gate reads layer {gate.layer}, {gate.site}, which comes after the "
                    f"first place that is steered (layer {first[0]}, {SITES[first[1]]})"
                )
        if not self.any_model:
            used = [*self.directions, *([self.gate.direction] if self.gate else [])]
            for made_on in {one.model for one in used if one.model}:
                if not is_model(model, made_on):
                    raise ProvenanceError(
                        f"the direction was fitted on another model ({made_on[:12]}); "
                        "any_model=True steers this one all the same"
                    )
        return layout

    def attach(self, model: nn.Module) -> Handle:
        """Install the hooks.

        Args:
            model: The model, as given to `lirefs.load` or `lirefs.wrap` (its `.model`).

        Returns:
            A handle whose `remove` takes them off.

        Raises:
            InterventionError: If the direction does not fit the model, it is no module, or another
                thread has changed it and not yet restored it.
            LayoutError: If the architecture lacks a site.
            ProvenanceError: If a direction was fitted on another model.
        """
        with UndoStack() as steps:
            steps.add(reserve(model))
            steps.add(self.attach_checked(model, self.check(model)).remove)
            return steps

    def attach_checked(self, model: nn.Module, layout: Layout) -> Handle:
        """Install the hooks on a model for which `check` returned this layout.

        Args:
            model: The bare model.
            layout: What `check` returned for it.

        Returns:
            As `attach`.
        """
        with UndoStack() as steps:
            steps.add(reserve(model))
            steerings = steerings_of(model)
            steerings.append(self)
            steps.add(lambda: steerings.remove(self))
            self._install(model, layout, steps)
            return steps

    def _install(self, model: nn.Module, layout: Layout, steps: UndoStack) -> None:
        varying = self.strength if isinstance(self.strength, RowStrengths | Schedule) else None
        choice: TokenMask | None = None
        if self.scope is not ALL or varying is not None or self.gate is not None:
            choice = TokenMask(self.scope, varying, self.gate)
            steps.add(tracker_of(model, layout).listen(choice.prepare))
            if self.gate is not None:
                gate = self.gate.direction
                steps.add(change_at(*layout.module(model, gate.site, gate.layer), choice.read_gate))
        else:
            steps.add(refuse_empty(model, layout))
        for layer, site, direction in self.places(layout):
            number = self._number(layer)
            # Strength 0 must leave every bit as it is (h + 0 would turn -0.0 into 0.0): no hook.
            if varying is None and number == 0 and self.operator in IDLE_AT_ZERO:
                continue
            operator = Operator(self.operator, direction.vector, number)
            change = operator if choice is None else choice(operator)
            steps.add(change_at(*layout.module(model, site, layer), change))

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model steered inside the `with`, as it was after it.

        Args:
            model: The bare model, `lm.model`.

        Yields:
            The model.

        Raises:
            InterventionError: As `attach`, as are the others.
        """
        with applied(self, model):
            yield model

    def _number(self, layer: int) -> float:
        if isinstance(self.strength, dict):
            return self.strength[layer]
        return self.strength if isinstance(self.strength, float) else 1.0

    def describe(self) -> dict[str, Any]:
        """What it is, as a JSON object.

        Returns:
            JSON values: operator, strength, layers, sites, scope, gate, and the place, norm and
            digest of each direction.
        """
        strength: Any = self.strength
        if isinstance(strength, RowStrengths | Schedule):
            strength = strength.describe()
        elif isinstance(strength, dict):
            strength = {"layers": {str(layer): value for layer, value in strength.items()}}
        return {
            "kind": "steer",
            "operator": self.operator,
            "strength": strength,
            "layers": self.layers,
            "sites": self.sites,
            "scope": self.scope.describe(),
            "gate": None if self.gate is None else self.gate.describe(),
            "directions": [
                {"layer": one.layer, "site": one.site, "norm": one.norm, "digest": one.digest}
                for one in self.directions
            ],
        }

    def __str__(self) -> str:
        layers = self.layers or sorted({one.layer for one in self.directions})
        return f"{self.operator} at layers {layers}, scope {self.scope.name!r}"

    def __add__(self, other: Intervention) -> Composition:
        return compose(self, other)

    def __radd__(self, other: Intervention) -> Composition:
        return compose(other, self)


def _only_ones(strength: float | dict[int, float] | RowStrengths | Schedule) -> bool:
    if isinstance(strength, RowStrengths):
        return all(value in (None, 1.0) for value in strength.values)
    return strength == 1.0


def _check_direction(direction: Direction, layout: Layout) -> None:
    if direction.vector.shape != (layout.width,):
        raise InterventionError(
            f"the direction has width {tuple(direction.vector.shape)}, the model {layout.width}"
        )


def _check_layer(layer: int, layout: Layout) -> None:
    if not 0 <= layer < layout.n_layers:
        raise InterventionError(
            f"layer {layer} does not exist; the model has 0 to {layout.n_layers - 1}"
        )
