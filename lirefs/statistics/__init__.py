"""Estimates with their intervals, paired differences and tests."""

from lirefs.statistics.intervals import (
    Estimate,
    auroc,
    correlation,
    exponential_of_estimate,
    interval,
    mean_estimate,
    mean_of_estimates,
    permutation_p,
    roc_areas,
    weighted_mean,
    wilson,
)
from lirefs.statistics.paired import (
    difference_of_shares,
    paired_difference,
    paired_ratio,
    ratio_of_shares,
)
from lirefs.statistics.pooling import pool_estimates
from lirefs.statistics.resamples import Resamples, resample_counts
from lirefs.statistics.significance import (
    BestOf,
    best_of_null,
    detectable_difference,
    detectable_mean,
    expected_best,
    holm,
    mcnemar,
    paired_detectable,
    paired_p_value,
    sign_flip,
)

__all__ = [
    "BestOf",
    "Estimate",
    "Resamples",
    "auroc",
    "best_of_null",
    "correlation",
    "detectable_difference",
    "detectable_mean",
    "difference_of_shares",
    "expected_best",
    "exponential_of_estimate",
    "holm",
    "interval",
    "mcnemar",
    "mean_estimate",
    "mean_of_estimates",
    "paired_detectable",
    "paired_difference",
    "paired_p_value",
    "paired_ratio",
    "permutation_p",
    "pool_estimates",
    "ratio_of_shares",
    "resample_counts",
    "roc_areas",
    "sign_flip",
    "weighted_mean",
    "wilson",
]
