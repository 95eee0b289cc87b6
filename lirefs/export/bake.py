"""Steering written into weights: a new model that needs no hooks.

The embedding, the attention's output projection and the MLP's down projection write to the residual
stream last, and linearly in their weights, so an affine operator on what one of them writes is a
change of weight and bias. To add to the stream, add to what was written last; to remove a direction
from it, remove it from every writer (Arditi et al. 2024, arXiv 2406.11717, section 4, appendix E).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lirefs.errors import BakeError
from lirefs.export.as_llama import as_llama, is_llama_inside
from lirefs.export.baked_weights import (
    add_biases,
    bake_embedding,
    bake_writer,
    bias_switches,
    embeddings,
    must_be_dense,
    shift_of,
    writers,
)
from lirefs.export.operators import varies_by
from lirefs.export.runtimes import RUNTIMES
from lirefs.model.guest import evaluating
from lirefs.model.intervention import (
    Intervention,
    applied,
    compose,
    must_be_module,
    refuse_steered,
)
from lirefs.model.layout import SITES, Layout
from lirefs.model.layout_search import find_layout
from lirefs.model.observe import sample_ids
from lirefs.steering.operators import Operator
from lirefs.steering.steer import Steer

Plan = dict[tuple[int, str], list[Operator]]
"""What happens, in order, to what each writer writes; it goes by the (layer, site) it writes to."""
EMBEDDING = (-1, "mlp_out")
"""What layer 0 reads, which no earlier MLP has written."""


def bake(intervention: Intervention, model: nn.Module) -> nn.Module:
    """Write a steering into the weights of a copy of the model.

    * `add` at `resid_post` becomes a bias of that layer's down projection, at `resid_pre` of the
      layer before; at `resid_pre` of layer 0 it becomes part of the embedding.
    * Any operator but `norm_preserving_add` at `attn_out` or `mlp_out` changes weight and bias of
      the projection that writes there.
    * `ablate` on the residual stream orthogonalizes every matrix that writes to it, those of all
      experts among them. It has to act everywhere: `Steer(direction, "ablate", layers="all",
      sites=("resid_pre", "attn_out", "resid_post"))`.

    Missing biases are switched on in the configuration (all others that this switches on are zero;
    Mistral and Qwen2 without a window have no such setting, and become the Llama that computes the
    same), and a tied unembedding gets a matrix of its own where the embedding changes, so that
    `save_pretrained` and `from_pretrained` give the same model back. Before the copy is returned,
    it is compared with the hooked model on a short input.

    Args:
        intervention: A steering, or a composition of steerings.
        model: The model (`lm.model`); it is copied, and left as it was.

    Returns:
        The changed copy, of the same class, or a `LlamaForCausalLM` (see above).

    Raises:
        BakeError: Weights cannot express something; the message says what and why. Or a steering
            is attached, whose hooks the copy would keep.
        InterventionError: The steering does not fit the model.
    """
    try:
        make = prepared(intervention, model)
    except BakeError as problem:
        raise BakeError(f"{problem}{_elsewhere(intervention, model)}") from None
    baked = make()
    find_layout(baked)
    _verify(intervention, model, baked)
    return baked


def prepared(intervention: Intervention, model: nn.Module) -> Callable[[], nn.Module]:
    """A function that makes the changed copy; all that can be asked before is asked here.

    Raises:
        BakeError: As `bake`.
        InterventionError: The steering does not fit the model.
    """
    must_be_module(model)
    refuse_steered(model, BakeError, "baked")
    must_be_dense(model)
    steerings = _steerings(intervention)
    for steer in steerings:
        layout = steer.check(model)
    plan = _plan(steerings, layout)
    first = plan.pop(EMBEDDING, [])
    names, scale = embeddings(model, layout) if first else ({}, 1.0)
    changes = list(zip(writers(model, layout, list(plan)), plan.values(), strict=True))
    shifted = [them for them, ops in changes if any(shift_of(one).any() for one in ops)]
    renamed = is_llama_inside(model) and not all(
        writer.has_bias(model) for them in shifted for writer in them
    )
    switches = {} if renamed else bias_switches(model, shifted)

    def make() -> nn.Module:
        baked = as_llama(model) if renamed else copy.deepcopy(model)
        bake_embedding(baked, list(names), scale, first)
        add_biases(baked, switches)
        for them, ops in changes:
            for writer in them:
                bake_writer(baked, writer, ops)
        return baked

    return make


def _elsewhere(intervention: Intervention, model: nn.Module) -> str:
    """Which other runtimes carry the steerings, as the end of a message."""
    members = compose(intervention).members
    steerings = [one for one in members if isinstance(one, Steer)]
    if len(steerings) < len(members) or not isinstance(model, nn.Module):
        return ""
    able = [one.name for one in RUNTIMES if not any(one.refusal(each, model) for each in steerings)]
    return f"; these can do it: {', '.join(able)} (see lirefs.export.ways)" if able else ""


def _steerings(intervention: Intervention) -> list[Steer]:
    steerings: list[Steer] = []
    for one in compose(intervention).members:
        if not isinstance(one, Steer):
            raise BakeError(f"{type(one).__name__} cannot be baked; only steering can")
        if reason := varies_by(one):
            raise BakeError(f"weights act on every token of every row alike, but {reason}")
        if one.operator == "norm_preserving_add":
            raise BakeError("norm_preserving_add depends on the length of h; no weight can do that")
        steerings.append(one)
    if not steerings:
        raise BakeError("there is nothing to bake")
    return steerings


def _plan(steerings: list[Steer], layout: Layout) -> Plan:
    """Give every change to the writer before it, in the order of computation."""
    places = [place for steer in steerings for place in steer.operators(layout)]
    plan: Plan = {}
    # The sort is stable: at each place, operators keep the order of composition.
    for layer, site, operator in sorted(places, key=lambda one: (one[0], SITES.index(one[1]))):
        writer = (layer, site)
        if site in ("resid_pre", "resid_post"):
            writer = (layer - (site == "resid_pre"), "mlp_out")
            if operator.name != "add" and not _absent(operator.unit.cpu(), plan, writer[0]):
                raise BakeError(
                    f"the operator at layer {layer}, {site} also changes what earlier layers wrote "
                    "to the stream, which no single weight can do; a direction can be ablated "
                    'everywhere, with layers="all" and sites=("resid_pre", "attn_out", '
                    '"resid_post")'
                )
        plan.setdefault(writer, []).append(operator)
    return plan


def _absent(unit: Tensor, plan: Plan, last: int) -> bool:
    """Whether the stream has nothing along `unit` when the MLP of layer `last` writes to it."""

    def removed(operators: list[Operator]) -> bool:
        gone = False
        for one in operators:
            along, shift = abs(float(one.unit.cpu() @ unit)), shift_of(one)
            if one.name not in ("add", "amplify") and not shift.any() and along > 1 - 1e-9:
                gone = True
            elif abs(float(shift @ unit)) > 1e-9 or (one.name != "add" and along > 1e-9):
                gone = False
        return gone

    writers = [(layer, site) for layer in range(last + 1) for site in ("attn_out", "mlp_out")]
    return all(removed(plan.get(writer, [])) for writer in [EMBEDDING, *writers][:-1])


def _verify(intervention: Intervention, model: nn.Module, baked: nn.Module) -> None:
    """Compare with the hooked model on a short input; BakeError if they disagree."""
    ids = sample_ids(model, 2, 8)
    with evaluating(model), evaluating(baked):
        with applied(intervention, model):
            expected = model(input_ids=ids).logits.float()
        found = baked(input_ids=ids).logits
    rounding = max(1e-4, 8 * torch.finfo(found.dtype).eps)
    gap = float((found.float() - expected).abs().max())
    if not gap <= rounding * max(1.0, float(expected.abs().max())):
        raise BakeError(
            f"the baked model differs from the hooked one by {gap:.2g} in the logits: something "
            "stands between the weights and the residual stream of this architecture"
        )
