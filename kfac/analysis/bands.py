"""Activations by curvature band: what memorized and other texts put into sharp and flat directions.

The bands follow the eigenvalues of A. Merullo et al. 2025 (arXiv 2510.24256), section 4, order
pairs; summed over the output side, this gives the same order of input directions. We take their
statistic to be the mean over tokens of the norm of the projection on a band.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac.collection.batches import Forward, check_model_and_batches
from kfac.collection.target_inputs import target_inputs
from kfac.edits.weight_edit import check_weight
from kfac.factors.factors import Factors
from lirefs.errors import KfacError, SpectrumError, checked_seed, must_be
from lirefs.model.guest import as_guest, full_precision
from lirefs.statistics.intervals import RESAMPLES
from lirefs.statistics.resamples import Floats, Resamples


@dataclass(frozen=True, eq=False)
class BandProfile:
    """Activation of some texts by curvature band.

    Attributes:
        names: Names of the targets; only the first of those that share an input.
        labels: Names of the bands, sharpest first.
        norms: Shape (texts, targets, bands): mean over a text's tokens of the norm of the
            projection of the target's input on the band.
        unit_norms: The same after each token's input is scaled to norm 1. This is the control:
            texts whose inputs are larger or smaller as a whole do not differ in it.
        tokens: Number of tokens of each text, shape (texts,).
    """

    names: list[str]
    labels: list[str]
    norms: Floats
    unit_norms: Floats
    tokens: Floats

    def __repr__(self) -> str:
        return f"BandProfile({len(self)} texts, {len(self.names)} targets, bands {self.labels})"

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class BandRatios:
    """Activation of one set of texts over that of another, by target and band.

    Attributes:
        names: Names of the targets.
        labels: Names of the bands, sharpest first.
        ratio: Shape (3, targets, bands): value, lower and upper end of the 95 % interval.
        control: The same with each token's input scaled to norm 1.
        n: Number of texts of both sets.
    """

    names: list[str]
    labels: list[str]
    ratio: Floats
    control: Floats
    n: tuple[int, int]

    def __repr__(self) -> str:
        return f"BandRatios({len(self.names)} targets, bands {self.labels}, n = {self.n})"


def band_profile(
    model: nn.Module,
    batches: Iterable[Any],
    factors: Factors,
    *,
    edges: Sequence[float] = (0.10, 0.25, 0.50),
    forward: Forward | None = None,
) -> BandProfile:
    """Measure how strongly texts activate each curvature band of the targets' inputs.

    After Merullo et al. 2025 (arXiv 2510.24256), section 4, figure 2.

    Args:
        model: The model of the factors; left as it was found.
        batches: Mappings with input_ids (B, T) and an optional attention_mask (B, T); with
            `forward`, whatever it takes.
        factors: Factors of the model; each distinct input is measured once.
        edges: Ends of all bands but the last as fractions of the input directions, sharpest
            first. The default gives top 10 %, 10-25 %, 25-50 % and bottom 50 %.
        forward: For models that are not causal language models, as in `kfac.collect`: its mask
            (B, T) says which tokens of each text (patches of each image) are measured.

    Raises:
        BatchError: No batch, one is malformed, or a text has no token.
        FactorsMismatchError: The factors are not of this model.
        NonFiniteError: The input of a target holds NaN or infinity.
        SpectrumError: The edges are not ascending fractions, or a band has no direction.
    """
    check_model_and_batches(model, batches)
    must_be(factors, Factors, "factors", KfacError)
    names = distinct_inputs(factors)
    cuts = [_cuts(factors.records[name].in_features, edges) for name in names]
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with as_guest(model):
        for energies, real in band_input_energies(model, batches, factors, forward):
            sums = [_band_sums(one, real, cut) for one, cut in zip(energies, cuts, strict=True)]
            raw, unit = (torch.stack(parts, 1) for parts in zip(*sums, strict=True))
            rows.append((raw, unit, real.sum(1).double().cpu()))
    norms, units, counts = (torch.cat(parts).double().numpy() for parts in zip(*rows, strict=True))
    per_token = counts[:, None, None]
    return BandProfile(names, _labels(edges), norms / per_token, units / per_token, counts)


def band_ratios(
    first: BandProfile, second: BandProfile, resamples: int = RESAMPLES, seed: int = 0
) -> BandRatios:
    """Divide the mean activation of one set of texts by that of another, with 95 % intervals.

    Every token has the same weight; whole texts are resampled, since the tokens of one text are not
    independent.

    Args:
        first: Profile above the fraction bar.
        second: Profile below it, of the same targets and bands.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        SpectrumError: The profiles have different targets or bands.
    """
    for name, one in (("first", first), ("second", second)):
        must_be(one, BandProfile, name, KfacError)
    if first.names != second.names or first.labels != second.labels:
        raise SpectrumError("the two profiles were measured on different targets or bands")
    seed = checked_seed(seed, KfacError)
    sides = [
        (one.tokens, Resamples(len(one), resamples, seed + index))
        for index, one in enumerate((first, second))
    ]

    def ratio(*norms: Floats) -> Floats:
        means = []  # of each side: of the texts themselves, then of each resample
        for values, (tokens, counts) in zip(norms, sides, strict=True):
            sums = (values * tokens[:, None, None]).reshape(len(tokens), -1)
            blocks = [(block @ sums) / (block @ tokens)[:, None] for block in counts.blocks()]
            resampled = np.concatenate(blocks)
            means.append((sums.sum(0) / tokens.sum(), resampled))
        tiny = np.finfo(np.float64).tiny
        value, drawn = (
            above / np.maximum(below, tiny) for above, below in zip(*means, strict=True)
        )
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        return np.stack([value, low, high]).reshape(3, *norms[0].shape[1:])

    tables = ratio(first.norms, second.norms), ratio(first.unit_norms, second.unit_norms)
    return BandRatios(first.names, first.labels, *tables, (len(first), len(second)))


def task_band_ratios(
    tasks: Mapping[str, BandProfile],
    references: Mapping[str, BandProfile],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, BandRatios]]:
    """Place tasks between memorized and clean text by their curvature (figure 4 of the paper).

    Args:
        tasks: Task name to the profile of its prompts.
        references: Kind of text, such as "memorized" or "clean", to the profile of such texts.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        For each task and reference, the activation of the reference over that of the task.
    """
    must_be(tasks, Mapping, "tasks", KfacError)
    must_be(references, Mapping, "references", KfacError)
    return {
        task: {name: band_ratios(one, profile, resamples, seed) for name, one in references.items()}
        for task, profile in tasks.items()
    }


def distinct_inputs(factors: Factors) -> list[str]:
    """Return the first target of each group that shares an input, in order."""
    return list(dict.fromkeys(record.source for record in factors.records.values()))


def band_input_energies(
    model: nn.Module, batches: Iterable[Any], factors: Factors, forward: Forward | None = None
) -> Iterator[tuple[Iterator[Tensor], Tensor]]:
    """Run texts, and yield how the energy of each token's input is spread over the directions of A.

    Each batch gives an iterator over `distinct_inputs`, which computes the squared coordinates
    (B, T, in), float32; and the bool mask (B, T) of attended tokens.
    """
    targets = factors.targets(model, distinct_inputs(factors))
    for target in targets:
        check_weight(target, factors.records[target.name].digest)
    factors.decompose(distinct_inputs(factors), sides="A")

    @functools.cache
    def basis(name: str, device: torch.device) -> Tensor:
        return factors.eigen_A(name)[1].to(device, torch.float32)

    for inputs, real in target_inputs(model, batches, targets, forward):
        states = ((target.name, inputs[target.name]) for target in targets)
        yield (squared_coordinates(x.float(), basis(name, x.device)) for name, x in states), real


def squared_coordinates(states: Tensor, basis: Tensor) -> Tensor:
    """Return (uⱼ·a)² for each row a of states (..., in) and each column uⱼ of a basis."""
    with full_precision(states.device):
        return (states @ basis).square()


def _band_sums(squares: Tensor, real: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sum over tokens the norms of the bands' projections, raw and of unit inputs, (B, bands)."""
    parts = squares.tensor_split(list(cuts), dim=-1)
    bands = torch.stack([part.sum(-1).sqrt() for part in parts], -1)
    bands = bands * real.to(squares.device)[..., None]
    size = squares.sum(-1, keepdim=True).sqrt().clamp(min=torch.finfo(squares.dtype).tiny)
    return bands.sum(1).cpu(), (bands / size).sum(1).cpu()


def _cuts(width: int, edges: Sequence[float]) -> list[int]:
    cuts = [round(edge * width) for edge in edges]
    if not edges or any(a >= b for a, b in zip([0, *cuts], [*cuts, width], strict=True)):
        raise SpectrumError(
            f"edges={tuple(edges)} must be ascending fractions that leave every band at least one "
            f"of {width} directions"
        )
    return cuts


def _labels(edges: Sequence[float]) -> list[str]:
    percent = [f"{100 * edge:g}" for edge in edges]
    middle = [f"{a}-{b} %" for a, b in itertools.pairwise(percent)]
    return [f"top {percent[0]} %", *middle, f"bottom {100 - 100 * edges[-1]:g} %"]
