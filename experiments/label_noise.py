"""How noisy few draws of sampled labels are: G and the edited weights against many draws.

Factors are collected from the same tokens with a few labels drawn for each position and with many,
by other seeds. What differs is the noise of the draw alone, not that of the data.

    python -m experiments.label_noise
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

import kfac
import lirefs
from lirefs import LanguageModel
from lirefs.organism import Language, training_texts


def label_noise(
    lm: LanguageModel,
    texts: Sequence[str],
    layers: Sequence[int],
    keep: float,
    draws: Sequence[int],
    reference: int,
) -> tuple[int, dict[int, tuple[float, float]]]:
    """Number of tokens; and by number of draws, the relative errors of G and of W' (root mean).

    Args:
        lm: The model.
        texts: What the factors are collected from.
        layers: Whose MLP inputs are edited.
        keep: Of the edit.
        draws: Numbers of labels drawn for each position.
        reference: Number of labels that stands for the expectation.
    """
    targets = kfac.find_targets(lm.model, layers)
    best = kfac.collect(lm, texts, targets, seed=1, samples=reference)
    expected = dict(_edited(lm, best, keep))
    found = {}
    for number in draws:
        factors = kfac.collect(lm, texts, targets, seed=2, samples=number)
        errors = [0.0, 0.0]
        for name, weight in _edited(lm, factors, keep):
            pairs = (factors.G(name), best.G(name)), (weight, expected[name])
            for side, (one, other) in enumerate(pairs):
                errors[side] += float((one - other).norm() / other.norm()) ** 2 / len(targets)
        found[number] = (errors[0] ** 0.5, errors[1] ** 0.5)
    return best.tokens, found


def _edited(lm: LanguageModel, factors: kfac.Factors, keep: float) -> list[tuple[str, Tensor]]:
    edit = kfac.CurvatureEdit(factors, keep)
    return [(target.name, weight.double()) for target, weight in edit.prepare(lm.model)]


def main() -> None:
    """Parse the arguments, and print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", default="100", help="numbers of texts")
    parser.add_argument("--layers", default="2,3", help="whose MLP inputs are edited")
    parser.add_argument("--keep", type=float, default=0.9)
    parser.add_argument("--draws", default="1,4", help="numbers of labels for each position")
    parser.add_argument("--reference", type=int, default=48, help="draws taken for the expectation")
    options = parser.parse_args()
    sizes, layers, draws = (
        [int(one) for one in text.split(",")]
        for text in (options.texts, options.layers, options.draws)
    )
    lm = lirefs.load("organism")
    texts = training_texts(Language(), max(sizes))
    for size in sizes:
        tokens, found = label_noise(
            lm, texts[:size], layers, options.keep, draws, options.reference
        )
        for number, (of_g, of_weight) in found.items():
            print(
                f"{tokens} tokens, {number} draws against {options.reference}: "
                f"G moves by {of_g:.3f} of its norm, W' by {of_weight:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
