"""How often 95 % intervals cover the truth: percentile bootstrap against the harness's intervals.

    python benchmarks/interval_coverage.py

prints four tables: differences of two shares over the same items, their ratios, ratios of
perplexities over texts of uneven length, and shares pooled over three models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from lirefs.statistics import (
    difference_of_shares,
    interval,
    mean_of_estimates,
    pool_estimates,
    ratio_of_shares,
    resample_counts,
    weighted_mean,
    wilson,
)
from lirefs.statistics.intervals import Floats

RESAMPLES = 2000
Limits = Callable[[Floats], tuple[float, float]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4000, help="draws for each row of a table")
    repeats = parser.parse_args().repeats
    print("difference of shares | n | items that change | of these lost | percentile | score")
    for n in (40, 100, 400):
        for changed in (0.05, 0.1, 0.4):
            for lost in (0.5, 0.75, 0.95):
                truth = changed * (1 - 2 * lost)
                shares = [0.5, changed * (1 - lost), changed * lost, 0.5 - changed]
                found = counted(n, shares, truth, repeats, percentile_difference, score_difference)
                print(f"| {n} | {changed:.0%} | {lost:.0%} | {found[0]:.1%} | {found[1]:.1%}")
    print("ratio of shares | n | baseline | ratio | percentile | score")
    for n in (40, 100, 400):
        for base, ratio in ((0.3, 0.9), (0.6, 0.9), (0.9, 0.9), (0.9, 0.5)):
            shares = [base * ratio, 0, base * (1 - ratio), 1 - base]
            found = counted(n, shares, ratio, repeats, percentile_ratio, score_ratio)
            print(f"| {n} | {base:g} | {ratio:g} | {found[0]:.1%} | {found[1]:.1%}")
    print("ratio of perplexities | texts | percentile | expanded | studentized")
    for n in (10, 20, 40, 100):
        print(f"| {n} | " + " | ".join(f"{one:.1%}" for one in perplexities(n, repeats // 2)))
    print("share over three models, 80 items | share | spread | of the items | pooled")
    for share, spread in ((0.5, 0), (0.5, 0.03), (0.5, 0.1), (0.1, 0.03), (0.03, 0), (0.01, 0)):
        found = pooled(share, spread, repeats)
        print(f"| {share:g} | {spread:g} | " + " | ".join(f"{one:.1%}" for one in found))


def pooled(share: float, spread: float, repeats: int) -> list[float]:
    """Coverage of the mean over models by `mean_of_estimates`, and by `pool_estimates`."""
    draw = np.random.default_rng(0)
    truth = float(np.clip(draw.normal(share, spread, 10**6), 0, 1).mean())
    rows = draw.binomial(80, np.clip(draw.normal(share, spread, (repeats, 3)), 0, 1))
    estimates = [[wilson(int(one), 80) for one in row] for row in rows]
    return [
        float(np.mean([one.low <= truth <= one.high for one in map(method, estimates)]))
        for method in (mean_of_estimates, pool_estimates)
    ]


def counted(
    n: int, shares: list[float], truth: float, repeats: int, *methods: Limits
) -> list[float]:
    """Share of draws in which each method's interval covers the truth.

    `shares` are those of items that are right in both, gained, lost, and wrong in both.
    """
    rows = np.random.default_rng(0).multinomial(n, shares, size=repeats)
    tables, times = np.unique(rows, axis=0, return_counts=True)
    result = []
    for limits in methods:
        found = np.array([limits(row) for row in tables])
        held = (found[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= found[:, 1])
        result.append(float(times[held].sum() / repeats))
    return result


def percentile_difference(row: Floats) -> tuple[float, float]:
    """Percentile bootstrap."""
    draws = np.random.default_rng(0).multinomial(row.sum(), row / row.sum(), size=RESAMPLES)
    return interval((draws[:, 1] - draws[:, 2]) / row.sum())


def percentile_ratio(row: Floats) -> tuple[float, float]:
    """Percentile bootstrap."""
    draws = np.random.default_rng(0).multinomial(row.sum(), row / row.sum(), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval((draws[:, 0] + draws[:, 1]) / (draws[:, 0] + draws[:, 2]))


def score_difference(row: Floats) -> tuple[float, float]:
    """Tango's interval."""
    one = difference_of_shares(int(row[1]), int(row[2]), int(row.sum()))
    return one.low, one.high


def score_ratio(row: Floats) -> tuple[float, float]:
    """The interval of Tang et al."""
    one = ratio_of_shares(int(row[0]), int(row[1]), int(row[2]), int(row.sum()))
    return one.low, one.high


def perplexities(n: int, repeats: int) -> list[float]:
    """Coverage when lengths differ by an order of magnitude and a few texts lose the most."""
    generator = np.random.default_rng(0)
    held = np.zeros(3)
    for _ in range(repeats):
        tokens = np.exp(generator.normal(4.8, 0.6, n)).round() + 2
        lost = generator.gamma(0.5, 0.2, n)  # nats per token, 0.1 on average
        draws = resample_counts(n, RESAMPLES // 2, generator)
        means = (draws @ (tokens * lost)) / (draws @ tokens)
        one = weighted_mean(lost, tokens, draws)
        limits = np.array([interval(means), interval(means, n), (one.low, one.high)])
        held += (limits[:, 0] <= 0.1) & (limits[:, 1] >= 0.1)
    return [float(one) for one in held / repeats]


if __name__ == "__main__":
    main()
