"""Methods compared at equal damage, and settings chosen on one set and reported on another.

Each method is given by its sweep: variants of a `Comparison` from its weakest to its strongest
setting. Nominal strengths of different methods are not comparable, so scores are read where a
measure of damage (perplexity over the unchanged model's, or the share recited) has a given value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lirefs.comparison.cell import Scores
from lirefs.comparison.comparison import BASELINE, Comparison
from lirefs.errors import SettingError, must_be
from lirefs.statistics.intervals import Estimate, interval
from lirefs.statistics.resamples import Floats, finished
from lirefs.statistics.significance import BestOf, best_of_null, paired_p_value

Curves = Mapping[str, Sequence[tuple[float, str]]]
"""Method to (strength, variant), from the setting nearest to the unchanged model outward."""
REACHED = 0.95
"""Share of resamples that must reach a goal, or no interval is given."""


def matched(
    comparison: Comparison, curves: Curves, task: str, by: str, goals: Sequence[float]
) -> dict[str, list[Estimate]]:
    """Scores of methods on a task where their damage is the same.

    Both measures are interpolated linearly between neighbouring settings of a sweep, which starts
    at the unchanged model. Where a sweep passes a goal several times, the first passage counts:
    later settings cost more for the same damage. Nothing is extrapolated, and a sweep ends before
    a setting whose damage is not finite, because the model overflowed.

    Args:
        comparison: Holds every variant and both tasks.
        curves: The sweeps.
        task: The task whose scores are compared.
        by: The task that measures damage, see `damage_of`.
        goals: Values of that measure.

    Returns:
        For each method an estimate at each goal. Its interval resamples the items of both tasks,
        the same for all variants (and for both tasks where their items have the same ids). NaN
        where the sweep does not reach the goal; NaN limits where fewer than `REACHED` of the
        resampled sweeps do.

    Raises:
        SettingError: A variant or task is unknown, two tasks' items differ between variants, or
            the strengths of a sweep are not in order.
    """
    found = _curves_at(comparison, curves, task, by, goals)
    return {method: _estimates(comparison, task, by, values) for method, values in found.items()}


def matched_difference(
    comparison: Comparison,
    curves: Curves,
    task: str,
    by: str,
    goals: Sequence[float],
    first: str,
    second: str,
) -> list[Estimate]:
    """Score of one method minus another's where their damage is the same, for each goal.

    Paired: both are resampled together. Arguments, errors and NaN as in `matched`.
    """
    for method in (first, second):
        if method not in curves:
            raise SettingError(f"no sweep of {method!r}; there are: {', '.join(curves)}")
    pair = {method: curves[method] for method in (first, second)}
    found = _curves_at(comparison, pair, task, by, goals)
    return _estimates(comparison, task, by, found[first] - found[second])


def damage_of(comparison: Comparison, variant: str, by: str) -> float:
    """A task's score, for perplexity over the unchanged model's; NaN where an item has no score.

    Raises:
        SettingError: The variant or the task is unknown.
    """
    scores, base = (_scores(comparison, name, by) for name in (variant, BASELINE))
    return scores.value() / (base.value() if scores.perplexity else 1.0)


def pareto_front(points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which settings no other one dominates, being as good in everything and better in something.

    Args:
        points: Shape (n, measures), larger is better in each; negate those where smaller is.

    Returns:
        Shape (n,). Of equal settings all are on the front; one with a NaN never is.

    Raises:
        SettingError: The points are not numbers of shape (n, measures).
    """
    try:
        table = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    if table.ndim != 2:
        raise SettingError("points must be numbers of shape (n, measures), a row for each setting")
    as_good = (table[:, None] >= table[None]).all(axis=-1)  # row i against column j
    better = (table[:, None] > table[None]).any(axis=-1)
    dominated = (as_good & better).any(axis=0)
    return np.asarray(~dominated & ~np.isnan(table).any(axis=1))


@dataclass(frozen=True)
class SweepChoice:
    """A setting chosen on validation items and reported on test items.

    Attributes:
        variant: The best on validation items; the first of equals.
        validation: Its score there, flattered by the choice.
        test: Its score on test items.
        difference: Its test score minus the unchanged model's, paired.
        p_value: Of that difference, NaN where a test item has no finite score. It needs no
            correction: only one test is made on test items.
        best_of: The gain on validation items, and what the best of as many settings would gain
            there by luck; for perplexity in nats per token.
    """

    variant: str
    validation: Estimate
    test: Estimate
    difference: Estimate
    p_value: float
    best_of: BestOf


def choose_on_validation(
    validation: Comparison,
    test: Comparison,
    task: str,
    variants: Sequence[str],
    larger_is_better: bool = True,
) -> SweepChoice:
    """Choose among settings on validation items and report the chosen one on test items.

    Args:
        validation: Every variant on validation items.
        test: At least the chosen variant on test items; the two share no item.
        task: Name of the task in both.
        variants: The settings.
        larger_is_better: False for perplexity, and for a share recited that should fall.

    A setting under which a validation item has no finite score, because the model overflowed, is
    never chosen, and not counted among those tried.

    Raises:
        SettingError: No variant, one is the unchanged model, something is unknown, or no setting
            has a finite score on every validation item.
    """
    if not variants or BASELINE in variants:
        raise SettingError(f"give variants to choose from, without {BASELINE!r}")
    sign = 1 if larger_is_better else -1
    base = _scores(validation, BASELINE, task)
    tried = {variant: _scores(validation, variant, task) for variant in variants}
    tried = {variant: one for variant, one in tried.items() if not one.not_finite}
    if base.not_finite or not tried:
        raise SettingError(
            f"{task!r}: the unchanged model, or every setting, has a validation item whose score "
            "is not finite, because the model overflowed; leave that item out"
        )
    share = base.weights / base.weights.mean()  # so that plain means are the weighted ones
    gains = np.array([sign * share * (one.values - base.values) for one in tried.values()])
    best = max(tried, key=lambda variant: sign * tried[variant].value())
    chosen, before = (_scores(test, variant, task) for variant in (best, BASELINE))
    known = not (chosen.not_finite or before.not_finite)
    found = test.cell(best, task)
    assert found.difference is not None
    return SweepChoice(
        variant=best,
        validation=validation.cell(best, task).value,
        test=found.value,
        difference=found.difference,
        p_value=paired_p_value(chosen.values, before.values, chosen.weights, seed=test.seed)
        if known
        else math.nan,
        best_of=best_of_null(gains, seed=validation.seed),
    )


def _scores(comparison: Comparison, variant: str, task: str) -> Scores:
    must_be(comparison, Comparison, "comparison")
    must_be(task, str, "task")
    must_be(variant, str, "variant")
    if task not in comparison.tasks:
        raise SettingError(f"no task {task!r}; there are: {', '.join(comparison.tasks)}")
    if variant not in comparison.results:
        raise SettingError(f"no variant {variant!r}; there are: {', '.join(comparison.results)}")
    items = comparison.results[variant][task]
    if [one.id for one in items] != _ids(comparison, task):
        raise SettingError(f"items of {task!r} differ between {variant!r} and the unchanged model")
    return Scores.of(items, comparison.tasks[task].metric)


def _ids(comparison: Comparison, task: str) -> list[str]:
    return [one.id for one in comparison.results[BASELINE][task]]


def _curves_at(
    comparison: Comparison, curves: Curves, task: str, by: str, goals: Sequence[float]
) -> dict[str, Floats]:
    """Method to scores where the damage has each goal, shape (1 + resamples, goals)."""
    for name in (task, by):
        _scores(comparison, BASELINE, name)
    damage_draws = score_draws = comparison.draws(by)
    if _ids(comparison, task) != _ids(comparison, by):
        score_draws = comparison.draws(task)
    found = {}
    for method, settings in curves.items():
        steps = np.diff([strength for strength, _ in settings])
        if not (steps > 0).all() and not (steps < 0).all():
            raise SettingError(
                f"strengths of {method!r} are not in order: list them from the setting nearest to "
                "the unchanged model outward"
            )
        names = [BASELINE, *(variant for _, variant in settings)]
        damage, scores = (
            np.stack(
                finished(
                    draws, [_scores(comparison, name, one).resampled_values() for name in names]
                ),
                axis=1,
            )
            for one, draws in ((by, damage_draws), (task, score_draws))
        )
        if comparison.tasks[by].metric == "perplexity":
            damage = damage / damage[:, :1]
        found[method] = _first_crossings(damage, scores, goals)
    return found


def _first_crossings(x: Floats, y: Floats, goals: Sequence[float]) -> Floats:
    """Where polylines (x, y) of shape (rows, points) first have x = goal, shape (rows, goals)."""
    result = np.full((len(x), len(goals)), np.nan)
    if x.shape[1] < 2:
        return result
    rows = np.arange(len(x))
    known = np.logical_and.accumulate(np.isfinite(x), axis=1)[:, 1:]
    for column, goal in enumerate(goals):
        # A goal taken from a setting itself must be found there, whatever the last digit.
        below = np.where(np.isclose(x, goal, rtol=1e-9, atol=1e-12), 0.0, x - goal)
        crosses = (below[:, :-1] * below[:, 1:] <= 0) & known
        at = crosses.argmax(axis=1)
        step = x[rows, at + 1] - x[rows, at]
        # A flat piece at the goal counts from its beginning.
        share = np.where(step == 0, 0.0, -below[rows, at] / np.where(step == 0, 1.0, step))
        value = y[rows, at] + share * (y[rows, at + 1] - y[rows, at])
        result[:, column] = np.where(crosses.any(axis=1), value, np.nan)
    return result


def _estimates(comparison: Comparison, task: str, by: str, values: Floats) -> list[Estimate]:
    n = len(_ids(comparison, task))
    fewest = min(n, len(_ids(comparison, by)))
    result = []
    for column in values.T:
        known = np.isfinite(column[0]) and np.isfinite(column[1:]).mean() >= REACHED
        limits = interval(column[1:], fewest) if known else (np.nan, np.nan)
        result.append(Estimate(float(column[0]), *limits, n))
    return result
