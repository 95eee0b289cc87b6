import io
import math

import numpy as np
import pytest
from PIL import Image

from lirefs.comparison import (
    Comparison,
    TaskInfo,
    choose_on_validation,
    damage_of,
    matched,
    matched_difference,
    pareto_front,
    pareto_fronts,
)
from lirefs.errors import SettingError
from lirefs.statistics.intervals import interval, resample_counts
from lirefs.statistics.significance import best_of_null, mcnemar, sign_flip
from lirefs.tasks.task import ItemResult

TASKS = {
    "skill": TaskInfo("reasoning", "accuracy"),
    "recited": TaskInfo("memorization", "strict"),
    "texts": TaskInfo("language", "perplexity"),
}


def shares(prefix, metric, values):
    return [ItemResult(f"{prefix}{i}", {metric: float(one)}) for i, one in enumerate(values)]


def texts(per_token, tokens):
    return [
        ItemResult(f"t{i}", {"nll": float(nats * count)}, weight=float(count))
        for i, (nats, count) in enumerate(zip(per_token, tokens))
    ]


def counted(skill, recited, ratio, n=20):
    """A variant with so many items right, and each text's perplexity raised by the same ratio."""
    per_token, tokens = np.linspace(2, 4, 6) + math.log(ratio), np.arange(10, 70, 10)
    return {
        "skill": shares("s", "accuracy", np.arange(n) < skill),
        "recited": shares("r", "strict", np.arange(n) < recited),
        "texts": texts(per_token, tokens),
    }


@pytest.fixture
def hand():
    results = {
        "unchanged": counted(16, 20, 1.0),
        "a weak": counted(12, 10, 1.1),
        "a strong": counted(8, 2, 1.3),
        "b weak": counted(14, 12, 1.2),
        "b wild": counted(10, 16, 1.05),
        "b strong": counted(4, 4, 1.5),
    }
    return Comparison(results, TASKS, resamples=400)


A = [(1.0, "a weak"), (2.0, "a strong")]
B = [(0.9, "b weak"), (0.6, "b wild"), (0.3, "b strong")]


def values(estimates):
    return [one.value for one in estimates]


def test_matched_perplexity_by_hand(hand):
    found = matched(hand, {"a": A}, "skill", "texts", [1.0, 1.05, 1.1, 1.2, 1.3, 1.31, 0.99])["a"]
    assert values(found[:5]) == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])
    assert all(math.isnan(one.value) and math.isnan(one.low) for one in found[5:])
    assert found[0].n == 20
    assert damage_of(hand, "a strong", "texts") == pytest.approx(1.3)


def test_matched_forgetting_by_hand(hand):
    found = matched(hand, {"a": A}, "skill", "recited", [0.75, 0.5, 0.3, 0.05])["a"]
    assert values(found) == pytest.approx([0.7, 0.6, 0.5, math.nan], nan_ok=True)
    found = matched(hand, {"a": A}, "texts", "recited", [0.5])["a"]  # perplexity itself can be read
    assert found[0].value == pytest.approx(hand.cell("a weak", "texts").value.value)


def test_a_sweep_that_turns_back_counts_where_it_first_passes(hand):
    # b: 1 -> 1.2 -> 1.05 -> 1.5 in perplexity, 0.8 -> 0.7 -> 0.5 -> 0.2 in skill.
    found = matched(hand, {"b": B}, "skill", "texts", [1.1, 1.2, 1.3])["b"]
    assert values(found) == pytest.approx([0.75, 0.7, 0.5 - 0.3 * 0.25 / 0.45])


def test_intervals_against_resampling_item_by_item(hand):
    goals, curves = [1.07, 1.25], {"a": A, "b": B[::2]}
    counts = {
        task: resample_counts(len(hand.results["unchanged"][task]), 400, index)
        for index, task in enumerate(TASKS)
    }

    def resampled(names, row):
        x, y = [], []
        for name in names:
            items = hand.results[name]
            weight = [one.weight for one in items["texts"]] * counts["texts"][row]
            nll = [one.scores["nll"] for one in items["texts"]] * counts["texts"][row]
            x.append(math.exp(nll.sum() / weight.sum()))
            right = np.array([one.scores["accuracy"] for one in items["skill"]])
            y.append(np.average(right, weights=counts["skill"][row]))
        return np.interp(goals, np.array(x) / x[0], y)

    one = np.array([resampled(["unchanged", "a weak", "a strong"], i) for i in range(400)])
    other = np.array([resampled(["unchanged", "b weak", "b strong"], i) for i in range(400)])
    found = matched(hand, curves, "skill", "texts", goals)["a"]
    gap = matched_difference(hand, curves, "skill", "texts", goals, "a", "b")
    for column in range(2):
        spread = interval(one[:, column], 6)  # of the two tasks the texts are fewer
        assert (found[column].low, found[column].high) == pytest.approx(spread)
        spread = interval((one - other)[:, column], 6)
        assert (gap[column].low, gap[column].high) == pytest.approx(spread)
        assert gap[column].high - gap[column].low < found[column].high - found[column].low


def test_the_same_items_are_resampled_together(hand):
    # Read against itself a share is what it is matched to, in every resample.
    one = matched(hand, {"a": A}, "recited", "recited", [0.5])["a"][0]
    assert one.low == pytest.approx(0.5)
    assert one.high == pytest.approx(0.5)
    twice = {"a": A, "same": A}
    gap = matched_difference(hand, twice, "skill", "recited", [0.5], "a", "same")[0]
    assert gap.value == gap.low == gap.high == 0


def test_limits_are_left_out_where_few_resamples_reach_the_goal(hand):
    # Recitation ends at 2 of 20: in nearly half the resamples it stays above 0.1.
    one = matched(hand, {"a": A}, "skill", "recited", [0.1])["a"][0]
    assert one.value == pytest.approx(0.4)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_named_errors(hand):
    for task, by in (("x", "texts"), ("skill", "x")):
        with pytest.raises(SettingError, match="no task 'x'; there are: skill"):
            matched(hand, {"a": A}, task, by, [1.1])
    with pytest.raises(SettingError, match="no variant 'x'"):
        matched(hand, {"a": [(1.0, "x")]}, "skill", "texts", [1.1])
    with pytest.raises(SettingError, match="not in order"):
        matched(hand, {"a": [*A, (1.5, "b weak")]}, "skill", "texts", [1.1])
    with pytest.raises(SettingError, match="no sweep of 'c'"):
        matched_difference(hand, {"a": A}, "skill", "texts", [1.1], "a", "c")
    with pytest.raises(SettingError, match="variants to choose from"):
        choose_on_validation(hand, hand, "skill", [])
    with pytest.raises(SettingError, match="variants to choose from"):
        choose_on_validation(hand, hand, "skill", ["a weak", "unchanged"])
    other = {**hand.results, "a weak": {**hand.results["a weak"], "skill": shares("x", "a", [1])}}
    with pytest.raises(SettingError, match="items of 'skill' differ"):
        matched(Comparison(other, TASKS), {"a": A}, "skill", "texts", [1.1])


def test_matched_intervals_cover_the_truth():
    # Skill falls from 0.8 to 0.64 and 0.4 (a) or 0.7 and 0.5 (b); perplexity rises by a factor
    # exp(0.1) and exp(0.3), or exp(0.15) and exp(0.35), unevenly over texts.
    generator = np.random.default_rng(0)
    sweeps = {"a": ((0.8, 0.1), (0.5, 0.3)), "b": ((0.875, 0.15), (0.625, 0.35))}
    curves = {method: [(1.0, f"{method}0"), (2.0, f"{method}1")] for method in sweeps}
    goal, places = 1.2, {}
    for method, ((kept, rise), (end, top)) in sweeps.items():
        x = np.exp([0, rise, top])
        places[method] = np.interp(goal, x, 0.8 * np.array([1, kept, end]))
    held, repeats = dict.fromkeys([*sweeps, "difference"], 0), 400
    for repeat in range(repeats):
        able, luck = generator.random(80) < 0.8, generator.random(80)
        nats, tokens = generator.normal(3, 0.5, 30), generator.integers(30, 300, 30)
        results = {"unchanged": (able, nats)}
        for method, settings in sweeps.items():
            for index, (kept, rise) in enumerate(settings):
                noise = rise * generator.gamma(4, 0.25, 30)
                results[f"{method}{index}"] = able & (luck < kept), nats + noise
        comparison = Comparison(
            {
                name: {"skill": shares("s", "accuracy", right), "texts": texts(one, tokens)}
                for name, (right, one) in results.items()
            },
            {task: TASKS[task] for task in ("skill", "texts")},
            resamples=300,
            seed=repeat,
        )
        found = matched(comparison, curves, "skill", "texts", [goal])
        for method, (one,) in found.items():
            held[method] += one.low <= places[method] <= one.high
        (gap,) = matched_difference(comparison, curves, "skill", "texts", [goal], "b", "a")
        held["difference"] += gap.low <= places["b"] - places["a"] <= gap.high
    for times in held.values():
        assert 0.93 <= times / repeats <= 0.97


def test_pareto_front_against_every_pair():
    points = np.random.default_rng(1).integers(0, 6, (40, 2)).astype(float)

    def dominated(one):
        return any((other >= one).all() and (other > one).any() for other in points)

    assert pareto_front(points).tolist() == [not dominated(one) for one in points]
    assert pareto_front([(1, 2), (1, 2), (2, 1), (0, 1), (math.nan, 9)]).tolist() == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_choice_is_made_on_validation_and_reported_on_test(hand):
    test = Comparison(
        {**hand.results, "b weak": counted(9, 12, 1.2), "a weak": counted(19, 10, 1.1)}, TASKS
    )
    names = [name for name in hand.variants if name != "unchanged"]
    found = choose_on_validation(hand, test, "skill", names)
    assert found.variant == "b weak"  # best on validation, though not on test
    assert found.validation.value == pytest.approx(14 / 20)
    assert found.test.value == pytest.approx(9 / 20)
    assert found.difference.value == pytest.approx(-7 / 20)
    assert found.p_value == mcnemar(0, 7)
    assert (found.best_of.k, found.best_of.observed) == (5, pytest.approx(-2 / 20))
    table = [
        [float(row < right) - float(row < 16) for row in range(20)] for right in (12, 8, 14, 10, 4)
    ]
    assert found.best_of == best_of_null(table)
    found = choose_on_validation(hand, test, "recited", names, larger_is_better=False)
    assert found.variant == "a strong"
    assert found.best_of.observed == pytest.approx(18 / 20)
    assert found.best_of.p_value < 0.01


def test_a_choice_by_perplexity_is_weighted_by_tokens(hand):
    found = choose_on_validation(hand, hand, "texts", ["a weak", "b wild"], larger_is_better=False)
    assert found.variant == "b wild"
    assert found.best_of.observed == pytest.approx(-math.log(1.05))
    assert found.difference.value > 0
    # The same rise in every text: two of 2^6 sign patterns are as extreme.
    assert found.p_value == sign_flip([1.0] * 6, weights=np.arange(10, 70, 10)) == 2 / 64


def test_figure_fits_a_column(hand):
    labels = ("perplexity", "share solved")
    png = pareto_fronts(hand, {"a": A, "b": B}, "skill", "texts", labels).png
    assert Image.open(io.BytesIO(png)).size[0] == int(3.4 * 220)
