"""Whether a direction of the residual stream is sharp or flat to the matrices that touch it.

A matrix reads the stream or writes to it, with or without a norm in between. The direction is
carried into the matrix's own input or output space and compared with the second moments there. A
large second moment means sharp: the loss depends on it (Merullo et al. 2025, section 3).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import kfac
import lirefs
from lirefs import Direction, LanguageModel, Questions
from lirefs.errors import DirectionError
from lirefs.model.guest import evaluating
from lirefs.model.observe import Seen, observe
from lirefs.organism import Language, organism_questions, training_texts
from lirefs.statistics import Estimate, interval
from lirefs.statistics.intervals import Floats

Role = Literal["reads", "writes"]
DRAWS = 1000
"""Number of random directions of each kind."""


@dataclass(frozen=True, eq=False)
class Contact:
    """How one matrix touches the residual stream.

    Attributes:
        role: Whether it reads the stream or writes to it.
        scale: Factor of each coordinate in the norm in between, shape (width,); ones without a
            norm.
        centred: Whether that norm subtracts the mean.
    """

    role: Role
    scale: Floats
    centred: bool = False

    def carry(self, directions: Floats) -> Floats:
        """Directions of the stream in the matrix's own space, (n, width) to (n, width), length 1.

        The norm's division by the size of the state is left out. It changes only the length, and
        the component along the state, which is small unless the direction points along the state.
        """
        if self.centred:
            directions = directions - directions.mean(axis=1, keepdims=True)
        carried = directions * self.scale if self.role == "reads" else directions / self.scale
        length = np.linalg.norm(carried, axis=1, keepdims=True)
        unit: Floats = carried / np.maximum(length, np.finfo(np.float64).tiny)
        return unit


@dataclass(frozen=True)
class Placed:
    """A number of one direction compared with those of random directions.

    Attributes:
        value: The number of the direction.
        isotropic: Mean and 95 % range over random directions, all equally likely.
        matched: Mean and 95 % range over random directions drawn with the covariance of states.
        above_isotropic: Share of isotropic directions that lie below the direction.
        above_matched: Share of matched directions that lie below the direction.
    """

    value: float
    isotropic: Estimate
    matched: Estimate
    above_isotropic: float
    above_matched: float


@dataclass(frozen=True)
class Sharpness:
    """How sharp a direction is to one matrix that touches it.

    Attributes:
        layer: Layer of the direction.
        target: Name of the matrix.
        role: Whether it reads the direction (M is its A) or writes it (M is its G).
        curvature: v.Mv divided by the mean eigenvalue of M.
        order: Mean rank of its energy, from the flattest (0) to the sharpest eigenvector (1).
    """

    layer: int
    target: str
    role: Role
    curvature: Placed
    order: Placed


def states_at(
    lm: LanguageModel, direction: Direction, prompts: Sequence[str] | Sequence[Sequence[int]]
) -> Floats:
    """States of the prompts' last tokens at a direction's layer and site, float64 (n, width)."""
    layers, sites = [direction.layer], [direction.site]
    found = lirefs.capture(lm, prompts, layers=layers, sites=sites, progress=False)
    states: Floats = found.values[:, 0, 0].double().numpy()
    return states


def contacts(lm: LanguageModel, names: Sequence[str]) -> dict[str, Contact]:
    """Find out how matrices touch the residual stream, from their values in one forward pass.

    Args:
        lm: The model.
        names: Dotted module names of matrices inside decoder blocks.

    Returns:
        An entry for each matrix that reads or writes the stream itself. A matrix that does neither
        has none.
    """
    model, layout = lm.model, lm.layout
    blocks = {name: ".".join(name.split(".")[: layout.blocks.count(".") + 2]) for name in names}
    watched = {*names, *blocks.values()}
    for block in blocks.values():
        layer = int(block.rpartition(".")[2])
        parts = (*layout.norms[layer], layout.attention[layer], layout.mlp[layer])
        watched |= {f"{block}.{part}" for part in filter(None, parts)}
    seen = observe(model, {name: model.get_submodule(name) for name in sorted(watched)})
    found = {name: _contact(lm, seen, name, blocks[name]) for name in names}
    return {name: contact for name, contact in found.items() if contact is not None}


def spread(directions: Floats, moments: Floats, values: Floats, basis: Floats) -> Floats:
    """Two numbers that say how sharp directions are to a matrix.

    Args:
        directions: Unit vectors in rows, shape (n, width).
        moments: The second moments A or G, shape (width, width).
        values: Their eigenvalues, descending, shape (width,).
        basis: Their eigenvectors in columns, shape (width, width).

    Returns:
        Shape (n, 2). First, the curvature v.Mv divided by the mean eigenvalue: 1 on average over
        all directions. Second, the mean rank of the direction's energy in the order of eigenvalues,
        from 0 (all in the flattest) to 1 (all in the sharpest); it does not depend on the size of
        the few largest eigenvalues.
    """
    curvature = np.einsum("nw,wv,nv->n", directions, moments, directions) / values.mean()
    places = np.linspace(1, 0, len(values))
    return np.stack([curvature, np.square(directions @ basis) @ places], axis=1)


def place(value: float, isotropic: Floats, matched: Floats) -> Placed:
    """Compare a number with those of two kinds of random directions, each of shape (draws,)."""
    return Placed(
        value=float(value),
        isotropic=Estimate(float(isotropic.mean()), *interval(isotropic), len(isotropic)),
        matched=Estimate(float(matched.mean()), *interval(matched), len(matched)),
        above_isotropic=float((isotropic < value).mean()),
        above_matched=float((matched < value).mean()),
    )


def direction_sharpness(
    lm: LanguageModel,
    directions: Sequence[Direction],
    factors: kfac.Factors,
    questions: Questions,
    *,
    seed: int = 0,
) -> list[Sharpness]:
    """Ask whether LiReFs are sharp or flat to the matrices that read and write them.

    A direction of the residual stream is compared with A of the matrices that read it in the next
    layer, and with G of those that write it in the layer before. There are two kinds of random
    directions. Isotropic ones are equally likely everywhere. But states vary in few directions, and
    any difference of states lies among them. So the others are drawn with the covariance of states
    at the same layer and site, and a LiReF is special only if it stands out from these.

    Args:
        lm: The model.
        directions: Directions at `resid_pre` or `resid_post`.
        factors: Curvature of the same model.
        questions: Questions whose last prompt tokens give the covariance of states.
        seed: Seed of the random directions.

    Returns:
        One entry for each direction and each matrix with factors that touches it; matrices that
        share an input (gate and up) give one entry.

    Raises:
        DirectionError: If a direction is at another site, or no matrix with factors touches it.
    """
    # Experts do not see whole batches. One of the matrices that share an input stands for all.
    touching = {
        name: contact
        for name, contact in contacts(lm, [one for one in factors.names if "[" not in one]).items()
        if contact.role == "writes" or factors.records[name].source == name
    }
    layers = {target.name: target.layer for target in factors.targets(lm.model, touching)}
    generator = np.random.default_rng(seed)
    found = []
    for direction in directions:
        if direction.site not in ("resid_pre", "resid_post"):
            raise DirectionError(
                f"the direction is at {direction.site}, not in the residual stream; use one at "
                "resid_pre or resid_post"
            )
        states = states_at(lm, direction, questions.prompts)
        states -= states.mean(axis=0)
        rows = np.concatenate(
            [
                direction.unit.double().cpu().numpy()[None],
                generator.normal(size=(DRAWS, lm.width)),
                generator.normal(size=(DRAWS, len(states))) @ states,
            ]
        )
        reader = direction.layer + (direction.site == "resid_post")
        for name, contact in touching.items():
            if layers[name] != (reader if contact.role == "reads" else reader - 1):
                continue
            numbers = spread(contact.carry(rows), *_moments(factors, name, contact.role))
            placed = [
                place(float(one[0]), one[1 : 1 + DRAWS], one[1 + DRAWS :]) for one in numbers.T
            ]
            found.append(Sharpness(direction.layer, name, contact.role, *placed))
        if not any(one.layer == direction.layer for one in found):
            raise DirectionError(
                f"no matrix with factors reads the direction of layer {direction.layer} or writes "
                "it; collect factors of that layer or of the one before"
            )
    return found


def _contact(lm: LanguageModel, seen: Mapping[str, Seen], name: str, block: str) -> Contact | None:
    own, layout = seen[name], lm.layout
    layer = int(block.rpartition(".")[2])
    attention, mlp = layout.attention[layer], layout.mlp[layer]
    inside = [f"{block}.{norm}" for norm in layout.norms[layer]]
    norms = {norm: lm.model.get_submodule(norm) for norm in inside}
    for part in filter(None, (attention, mlp)):  # its output is added to the stream
        added = f"{block}.{part}"
        if added in norms and _same(own.output, seen[added].input):
            return Contact("writes", _effect(norms[added], lm.width)[0])
        if added not in norms and _same(own.output, seen[added].output):
            return Contact("writes", np.ones(lm.width))
    for norm, module in norms.items():
        if _same(own.input, seen[norm].output):
            return Contact("reads", *_effect(module, lm.width))
    stream = seen[block].input
    streams = [stream]
    if attention is not None and stream is not None:
        attended = seen[f"{block}.{attention}"].output
        streams.append(None if attended is None else stream + attended.reshape(stream.shape))
    if any(_same(own.input, one) for one in streams):
        return Contact("reads", np.ones(lm.width))
    return None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.numel() != other.numel():
        return False
    return torch.allclose(one.flatten().float(), other.flatten().float(), rtol=1e-4, atol=1e-5)


def _effect(norm: nn.Module, width: int) -> tuple[Floats, bool]:
    """Measure the scale of each coordinate, and whether the norm subtracts the mean.

    Entries of +1 and -1 have size 1 and (nearly) mean 0, so a norm changes them only by its scale.
    Half the difference between the outputs for an input and its negative is free of any bias.
    """
    weight = next(norm.parameters(), torch.empty(0))
    signs = torch.ones(width, device=weight.device, dtype=weight.dtype)
    signs[1::2] = -1
    with evaluating(norm):
        difference = norm(signs[None, None]) - norm(-signs[None, None])
        shifted = norm(signs[None, None] + 1) - norm(signs[None, None])
    scale = (difference[0, 0] / 2 * signs).double().cpu().numpy()
    return scale, bool(shifted.abs().max() < 1e-3 * max(1e-6, float(np.abs(scale).max())))


def _moments(factors: kfac.Factors, name: str, role: Role) -> tuple[Floats, Floats, Floats]:
    """Second moments, eigenvalues and eigenvectors on the matrix's side that meets the stream."""
    eigen = factors.eigen(name)
    if role == "reads":
        found = factors.A(name), eigen.mu, eigen.u_in
    else:
        found = factors.G(name), eigen.lam, eigen.u_out
    moments, values, basis = (one.double().numpy() for one in found)
    return moments, values, basis


def main() -> None:
    """Find where a LiReF lies in the curvature of the matrices that read and write it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="organism", help="built-in name, hub id or folder")
    parser.add_argument(
        "--limit", type=int, default=40, help="questions per class; 5 texts for each"
    )
    options = parser.parse_args()

    lm, language, limit = lirefs.load(options.model), Language(), options.limit
    if options.model == "organism":
        questions = organism_questions("passage", language, 20 + limit)
        texts = training_texts(language, 5 * limit)
    else:
        questions, texts = lirefs.load_questions(), lirefs.calibration_texts()[:limit]
    split = questions.split()
    direction = lirefs.fit(lm, split).best
    layers = {max(direction.layer - 1, 0), direction.layer}
    targets = kfac.find_targets(lm.model, layers, ["gate_proj", "up_proj", "down_proj", "o_proj"])
    factors = kfac.collect(lm, texts, targets)
    for one in direction_sharpness(lm, [direction], factors, split.train):
        for name, position in (("curvature", one.curvature), ("order", one.order)):
            print(f"{one.target} {one.role}: {name} {position.value:.2f}, ", end="")
            print(f"random {position.isotropic:.2f}, as states vary {position.matched:.2f}")


if __name__ == "__main__":
    main()
