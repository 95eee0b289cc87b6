"""Real images in three splits, with a share of the training labels replaced at random."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lirefs.errors import DataFileError, SettingError
from lirefs.files import sha256_of

TRAIN, VALIDATION = 0.60, 0.20
"""Shares of the images; the rest is the test split."""
MOST_PIXELS = 50_000_000
"""Limit per picture: a few bytes can claim billions of pixels, and decoding would allocate them."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images with their true labels.

    Attributes:
        pixels: float32 (N, channels, side, side), grey values or colours in [0, 1].
        labels: int64 (N,).
        classes: Names of the classes.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels and labels."""
        return sha256_of(self.pixels.numpy().tobytes() + self.labels.numpy().tobytes())

    def take(self, rows: Tensor) -> Images:
        """Return some of the images."""
        return Images(self.pixels[rows], self.labels[rows], self.classes)


@dataclass(frozen=True, eq=False)
class NoisySplit:
    """Disjoint train, validation and test images, and the labels that training shows.

    Attributes:
        train: Images with their true labels.
        validation: For choosing settings.
        test: For reporting.
        shown: int64 (len(train),): the true label; for noised images, another one.
        mean: Mean of the training pixels.
        spread: Standard deviation of the training pixels.
    """

    train: Images
    validation: Images
    test: Images
    shown: Tensor
    mean: float
    spread: float

    @property
    def noised(self) -> Tensor:
        """Which training images have a wrong label, bool (len(train),)."""
        return self.shown != self.train.labels

    def inputs(self, images: Images) -> Tensor:
        """Return standardized pixels: training mean 0, standard deviation 1."""
        return (images.pixels - self.mean) / self.spread


def noisy_split(images: Images, noise: float, seed: int) -> NoisySplit:
    """Split images at random and replace some training labels by another class, drawn uniformly.

    Args:
        images: All images.
        noise: Share of the training labels to replace, in [0, 1).
        seed: Seed of the split and the noise. The split does not depend on the noise.

    Raises:
        SettingError: The noise is out of range, or there are too few images or classes.
    """
    if not 0 <= noise < 1:
        raise SettingError(f"label noise {noise}: must be in [0, 1)")
    count, classes = len(images), len(images.classes)
    first, second = round(TRAIN * count), round((TRAIN + VALIDATION) * count)
    if classes < 2 or not 0 < first < second < count:
        raise SettingError(f"{count} images of {classes} classes are too few to split and to noise")
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(count))
    train, validation, test = (
        images.take(rows) for rows in (order[:first], order[first:second], order[second:])
    )
    wrong = torch.from_numpy(generator.permutation(first)[: round(noise * first)])
    shown = train.labels.clone()
    steps = torch.from_numpy(generator.integers(1, classes, len(wrong)))
    shown[wrong] = (shown[wrong] + steps) % classes
    mean, spread = float(train.pixels.mean()), float(train.pixels.std())
    if not spread > 0:
        raise SettingError("all training pixels are equal: there is nothing to learn")
    return NoisySplit(train, validation, test, shown, mean, spread)


def load_images(
    source: str = "digits", side: int | None = None, limit: int | None = None
) -> Images:
    """Load an image set.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits of 8x8 pixels), a folder with one
            folder of images per class, or the name of a `datasets` set with an image and a class
            label (its train split is read).
        side: Side in pixels that images are scaled to. Default: 8 for the digits, else 32.
        limit: Read at most this many images, drawn at random with a fixed seed.

    Raises:
        DataFileError: The set cannot be read, or has no images or no class labels.
        SettingError: `side` or `limit` is not positive.
    """
    if any(value is not None and value < 1 for value in (side, limit)):
        raise SettingError(f"side={side}, limit={limit}: must be at least 1")
    found = _digits() if source == "digits" else _dataset(source, side or 32, limit)
    if limit is not None and limit < len(found):
        rows = np.random.default_rng(0).permutation(len(found))[:limit]
        found = found.take(torch.from_numpy(rows))
    if side is not None and side != found.pixels.shape[-1]:
        pixels = torch.nn.functional.interpolate(
            found.pixels, (side, side), mode="bilinear", antialias=True
        )
        found = Images(pixels, found.labels, found.classes)
    return found


def _digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8)
    return Images(grey, torch.from_numpy(labels).long(), [str(digit) for digit in range(10)])


def _dataset(source: str, side: int, limit: int | None) -> Images:
    import datasets

    try:
        if Path(source).is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=source, split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as problem:  # datasets raises errors of its own, of the hub and of pyarrow
        raise DataFileError(f"images {source!r}: cannot be read ({problem})") from problem
    image = _column(source, rows.features, datasets.Image)
    label = _column(source, rows.features, datasets.ClassLabel)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=0).select(range(limit))
    rows = rows.cast_column(image, datasets.Image(decode=False))
    pictures = [_picture(source, row[image]) for row in rows]
    mode = "L" if all(picture.mode in ("1", "L") for picture in pictures) else "RGB"
    arrays = [np.asarray(p.convert(mode).resize((side, side)), np.float32) for p in pictures]
    pixels = torch.from_numpy(np.stack(arrays)).view(len(arrays), side, side, -1) / 255
    labels = torch.tensor(rows[label][:], dtype=torch.int64)
    return Images(pixels.permute(0, 3, 1, 2).contiguous(), labels, list(rows.features[label].names))


def _picture(source: str, held: dict[str, Any]) -> Any:
    """Decode the picture of a row.

    Raises:
        DataFileError: It cannot be decoded, or claims more than `MOST_PIXELS` pixels.
    """
    import datasets
    from PIL import Image

    name = held["path"] or "an unnamed picture"
    try:
        file = io.BytesIO(held["bytes"]) if held["bytes"] is not None else held["path"]
        with Image.open(file) as header:  # this reads no pixels
            width, height = header.size
        if width * height > MOST_PIXELS:
            raise DataFileError(
                f"images {source!r}: {name} has {width} x {height} pixels, more than the limit of "
                f"{MOST_PIXELS:,}; scale it down or remove it"
            )
        return datasets.Image().decode_example(held)
    except DataFileError:
        raise
    except Exception as problem:  # each format has its own errors
        raise DataFileError(
            f"images {source!r}: {name} cannot be decoded ({problem}); fix or remove it"
        ) from problem


def _column(source: str, features: Any, kind: type) -> str:
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not names:
        raise DataFileError(
            f"images {source!r}: no column of type {kind.__name__}; the columns are "
            f"{dict(features)}"
        )
    return str(names[0])
