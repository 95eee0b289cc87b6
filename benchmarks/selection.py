"""Speed of choosing pairs compared with a heap, and of ten values of `keep` compared with one.

    python benchmarks/selection.py

Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from typing import Any

import numpy as np
import torch
from measuring import versions, with_range
from torch import nn

import kfac


def heap(lam: Any, mu: Any, keep: float, limit: float) -> tuple[list[int], float]:
    """Take pairs from a heap in descending order of mass until `keep` or `limit` seconds."""
    goal = keep * lam.sum() * mu.sum()
    queue, seen, mass = [(-lam[0] * mu[0], 0, 0)], {(0, 0)}, 0.0
    counts = [0] * len(lam)
    began = time.perf_counter()
    while queue and mass < goal and time.perf_counter() - began < limit:
        negative, i, j = heapq.heappop(queue)
        mass -= negative
        counts[i] += 1
        for row, column in ((i + 1, j), (i, j + 1)):
            if row < len(lam) and column < len(mu) and (row, column) not in seen:
                seen.add((row, column))
                heapq.heappush(queue, (-lam[row] * mu[column], row, column))
    return counts, time.perf_counter() - began


def selection() -> None:
    """Time the staircase against a heap, and ten values of `keep` against one."""
    rng = np.random.default_rng(0)

    def spectrum(size: int) -> Any:
        return np.sort(np.arange(1, size + 1) ** -0.7 * rng.lognormal(0, 0.3, size))[::-1].copy()

    lam, mu = spectrum(256), spectrum(688)
    counts, _ = heap(lam, mu, 0.6, 60)
    assert counts == kfac.staircase(lam, mu, 0.6).counts.tolist(), "the heap takes other pairs"
    lam, mu = spectrum(4096), spectrum(11008)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        chosen = kfac.staircase(lam, mu, 0.6)
        times.append(time.perf_counter() - began)
    ours = statistics.median(times)
    counts, seconds = heap(lam, mu, 0.6, 20)
    taken = sum(counts)
    # A step of the heap grows with its size, so the other pairs take at least as long per pair.
    whole = seconds * chosen.pairs / taken
    print(f"\nstaircase 4096 x 11008 at 0.6: {ours * 1000:.1f} ms for {chosen.pairs:,} pairs")
    print(f"heap: {seconds:.1f} s for {taken:,} pairs, {whole:.0f} s for all pairs: ", end="")
    print(f"{whole / ours:,.0f}x slower")


def sweep() -> None:
    """Time ten values of `keep` against one, from factors to edited weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.Tanh(), nn.Linear(1536, 64))
    x = torch.randn(4000, 576) * torch.arange(1, 577) ** -0.5

    def forward(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch), torch.ones(len(batch), dtype=torch.bool)

    def edit(keeps: list[float]) -> float:
        factors = kfac.collect(
            model, [x], kfac.named_targets(model, ["0"]), forward=forward, progress=False
        )
        began = time.perf_counter()
        for keep in keeps:
            with kfac.CurvatureEdit(factors, keep).apply(model):
                pass
        return time.perf_counter() - began

    edit([0.5])
    many = [0.5 + 0.04 * i for i in range(10)]
    pairs = [(edit([0.6]), edit(many)) for _ in range(7)]
    one, ten = (1000 * statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = with_range([after / before for before, after in pairs])
    print(f"one keep {one:.0f} ms, ten {ten:.0f} ms: {ratio} times ({versions('torch', 'numpy')})")


def main() -> None:
    """Run and print both measurements."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    selection()
    sweep()


if __name__ == "__main__":
    main()
