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
from typing import Any

import torch
from torch import Tensor, nn

from lirefs.errors import BakeError
from lirefs.guest import Seen, evaluating, input_device, maybe_call, observe, text_config
from lirefs.intervention import Composition, Intervention, applied, refuse_steered
from lirefs.layout import SITES, Layout, find_layout
from lirefs.scope import ALL
from lirefs.steering import Steer


@dataclass(frozen=True)
class _Affine:
    """h + share (h.v) v + shift, float64."""

    unit: Tensor
    share: float
    shift: Tensor

    @property
    def removes(self) -> bool:
        return self.share == -1.0 and not bool(self.shift.any())


@dataclass
class _Plan:
    """Affine changes of what each writer writes, in order."""

    embedding: list[_Affine] = field(default_factory=list)
    attention: dict[int, list[_Affine]] = field(default_factory=dict)
    mlp: dict[int, list[_Affine]] = field(default_factory=dict)


def bake(intervention: Intervention, model: nn.Module) -> nn.Module:
    """Write a steering into the weights of a copy of the model.

    * `add` at `resid_post` becomes a bias of that layer's down projection, at `resid_pre` of the
      layer before; at `resid_pre` of layer 0 it becomes part of the embedding.
    * Any operator but `norm_preserving_add` at `attn_out` or `mlp_out` changes weight and bias of
      the projection that writes there.
    * `ablate` on the residual stream orthogonalizes every matrix that writes to it. It has to act
      everywhere: `direction.steer("ablate", layers="all", sites=("resid_pre", "attn_out",
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
    writers = _Writers(baked, layout)
    if plan.embedding:
        writers.change_embedding(plan.embedding)
    projections = writers.projections(
        [("attn_out", layer) for layer in plan.attention]
        + [("mlp_out", layer) for layer in plan.mlp]
    )
    changes = [*plan.attention.values(), *plan.mlp.values()]
    shifted = [
        name
        for name, ops in zip(projections, changes, strict=True)
        if any(bool(one.shift.any()) for one in ops)
    ]
    _make_biases(baked, shifted)
    for name, ops in zip(projections, changes, strict=True):
        _change_projection(baked.get_submodule(name), ops)
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
    events: list[tuple[int, int, _Affine]] = []
    for steer in steerings:
        for layer, site, direction in steer.places(layout):
            affine = _affine(steer, layer, direction.vector)
            if affine.share or bool(affine.shift.any()):
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


def _affine(steer: Steer, layer: int, vector: Tensor) -> _Affine:
    exact = vector.detach().double().cpu()
    norm = exact.norm()
    unit = exact / norm if norm > 0 else exact
    number = steer.strength[layer] if isinstance(steer.strength, dict) else steer.strength
    assert isinstance(number, float)  # _not_constant has seen to it; tells the type checker
    nothing = torch.zeros_like(exact)
    return {
        "add": _Affine(unit, 0.0, number * exact),
        "amplify": _Affine(unit, number, nothing),
        "ablate": _Affine(unit, -1.0, nothing),
        "clamp": _Affine(unit, -1.0, number * unit),
        "ablate_then_add": _Affine(unit, -1.0, number * exact),
    }[steer.operator]


def _absent(unit: Tensor, plan: _Plan, last: int) -> bool:
    """Whether the stream has nothing along `unit` when the MLP of layer `last` writes to it."""

    def gone(changes: list[_Affine]) -> bool:
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


class _Writers:
    """The modules of a model that write to its residual stream."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model: Any = model
        self._layout = layout

    def projections(self, places: list[tuple[str, int]]) -> list[str]:
        """Names of the matrices whose outputs are what is written at these places.

        Raises:
            BakeError: There is no such matrix.
        """
        candidates: dict[str, list[str]] = {}
        watched: dict[str, nn.Module] = {}
        for site, layer in places:
            part = self._layout.attention if site == "attn_out" else self._layout.mlp
            top = f"{self._layout.blocks}.{layer}.{part}"
            module = self._model.get_submodule(top) if part else None
            if module is None:
                raise BakeError(f"no module of this architecture writes {site}")
            inside = [
                f"{top}.{name}" if name else top
                for name, one in module.named_modules()
                if _is_matrix(one)
            ]
            candidates[top] = inside
            watched[top] = module
            watched |= {name: self._model.get_submodule(name) for name in inside}
        if not watched:
            return []
        seen = observe(self._model, watched)
        found = []
        for (site, layer), (top, inside) in zip(places, candidates.items(), strict=True):
            fitting = [name for name in inside if _equal(seen[name], seen[top])]
            if not fitting:
                raise BakeError(
                    f"{site} of layer {layer} is not written by one matrix but by "
                    f"{type(watched[top]).__name__} (a norm or experts stand behind it), so there "
                    "is no weight that holds the change"
                )
            found.append(fitting[-1])
        return found

    def change_embedding(self, changes: list[_Affine]) -> None:
        """Change what layer 0 reads.

        Raises:
            BakeError: It is not the sum of embeddings.
        """
        names = [
            name
            for name, module in self._model.named_modules()
            if isinstance(module, nn.Embedding)
            and not name.startswith(f"{self._layout.blocks}.")
            and module.weight.shape[1] == self._layout.width
        ]
        token = maybe_call(self._model, "get_input_embeddings")
        if not isinstance(token, nn.Embedding):
            raise BakeError("the model does not say which module is its token embedding")
        self._untie(token)
        for name in names:
            module: Any = self._model.get_submodule(name)
            with torch.no_grad():
                weight = module.weight.double()
                for one in changes:
                    unit, shift = one.unit.to(weight.device), one.shift.to(weight.device)
                    weight = weight + one.share * (weight @ unit)[:, None] * unit
                    if module is token:  # position embeddings are added to it: once is enough
                        weight = weight + shift
                module.weight.copy_(weight.to(module.weight.dtype))

    def _untie(self, token: nn.Embedding) -> None:
        """Give the unembedding a matrix of its own: it reads another space, behind the norm."""
        head = maybe_call(self._model, "get_output_embeddings")
        if head is None or head.weight is not token.weight:
            return
        head.weight = nn.Parameter(token.weight.detach().clone(), token.weight.requires_grad)
        for config in {id(c): c for c in (self._model.config, text_config(self._model))}.values():
            config.tie_word_embeddings = False
        # transformers lists the tied names when a model is built, and leaves them out of files.
        if hasattr(self._model, "all_tied_weights_keys"):
            self._model.all_tied_weights_keys = {}


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return named and isinstance(weight, Tensor) and weight.is_floating_point()


def _equal(one: Seen, other: Seen) -> bool:
    if one.output is None or other.output is None or one.output.numel() != other.output.numel():
        return False
    return torch.equal(one.output.reshape(-1), other.output.reshape(-1))


def _change_projection(module: nn.Module, changes: list[_Affine]) -> None:
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
    parameter: Any = module.weight
    bias: Any = module.bias
    with torch.no_grad():
        weight = parameter.double().T if transposed else parameter.double()
        offset = None if bias is None else bias.double()
        for one in changes:
            unit, shift = one.unit.to(weight.device), one.shift.to(weight.device)
            weight = weight + one.share * torch.outer(unit, unit @ weight)
            if offset is not None:
                offset = offset + one.share * (offset @ unit) * unit + shift
        parameter.copy_((weight.T if transposed else weight).to(parameter.dtype))
        if offset is not None:
            bias.copy_(offset.to(bias.dtype))


def _make_biases(model: Any, names: list[str]) -> None:
    """Switch biases on in the configuration, zero, so that a plain load finds them again."""
    missing = [name for name in names if model.get_submodule(name).bias is None]
    if not missing:
        return
    present = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    config = text_config(model)
    switches = [
        key
        for key, value in (config.to_dict() if config is not None else {}).items()
        if value is False and "bias" in key
    ]
    for switch in switches:
        trial = copy.deepcopy(model.config)
        setattr(trial.get_text_config(), switch, True)
        try:
            with torch.device("meta"):
                empty = type(model)(trial)
        except Exception:  # a configuration that its own class refuses is no way either
            continue
        there = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
        extra = there - present
        if not all(name.endswith(".bias") for name in extra) or present - there:
            continue
        if not any(f"{name}.bias" in extra for name in missing):
            continue
        setattr(config, switch, True)
        for name in extra:
            module = model.get_submodule(name.removesuffix(".bias"))
            out = empty.get_parameter(name).shape
            zeros = torch.zeros(out, dtype=module.weight.dtype, device=module.weight.device)
            module.bias = nn.Parameter(zeros, module.weight.requires_grad)
            present.add(name)
        missing = [name for name in missing if f"{name}.bias" not in present]
    if missing:
        raise BakeError(
            f"{type(model).__name__} has no bias at {missing[0]} and no setting that gives it one, "
            "so a plain load could not hold what is added there"
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
