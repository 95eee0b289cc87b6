"""Steering written into weights: a new model that needs no hook.

What writes to the residual stream is linear in the weights that write last: the embedding, the
attention's output projection, the MLP's down projection. An affine operator on what one of them
writes is a change of its weight and bias. Adding to the stream is adding to what was written last.
Removing a direction from the stream is removing it from every writer, and nothing less (Arditi et
al. 2024, arXiv 2406.11717, section 4 and appendix E).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lirefs.errors import BakeError
from lirefs.export.writers import (
    Affine,
    change_embedding,
    change_projection,
    make_biases,
    projections,
)
from lirefs.model.guest import evaluating, input_device, maybe_call
from lirefs.model.intervention import Composition, Intervention, applied, refuse_steered
from lirefs.model.layout import SITES, Layout
from lirefs.model.layout_search import find_layout
from lirefs.steering.scope import ALL
from lirefs.steering.steer import Steer


@dataclass
class _Plan:
    """Affine changes of what each writer writes, in order."""

    embedding: list[Affine] = field(default_factory=list)
    attention: dict[int, list[Affine]] = field(default_factory=dict)
    mlp: dict[int, list[Affine]] = field(default_factory=dict)


def bake(intervention: Intervention, model: nn.Module) -> nn.Module:
    """Write a steering into the weights of a copy of the model.

    * `add` at `resid_post` becomes a bias of that layer's down projection, at `resid_pre` of the
      layer before; at `resid_pre` of layer 0 it becomes part of the embedding.
    * Any operator but `norm_preserving_add` at `attn_out` or `mlp_out` changes weight and bias of
      the projection that writes there.
    * `ablate` on the residual stream orthogonalizes every matrix that writes to it. It has to act
      everywhere: `Steer(direction, "ablate", layers="all", sites=("resid_pre", "attn_out",
      "resid_post"))`.

    A bias that the architecture has switched off is switched on in the configuration (others that
    the same switch brings are zero), and a tied unembedding gets a matrix of its own where the
    embedding changes, so that `save_pretrained` and `from_pretrained` give the same model back.
    The result is compared with the hooked model on a short input before it is returned.

    Args:
        intervention: A steering, or a composition of steerings.
        model: The model (`lm.model`); it is copied and left as it was.

    Returns:
        The changed copy, of the same class.

    Raises:
        BakeError: Something cannot be expressed in weights; the message says what and why. Or a
            steering is attached, whose hooks the copy would keep.
        InterventionError: The steering does not fit the model.
    """
    refuse_steered(model, BakeError, "baked")
    members = _steerings(intervention)
    for one in members:
        layout = one.check(model)
    plan = _plan(members, layout)
    baked = copy.deepcopy(model)
    if plan.embedding:
        change_embedding(baked, layout, plan.embedding)
    places = [("attn_out", layer) for layer in plan.attention]
    places += [("mlp_out", layer) for layer in plan.mlp]
    changes = dict(
        zip(
            projections(baked, layout, places),
            [*plan.attention.values(), *plan.mlp.values()],
            strict=True,
        )
    )
    make_biases(baked, [name for name, ops in changes.items() if any(one.shifts for one in ops)])
    for name, ops in changes.items():
        change_projection(baked.get_submodule(name), ops)
    find_layout(baked)
    _verify(intervention, model, baked)
    return baked


def _steerings(intervention: Intervention) -> list[Steer]:
    members = (
        list(intervention.members) if isinstance(intervention, Composition) else [intervention]
    )
    steerings: list[Steer] = []
    for one in members:
        if not isinstance(one, Steer):
            raise BakeError(f"{type(one).__name__} is no steering; only steering can be baked")
        reason = _not_constant(one)
        if reason:
            raise BakeError(f"weights act on every token of every row alike, but {reason}")
        if one.operator == "norm_preserving_add":
            raise BakeError("norm_preserving_add depends on the length of h, so it is no weight")
        steerings.append(one)
    if not steerings:
        raise BakeError("there is nothing to bake")
    return steerings


def _not_constant(steer: Steer) -> str:
    if steer.scope is not ALL:
        return f"the scope is {steer.scope.name!r}"
    if steer.gate is not None:
        return "a gate decides token by token"
    if not isinstance(steer.strength, float | dict):
        return "the strength differs by row or token"
    return ""


def _plan(steerings: list[Steer], layout: Layout) -> _Plan:
    """Move every change to the writer before it, in the order of computation."""
    events: list[tuple[int, int, Affine]] = []
    for steer in steerings:
        for layer, site, direction in steer.places(layout):
            affine = _affine(steer, layer, direction.vector)
            if affine.share or affine.shifts:
                events.append((layer, SITES.index(site), affine))
    events.sort(key=lambda event: event[:2])  # stable: in order of composition at each place
    plan = _Plan()
    for layer, rank, affine in events:
        site = SITES[rank]
        if site == "attn_out":
            plan.attention.setdefault(layer, []).append(affine)
        elif site == "mlp_out":
            plan.mlp.setdefault(layer, []).append(affine)
        elif site == "resid_pre" and layer == 0:
            plan.embedding.append(affine)
        else:
            last = layer if site == "resid_post" else layer - 1
            if affine.share and not _absent(affine.unit, plan, last):
                raise BakeError(
                    f"the operator at layer {layer}, {site} also changes what earlier layers wrote "
                    "to the stream, which no single weight can do; a direction can be ablated "
                    'everywhere, with layers="all" and sites=("resid_pre", "attn_out", '
                    '"resid_post")'
                )
            plan.mlp.setdefault(last, []).append(affine)
    return plan


def _affine(steer: Steer, layer: int, vector: Tensor) -> Affine:
    exact = vector.detach().double().cpu()
    norm = exact.norm()
    unit = exact / norm if norm > 0 else exact
    number = steer.strength[layer] if isinstance(steer.strength, dict) else steer.strength
    assert isinstance(number, float)  # _not_constant has seen to it; tells the type checker
    nothing = torch.zeros_like(exact)
    return {
        "add": Affine(unit, 0.0, number * exact),
        "amplify": Affine(unit, number, nothing),
        "ablate": Affine(unit, -1.0, nothing),
        "clamp": Affine(unit, -1.0, number * unit),
        "ablate_then_add": Affine(unit, -1.0, number * exact),
    }[steer.operator]


def _absent(unit: Tensor, plan: _Plan, last: int) -> bool:
    """Whether the stream has nothing along `unit` when the MLP of layer `last` writes to it."""

    def gone(changes: list[Affine]) -> bool:
        removed = False
        for one in changes:
            along = abs(float(one.unit @ unit))
            if one.removes and along > 1 - 1e-9:
                removed = True
            elif abs(float(one.shift @ unit)) > 1e-9 or (one.share and along > 1e-9):
                removed = False
        return removed

    return (
        gone(plan.embedding)
        and all(gone(plan.attention.get(layer, [])) for layer in range(last + 1))
        and all(gone(plan.mlp.get(layer, [])) for layer in range(last))
    )


def _verify(intervention: Intervention, model: nn.Module, baked: nn.Module) -> None:
    """Compare with the hooks on a short input.

    Raises:
        BakeError: They disagree.
    """
    device = input_device(model)
    embedding = maybe_call(model, "get_input_embeddings")
    vocabulary = int(getattr(embedding, "num_embeddings", 8))
    ids = ((torch.arange(16, device=device) * 7 + vocabulary // 2) % vocabulary).view(2, 8)
    with evaluating(model), evaluating(baked):
        with applied(intervention, model):
            expected = model(input_ids=ids).logits
        found = baked(input_ids=ids).logits
    rounding = max(1e-4, 8 * torch.finfo(found.dtype).eps)
    gap = float((found.float() - expected.float()).abs().max())
    scale = max(1.0, float(expected.float().abs().max()))
    if not gap <= rounding * scale:
        raise BakeError(
            f"the baked model differs from the hooked one by {gap:.2g} in the logits: something "
            "stands between the weights and the residual stream of this architecture"
        )
