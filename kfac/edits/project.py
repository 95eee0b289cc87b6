"""Write where it is flat: weight updates projected onto the pairs that an edit would remove.

An update along flat pairs changes the loss least, to second order: ΔW costs ½ tr(G ΔW A ΔWᵀ), half
the sum over pairs of mass times squared coordinate (CrispEdit: Ikram et al. 2026,
arXiv 2602.15823). The projector acts on out·in numbers and is never formed: an update is rotated
into the eigenbases, the staircase of pairs is blanked out, and it is rotated back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kfac.edits.baselines import RandomPairsEdit
from kfac.edits.selection import Selection
from kfac.edits.spectral import CurvatureEdit
from kfac.factors.factors import Factors
from kfac.target import Target
from lirefs.errors import EditError, checked_seed, must_be
from lirefs.model.guest import full_precision, widened, without_gradients
from lirefs.model.interrupts import interrupts_held, undone
from lirefs.model.training.copies import must_be_whole

Update = Tensor | tuple[Tensor, Tensor]
"""ΔW (out, in), or a LoRA pair B (out, rank), A (rank, in) that stands for B A."""

_ONTO = ("flat", "sharp", "random")


def project(
    factors: Factors,
    keep: float | Mapping[str, float],
    update: Mapping[str, Update],
    *,
    onto: str = "flat",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Project an update of weights onto the flat pairs of their factors, or onto the sharp ones.

    The two add up to the update, and are orthogonal to each other.

    Args:
        factors: Factors of the model before the update.
        keep: Fraction of the curvature mass that the sharp pairs hold, in (0, 1]; or one for each
            target name. `CurvatureEdit` at this `keep` removes the flat pairs.
        update: ΔW of each target name, any floating dtype: a tensor (out, in), transposed for a
            GPT-2 style Conv1D; or a LoRA pair (B, A) with its scale multiplied in.
        onto: "flat"; "sharp"; or "random", the control: as many pairs as there are flat ones, drawn
            uniformly.
        seed: Seed of the random pairs.

    Returns:
        The projected update of each name, (out, in), on the device of the update, float32 (float64
        for a float64 update). That of a LoRA pair is not of low rank any more.

    Raises:
        KeepError: `keep` is out of range, empty, or names an unknown target.
        EditError: `onto` is unknown, a target has no curvature mass, or an update has another shape
            than its target or no `keep`.
    """
    projection = _Projection(factors, keep, onto, seed)
    must_be(update, Mapping, "update", EditError)
    return {name: projection(name, _dense(name, one)) for name, one in update.items()}


@contextmanager
def projected_training(
    model: nn.Module,
    factors: Factors,
    keep: float | Mapping[str, float],
    *,
    onto: str = "flat",
    seed: int = 0,
) -> Iterator[None]:
    """Let training change the targets of these factors along flat (or sharp) pairs only.

    Inside the context, the gradient of each target is projected whenever it is accumulated. This
    alone is not enough: AdamW divides each entry by its own scale, Muon orthogonalizes and weight
    decay shrinks the weight, so their steps leave the subspace. So after each step of an optimizer
    that holds a target, and at the end, the target's change since the context was entered is
    projected too. That is exact for any optimizer, and costs a copy of each target and four
    products of its size with the eigenvectors for each step. Optimizers need no change; hooks are
    gone after the context, also after an error, and the trained weights stay.

    Weights that are not among the targets train freely: freeze them if they should not. Train
    float32 weights: in bfloat16 the projected change is rounded. Names and shapes of the factors
    are checked, and not the weights' values, so that a run can be resumed, or train a float32 copy.

    Args:
        model: A model whose targets are parameters of their own (not sharded).
        factors: As in `project`.
        keep: As in `project`; if it names some targets, only these are projected.
        onto: As in `project`.
        seed: As in `project`.

    Raises:
        FactorsMismatchError: A target is missing or has another shape.
        KeepError: As in `project`.
        EditError: As in `project`, or a target is sharded over processes.

    Examples:
        >>> import copy, kfac, lirefs, torch
        >>> from lirefs.organism import Language, training_texts
        >>> lm = lirefs.load("organism")
        >>> texts = training_texts(Language(), 20)
        >>> factors = kfac.collect(lm, texts, layers=[0], progress=False)
        >>> model = copy.deepcopy(lm.model)
        >>> weights = [target.parameter for target in factors.targets(model)]
        >>> optimizer = torch.optim.AdamW(weights, lr=1e-3)
        >>> batch = lm.pad(lm.encode(["Dan Reed lives in Paris."]))
        >>> with kfac.projected_training(model, factors, keep=0.9):
        ...     model(**batch, labels=batch["input_ids"]).loss.backward()
        ...     optimizer.step()
    """
    must_be(model, nn.Module, "model", EditError)
    projection = _Projection(factors, keep, onto, seed)
    targets = factors.targets(model, projection.names)
    must_be_whole(target.parameter for target in targets)
    starts = [target.weight.clone() for target in targets]
    with undone() as steps:

        def project_changes(optimizer: Optimizer | None, *_: Any) -> None:
            groups = [] if optimizer is None else optimizer.param_groups
            stepped = {id(one) for group in groups for one in group["params"]}
            for target, start in zip(targets, starts, strict=True):
                if optimizer is None or id(target.parameter) in stepped:
                    _project_change(target, start, projection)

        with interrupts_held():
            for target in targets:
                register: Any = target.parameter.register_post_accumulate_grad_hook
                handle = register(partial(_project_gradient, target, projection))
                steps.append(handle.remove)
            steps.append(register_optimizer_step_post_hook(project_changes).remove)
        yield
        project_changes(None)


class _Projection:
    """The orthogonal projection of updates of targets onto some of their pairs."""

    def __init__(
        self, factors: Factors, keep: float | Mapping[str, float], onto: str, seed: int
    ) -> None:
        checked_seed(seed, EditError)
        if onto not in _ONTO:
            raise EditError(f"onto={onto!r} is unknown: use one of {', '.join(_ONTO)}")
        edit: CurvatureEdit | RandomPairsEdit = CurvatureEdit(factors, keep)
        if onto == "random":
            edit = RandomPairsEdit(factors, keep, seed)
        self._factors, self._edit, self._keeps_sharp = factors, edit, onto == "sharp"
        self.names = factors.names if isinstance(edit.keep, float) else list(edit.keep)
        self._chosen: dict[str, Selection] = {}

    def __call__(self, name: str, update: Tensor) -> Tensor:
        """Return the projection of a matrix (out, in), float32 or float64."""
        if name not in self.names:
            raise EditError(f"an update of {name!r} has no keep; targets: {self.names}")
        record = self._factors.records[name]
        if tuple(update.shape) != (shape := (record.out_features, record.in_features)):
            raise EditError(
                f"the update of target {name!r} has shape {tuple(update.shape)}; its weight has "
                f"(out, in) = {shape}"
            )
        if name not in self._chosen:
            self._chosen[name] = self._edit.choose(name, None)
            if not self._chosen[name].pairs:
                raise EditError(
                    f"target {name!r} has no curvature mass (all activations or all gradients were "
                    "zero), so none of its pairs is known to be flat"
                )
        wide = widened(update)
        with full_precision(wide.device):
            u_out, u_in = self._factors.eigenvectors(name, wide)
            blanked = self._chosen[name].mask(wide.device)
            if self._keeps_sharp:
                blanked = ~blanked
            coordinates = (u_out.T @ wide @ u_in).masked_fill_(blanked, 0.0)
            result: Tensor = u_out @ coordinates @ u_in.T
        return result


def _dense(name: str, update: Update) -> Tensor:
    parts = update if isinstance(update, tuple) else (update,)
    if len(parts) not in (1, 2) or not all(
        isinstance(one, Tensor) and one.ndim == 2 for one in parts
    ):
        raise EditError(
            f"the update of target {name!r} must be a matrix (out, in) or a pair of them (B, A)"
        )
    if len(parts) == 1:
        return parts[0].detach()
    left, right = (widened(one.detach()) for one in parts)
    if left.shape[1] != right.shape[0]:
        raise EditError(
            f"the update of target {name!r}: B {tuple(left.shape)} and A {tuple(right.shape)} have "
            "no product; give (B, A), B first"
        )
    with full_precision(left.device):
        return left @ right


@without_gradients()
def _project_gradient(target: Target, projection: _Projection, parameter: Tensor) -> None:
    assert parameter.grad is not None
    gradient = target.view(parameter.grad)
    gradient.copy_(projection(target.name, gradient))


@without_gradients()
def _project_change(target: Target, start: Tensor, projection: _Projection) -> None:
    weight, begun = widened(target.weight), widened(start)
    target.weight.copy_(begun + projection(target.name, weight - begun))
