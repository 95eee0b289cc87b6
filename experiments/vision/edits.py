"""One trained network: its factors, its edits and its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ViTForImageClassification

import kfac
from experiments.vision.data import NoisySplit
from lirefs.errors import SettingError

PROJECTIONS = {"up and down": "mlp", "up": "mlp_in", "down": "mlp_out"}
METHODS = ("K-FAC", "EK-FAC", "SVD", "random pairs")
LABEL_DRAWS = 8
BATCH = 512


@dataclass(frozen=True)
class VisionScores:
    """Shares of images.

    Attributes:
        recited: Noised training images classified by their wrong label.
        recovered: Noised training images classified by their true label.
        validation: Validation images classified correctly.
        test: Test images classified correctly.
    """

    recited: float
    recovered: float
    validation: float
    test: float


METRICS = tuple(VisionScores.__dataclass_fields__)


@dataclass(frozen=True)
class Setting:
    """The settings of an edit.

    Attributes:
        projections: A key of `PROJECTIONS`.
        keep: Share of the curvature mass to keep; for SVD, of the singular values.
    """

    projections: str
    keep: float


def counted_tokens(tokens: str) -> Callable[[torch.nn.Module, Tensor], tuple[Tensor, Tensor]]:
    """Return the `forward` of `kfac.collect` for a ViT of transformers and batches of pixels.

    Args:
        tokens: "cls" counts only the class token, as the paper does; "all" also the patches.

    Raises:
        SettingError: `tokens` is neither of them.
    """
    if tokens not in ("cls", "all"):
        raise SettingError(f"tokens={tokens!r}: use cls or all")

    def forward(model: torch.nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        config = model.config
        patches = (config.image_size // config.patch_size) ** 2  # type: ignore[union-attr, operator]
        counted = torch.full((len(pixels), 1 + int(patches)), tokens == "all")
        counted[:, 0] = True
        return model(pixel_values=pixels).logits, counted.to(pixels.device)

    return forward


@torch.no_grad()
def answers(model: ViTForImageClassification, inputs: Tensor) -> Tensor:
    """Return the class that a model predicts for each image, int64 (N,)."""
    return torch.cat(
        [model(pixel_values=part).logits.argmax(1) for part in torch.split(inputs, BATCH)]
    )


def score(model: ViTForImageClassification, split: NoisySplit, wrong: NoisySplit) -> VisionScores:
    """Score a model in its current state.

    Args:
        model: A classifier of the images.
        split: The images.
        wrong: The same split with the noised labels (the model may be trained without noise).
    """

    def share(right: Tensor) -> float:
        return float(right.double().mean())

    noised = wrong.noised
    said = answers(model, split.inputs(split.train.take(noised)))
    validation, test = (
        share(answers(model, split.inputs(images)) == images.labels)
        for images in (split.validation, split.test)
    )
    truth = wrong.train.labels[noised]
    return VisionScores(share(said == wrong.shown[noised]), share(said == truth), validation, test)


class Trained:
    """One trained network, its factors and its edits.

    Args:
        split: The split that it was trained on.
        model: The network.
        tokens: Positions that the factors count, "cls" or "all".
        seed: Seed of the sampled labels and the random pairs.
    """

    def __init__(
        self, split: NoisySplit, model: ViTForImageClassification, tokens: str, seed: int
    ) -> None:
        self.split, self.model, self.seed = split, model, seed
        self.forward = counted_tokens(tokens)
        batches = list(torch.split(split.inputs(split.train), BATCH))
        targets = kfac.find_targets(model, projections="mlp")
        settings: dict[str, Any] = {
            "seed": seed,
            "samples": LABEL_DRAWS,
            "forward": self.forward,
            "progress": False,
        }
        factors = kfac.collect(model, batches, targets, **settings)
        self.factors = kfac.correct(model, batches, factors, **settings)

    def edit(self, method: str, setting: Setting, blocks: Iterable[int]) -> kfac.WeightEdit:
        """Return an edit of some blocks; `method` is one of `METHODS`."""
        targets = kfac.find_targets(self.model, blocks, PROJECTIONS[setting.projections])
        keeps = {target.name: setting.keep for target in targets}
        if method == "SVD":
            return kfac.SVDEdit(list(keeps), setting.keep)
        if method == "random pairs":
            return kfac.RandomPairsEdit(self.factors, keeps, self.seed)
        estimator = "ekfac" if method == "EK-FAC" else "kfac"
        return kfac.CurvatureEdit(self.factors, keeps, estimator=estimator)

    def score(self, edit: kfac.WeightEdit | None = None) -> VisionScores:
        """Score the network, unedited or under an edit."""
        if edit is None:
            return score(self.model, self.split, self.split)
        with edit.apply(self.model):
            return score(self.model, self.split, self.split)

    def bands(self) -> kfac.BandRatios:
        """Activation by curvature band: recited noised images relative to images without noise."""
        split = self.split
        inputs = split.inputs(split.train)
        recited = split.noised & (answers(self.model, inputs) == split.shown)
        profiles = [
            kfac.band_profile(
                self.model, torch.split(inputs[rows], BATCH), self.factors, forward=self.forward
            )
            for rows in (recited, ~split.noised)
        ]
        return kfac.band_ratios(profiles[0], profiles[1], seed=self.seed)
