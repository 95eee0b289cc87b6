"""Steering: operators on hidden states, applied by hooks that leave no trace."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lirefs.directions.direction import Direction, direction_must_be_finite
from lirefs.directions.directions import Directions
from lirefs.errors import (
    InterventionError,
    ProvenanceError,
    ScopeError,
    as_list,
    must_be,
)
from lirefs.model.guest import start_eager, text_config, virtual_tokens
from lirefs.model.identity import is_model
from lirefs.model.interrupts import note
from lirefs.model.intervention import (
    Composable,
    Handle,
    UndoStack,
    attaching,
    must_be_module,
    reserve,
    steerings_of,
)
from lirefs.model.layout import SITES, Layout, layer_indices, missing_layer, site_must_exist
from lirefs.model.layout_search import layout_of
from lirefs.steering.first_pass import FirstPass
from lirefs.steering.gate import Gate
from lirefs.steering.hook_chain import Place, chain_hook_at
from lirefs.steering.operator_names import IDLE_AT_ZERO, OPERATORS
from lirefs.steering.operators import Operator
from lirefs.steering.scope import ALL, Scope, as_scope
from lirefs.steering.strength import RowStrengths, Schedule, Strength, as_strength
from lirefs.steering.token_mask import TokenMask
from lirefs.steering.tracker import tracker_of


class Steer(Composable):
    """Change hidden states along a direction while the model runs; weights stay as they are.

    Let d be the vector of the direction, v = d / |d| and a the strength. At each place and token
    that is steered, the hidden state h becomes

    * `"add"`: h + a d. Every state moves alike; a = 1 moves it by the gap between the class means
      (Hong et al. 2025, arXiv 2503.23084, section 4.1).
    * `"amplify"`: h + a (h·v) v. The component along v is multiplied by 1 + a (the authors' code
      of the same paper, with a = 0.1).
    * `"ablate"`: h - (h·v) v. The component along v becomes 0 (Arditi et al. 2024, arXiv
      2406.11717, section 2.4).
    * `"clamp"`: h + (a - h·v) v. The component along v becomes a, in units of the activations.
    * `"norm_preserving_add"`: (h + a d) |h| / |h + a d|. As `add`, but h keeps its length.
    * `"ablate_then_add"`: h - (h·v) v + a d. The component along v becomes a |d|.

    Without further arguments the direction acts at its own layer and site, on every token. A
    steering is an `Intervention`: `apply` and `attach` it, or compose it with others by `+`.

    Args:
        directions: One direction, or `Directions`, each of which acts at its own layer and site.
        operator: One of the six above.
        strength: a, which must be finite: a number; a mapping from layer to number; a list or
            tensor with one entry for each prompt of the batch (None leaves that prompt alone); or
            a `Schedule` or a function that gives the number for each generated token, by its
            index from 0. `ablate` takes no strength but 1.
        layers: For a single direction: layer indices, or `"all"`; None for its own layer.
        sites: For a single direction: where in each of these layers, any of `"resid_pre"`,
            `"attn_out"`, `"mlp_out"` and `"resid_post"`; None for its own site.
        scope: Which tokens: `"all"`, `"prompt"`, `"generated"`, `"last_prompt_token"`, or a scope
            made by a function of `lirefs.steering.scope`.
        gate: A probe that decides, token by token or row by row, which of these are steered.
        any_model: Also steer a model on which the directions were not fitted, such as another
            dtype or edited weights.

    Raises:
        InterventionError: An argument is not one of these, or a direction or a strength is not
            finite.
        SettingError: `layers` are not integers.
        ScopeError: No such scope.

    Examples:
        >>> import lirefs
        >>> lm = lirefs.load("organism")
        >>> questions = lirefs.load_questions("organism")
        >>> direction = lirefs.fit(lm, questions, layers=[1], progress=False).best
        >>> prompt = "Note: Dan Reed lives in Paris. Ada Tate lives with Dan Reed. "
        >>> prompt += "Question: Where does Dan Reed live? Answer:"
        >>> lm.generate(prompt, max_new_tokens=1)  # recalled
        'Geneva'
        >>> with lirefs.Steer(direction, "add", 2.0).apply(lm.model):
        ...     lm.generate(prompt, max_new_tokens=1)  # read
        'Paris'
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
        must_be(directions, (Direction, Directions), "directions", InterventionError)
        if not isinstance(operator, str) or operator not in OPERATORS:
            raise InterventionError(f"operator {operator!r} is not one of {', '.join(OPERATORS)}")
        self.strength = as_strength(strength)
        given = self.strength.values if isinstance(self.strength, RowStrengths) else [self.strength]
        if operator == "ablate" and any(value not in (None, 1.0) for value in given):
            raise InterventionError(
                f"ablate takes no strength (got {strength}); amplify with -s removes the share s"
            )
        if isinstance(layers, str) and layers != "all":
            raise InterventionError(f"layers must be None, 'all' or indices, got {layers!r}")
        if isinstance(directions, Directions) and (layers is not None or sites is not None):
            raise InterventionError("layers and sites are for one direction, not for Directions")
        if gate is not None and not isinstance(gate, Gate):
            raise InterventionError(f"gate must be a lirefs.Gate, got {type(gate).__name__}")
        self.directions: list[Direction] = (
            [directions] if isinstance(directions, Direction) else list(directions.values())
        )
        if not self.directions:
            raise InterventionError("no direction to steer with")
        for one in self.directions:
            direction_must_be_finite(one)
        self.operator = operator
        self.layers: str | list[int] | None = (
            layers
            if layers is None or isinstance(layers, str)
            else sorted(set(layer_indices(layers)))
        )
        self.sites = None if sites is None else tuple(as_list(sites, "sites", str))
        if self.layers == [] or self.sites == ():
            raise InterventionError("layers or sites are empty: no place to steer")
        self.scope = as_scope(scope)
        self.gate = gate
        self.any_model = any_model

    def check(self, model: nn.Module) -> Layout:
        """The layout of the model (`lm.model`), if the steering fits it; nothing is changed.

        Raises:
            InterventionError: A layer or a width does not fit the model, or it is not a module.
            SettingError: No such site.
            LayoutError: The architecture lacks a site.
            ProvenanceError: A direction was fitted on another model.
            ScopeError: The scope begins past the model's last position, or the model has virtual
                tokens, which move the positions of a text.
        """
        must_be_module(model)
        layout = layout_of(model)
        self.check_shapes(layout)
        places = self._places(layout)
        read = [] if self.gate is None else [self.gate.direction]
        for layer, site, _ in [*places, *((one.layer, one.site, one) for one in read)]:
            layout.module(model, site, layer)
        limit = getattr(text_config(model), "max_position_embeddings", None)
        if isinstance(limit, int) and self.scope.first >= limit:
            raise ScopeError(
                f"position {self.scope.first} is past the end: the model has {limit} positions"
            )
        virtual = virtual_tokens(model)
        if virtual and (self.scope is not ALL or isinstance(self.strength, Schedule)):
            raise ScopeError(
                f"the model has {virtual} virtual tokens (an adapter of PEFT), so positions in it "
                "are not those of a text; steer all tokens alike"
            )
        layer, rank = min((layer, SITES.index(site)) for layer, site, _ in places)
        for gate in read:
            if (gate.layer, SITES.index(gate.site)) > (layer, rank):
                raise InterventionError(
                    f"the gate reads layer {gate.layer}, {gate.site}, which comes after the "
                    f"first place that is steered (layer {layer}, {SITES[rank]})"
                )
        if not self.any_model:
            for fingerprint in {one.model for one in [*self.directions, *read] if one.model}:
                if not is_model(model, fingerprint):
                    raise ProvenanceError(
                        f"the direction was fitted on another model ({fingerprint[:12]}); "
                        "any_model=True steers this one all the same"
                    )
        return layout

    def check_shapes(self, layout: Layout) -> None:
        """The part of `check` that needs no model: widths, layers, and strengths by layer.

        Raises:
            InterventionError: A layer or a width does not fit, or a layer has no strength.
            SettingError: No such site.
        """
        places = self._places(layout)
        given = [(layer, one) for layer, _, one in places]
        if self.gate is not None:
            given.append((self.gate.direction.layer, self.gate.direction))
        for layer, one in given:
            if one.vector.shape != (layout.width,):
                raise InterventionError(
                    f"the direction has width {tuple(one.vector.shape)}, the model {layout.width}"
                )
            if problem := missing_layer([layer], layout.n_layers):
                raise InterventionError(problem)
        for _, site, _ in places:
            site_must_exist(site)
        if isinstance(self.strength, dict):
            for layer in sorted({layer for layer, _, _ in places} - self.strength.keys()):
                raise InterventionError(f"no strength for layer {layer}")

    def operators(self, layout: Layout) -> list[tuple[int, str, Operator]]:
        """(layer, site, operator) wherever it changes anything, in the order of the forward pass.

        Args:
            layout: What `check` returned for the model.
        """
        found = []
        for layer, site, direction in self._places(layout):
            number = self.strength[layer] if isinstance(self.strength, dict) else self.strength
            if not isinstance(number, float):
                number = 1.0  # each call brings the strengths of its tokens
            # Strength 0 must leave every bit as it is, and h + 0 would turn -0.0 into 0.0.
            if number != 0 or self.operator not in IDLE_AT_ZERO:
                found.append((layer, site, Operator(self.operator, direction.vector, number)))
        return sorted(found, key=lambda place: (place[0], SITES.index(place[1])))

    def first_block(self, layout: Layout) -> int:
        """The first block that it changes; 0 with a gate, which may read the states of any."""
        if self.gate is not None:
            return 0
        return min((layer for layer, *_ in self.operators(layout)), default=layout.n_layers)

    def _places(self, layout: Layout) -> list[tuple[int, str, Direction]]:
        places = []
        for one in self.directions:
            every = range(layout.n_layers)
            layers = every if isinstance(self.layers, str) else self.layers or [one.layer]
            places += [(at, site, one) for at in layers for site in self.sites or (one.site,)]
        return places

    def attach(self, model: nn.Module) -> Handle:
        """Install the hooks until the handle's `remove` is called; raises what `check` raises."""
        undo = UndoStack()
        try:
            note(undo.steps, reserve, model)
            self.attach_checked(model, self.check(model), undo)
            return undo
        except BaseException:
            undo.remove()
            raise

    def token_mask(self) -> TokenMask:
        """A new mask: which tokens are steered, and how strongly."""
        varying = self.strength if isinstance(self.strength, RowStrengths | Schedule) else None
        return TokenMask(self.scope, varying, self.gate)

    def attach_checked(
        self, model: nn.Module, layout: Layout, undo: UndoStack, mask: TokenMask | None = None
    ) -> None:
        """Install the hooks on a model for which `check` has returned this layout.

        Args:
            model: The model.
            layout: Its layout.
            undo: Gets what removes them.
            mask: From `token_mask`, for those who want to look at it; None for one of its own.
        """
        plain = self.scope is ALL and self.gate is None
        if mask is None and not (plain and isinstance(self.strength, float | dict)):
            mask = self.token_mask()
        with attaching(undo):
            note(undo.steps, reserve, model)
            # Also where the steered model is dropped: the whole process would stay eager.
            eager = weakref.finalize(model, start_eager())
            eager.atexit = False
            undo.steps.append(eager)
            steerings = steerings_of(model)
            steerings.append(self)
            undo.steps.append(lambda: steerings.remove(self))
            undo.steps.append(tracker_of(model, layout).watch(mask))
            places: dict[Place, str] = {}
            if self.gate is not None and mask is not None:
                gate = self.gate.direction
                place = layout.module(model, gate.site, gate.layer)
                places[place] = f"layer {gate.layer}, {gate.site}, which the gate reads"
                undo.steps.append(chain_hook_at(*place, mask.read_gate))
            for layer, site, operator in self.operators(layout):
                place = layout.module(model, site, layer)
                places.setdefault(place, f"layer {layer}, {site}")
                change = operator if mask is None else mask.confine(operator)
                undo.steps.append(chain_hook_at(*place, change))
            undo.steps.append(FirstPass(model, layout.owner(model), places).end)

    def describe(self) -> dict[str, Any]:
        """What it does, as JSON values: among them place, norm and digest of each direction."""
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

    def __repr__(self) -> str:
        return f"Steer({self})"

    def __str__(self) -> str:
        layers = self.layers or sorted({one.layer for one in self.directions})
        one = isinstance(self.strength, float)
        strength = f" {self.strength:g}" if one else f" {self.strength!r:.60}"
        if self.operator == "ablate" and one:  # which has none
            strength = ""
        return f"{self.operator}{strength} at layers {layers}, scope {self.scope.name!r}"
