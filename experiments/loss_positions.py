"""Curvature from losses at a share of the positions only: what it saves, and what it costs.

The head and the softmax then work on fewer positions, so more texts fit into the same processor
seconds. A share is unbiased: G shrinks with it, and its eigenvectors and A do not change.

    python -m experiments.loss_positions --model smollm2-135m --layers 20,21,22
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

import kfac
import lirefs
from lirefs import LanguageModel
from lirefs.tasks.default_suite import calibration_texts

Collected = tuple[Mapping[str, tuple[Tensor, Tensor]], Mapping[str, Tensor]]


def losses_at(share: float, seed: int) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """A `forward` for `kfac.collect` with losses at a random share of each row's positions."""
    rng = torch.Generator().manual_seed(seed)

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        length = hidden.shape[1]
        chosen = torch.randperm(length, generator=rng)[: max(1, round(share * length))]
        logits = model.get_output_embeddings()(hidden[:, chosen])
        counted = torch.ones_like(batch, dtype=torch.bool)
        counted[:, -1] = False
        return logits, counted

    return forward


def collected(
    lm: LanguageModel, rows: Tensor, layers: Sequence[int], share: float, seed: int, keep: float,
    samples: int = 1,
) -> tuple[Collected, float]:  # fmt: skip
    """A and G by target, scaled to a trace of 1, and W'; and the processor seconds."""
    began = time.process_time()
    factors = kfac.collect(
        lm.model,
        list(torch.split(rows, 4)),
        kfac.find_targets(lm.model, layers),
        forward=losses_at(share, seed),
        seed=seed,
        samples=samples,
        progress=False,
    )
    seconds = time.process_time() - began
    sides = {
        name: (factors.A(name) / factors.A(name).trace(), factors.G(name) / factors.G(name).trace())
        for name in factors.names
    }
    edited = kfac.CurvatureEdit(factors, keep).prepare(lm.model)
    return (sides, {target.name: weight for target, weight in edited}), seconds


def errors(one: Collected, other: Collected) -> tuple[float, float, float]:
    """Relative errors of A, G and W', root mean over targets."""
    squares = [0.0, 0.0, 0.0]
    for name in other[0]:
        pairs = [*zip(one[0][name], other[0][name], strict=True), (one[1][name], other[1][name])]
        for place, (mine, known) in enumerate(pairs):
            squares[place] += float((mine - known).norm() / known.norm()) ** 2 / len(other[0])
    a, g, weight = (one**0.5 for one in squares)
    return a, g, weight


def main() -> None:
    """Parse the arguments, and print a line for each share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="20,21,22")
    parser.add_argument("--shares", default="1,0.5,0.25,0.1")
    parser.add_argument("--rows", type=int, default=12, help="rows of 128 tokens at a share of 1")
    parser.add_argument("--rounds", type=int, default=4, help="draws of rows and labels")
    parser.add_argument("--keep", type=float, default=0.6)
    options = parser.parse_args()
    layers = [int(one) for one in options.layers.split(",")]
    shares = [float(one) for one in options.shares.split(",")]
    lm = lirefs.load(options.model)
    ids = torch.tensor([one for text in calibration_texts() for one in lm.encode([text])[0]])
    rows = ids[: len(ids) // 128 * 128].reshape(-1, 128)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    known, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    # Of other texts: the difference between two halves of the texts is part of all errors.
    reference, _ = collected(lm, known, layers, 1.0, 1000, options.keep, samples=4)
    collected(lm, rest[:4], layers, 1.0, 0, options.keep)  # warms up
    _, base = collected(lm, rest[: options.rows], layers, 1.0, 0, options.keep)
    for share in shares:
        _, seconds = collected(lm, rest[: options.rows], layers, share, 0, options.keep)
        affordable = min(len(rest), round(options.rows * base / seconds))
        found = []
        for seed in range(options.rounds):
            drawn = torch.tensor(Random(seed).sample(range(len(rest)), affordable))
            one, seconds = collected(lm, rest[drawn], layers, share, seed, options.keep)
            found.append([seconds, *errors(one, reference)])
        means = [sum(column) / len(found) for column in zip(*found, strict=True)]
        print(
            f"losses at {share:.0%} of the positions: {affordable * 128} tokens in "
            "{:.1f} s; relative error of A {:.4f}, of G {:.4f}, of W' {:.4f}".format(*means),
            flush=True,
        )


if __name__ == "__main__":
    main()
