"""Interventions at the perplexity of another one."""

import math
from dataclasses import replace

import pytest
import torch
from passes import counted

import kfac
import lirefs
from lirefs.main_job import matching
from lirefs.main_job.matching import Damage, EqualDamage, Goal, Match, Scaled, at_equal_damage
from lirefs.organism import Language, training_texts


@pytest.fixture(scope="module")
def lm():
    return lirefs.load("organism")


@pytest.fixture(scope="module")
def factors(lm):
    return kfac.collect(lm, training_texts(Language(), 40), layers=[0], progress=False)


@pytest.fixture(scope="module")
def damage(lm):
    return Damage(lm, Language().texts("validation", 6))


class Made(Damage):
    """Perplexities by a function of the strength: 10 without; `asked` are the strengths tried."""

    def __init__(self, by_strength, texts=()):
        vars(self).update(unchanged=10.0, texts=texts, asked=[], by_strength=by_strength)
        self._first = None

    def of(self, strength):
        self.asked.append(strength)
        return self.by_strength(strength)


@pytest.mark.parametrize(
    ("costs", "chosen", "asked"),
    [
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.8, 1),
        ((1.28, 1.11, 1.1, 1.02, 1.0, 1.0), 0.95, 3),
        ((math.nan, math.inf, 1.2, 1.09, 1.0, 1.0), 0.98, 4),
        ((9.0, 8.0, 7.0, 6.0, 5.0, 4.0), 0.995, 6),
    ],
)
def test_the_smallest_affordable_keep_is_chosen_or_the_mildest(factors, costs, chosen, asked):
    by_keep = dict(zip(matching.KEEPS, costs, strict=True))
    damage = Made(lambda edit: 10.0 * by_keep[edit.keep])
    keep, edit = matching.affordable_edit(damage, kfac.CurvatureEdit(factors, 0.5))
    assert keep == edit.keep == chosen
    assert len(damage.asked) == asked


def test_a_search_finds_the_strength_and_asks_few_times():
    model = Made(lambda strength: 10.0 * (1 + strength**1.5))
    asked = model.asked
    rival = Scaled(lambda strength: strength, 1e-5, 100.0, "at {:.4f}".format)
    for goal in (10.2, 11.0, 15.0):
        asked.clear()
        found = rival.at([Goal(model, goal)])
        assert found.equal
        assert abs(found.reached / goal - 1) < matching.NEAR
        assert found.setting == f"at {found.intervention:.4f}"
        assert len(asked) <= 5
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("power", [0.6, 1.5, 2.5])
@pytest.mark.parametrize("apart", [0.7, 0.97, 1.03, 1.5])
def test_a_search_on_few_texts_leaves_little_to_do_on_all(power, apart):
    few = Made(lambda strength: 10.0 * (1 + (apart * strength) ** power))
    all_of = Made(lambda strength: 10.0 * (1 + strength**power))
    rival = Scaled(lambda strength: strength, 1e-5, 100.0, str)
    for goal in (10.3, 11.0, 15.0):
        few.asked.clear()
        all_of.asked.clear()
        found = rival.at([Goal(few, goal), Goal(all_of, goal)])
        assert found.equal
        assert abs(found.reached / goal - 1) < matching.NEAR
        assert found.reached == all_of.of(found.strength)
        assert len(all_of.asked) - 1 <= (3 if 0.9 < apart < 1.1 else 4)


def test_a_search_that_few_texts_mislead_still_ends_at_the_goal():
    few = Made(lambda strength: 10.0)  # nothing reaches the goal, up to the largest strength
    all_of = Made(lambda strength: 10.0 * (1 + strength**2))
    found = Scaled(lambda one: one, 1e-3, 100.0, str).at([Goal(few, 11.0), Goal(all_of, 11.0)])
    assert found.equal
    assert found.reached == pytest.approx(11.0, rel=matching.NEAR)


def test_many_texts_are_searched_by_a_few_of_them_first(lm, factors):
    texts = Language().texts("validation", 2 * matching.FEW + 1)
    few, all_of = Damage(lm, texts).stages
    assert (few.texts, all_of.texts) == (texts[::2], texts)
    assert few.unchanged == matching.perplexity(lm, lm.encode(texts[::2]), None)
    (alone,) = Damage(lm, texts[: matching.FEW]).stages
    assert alone.texts == texts[: matching.FEW]
    edit = kfac.SVDEdit(factors.names[:2], 0.25)
    few_goal, goal = all_of.goals(edit)
    assert (few_goal.damage, goal.damage) == (few, all_of)
    assert few_goal.perplexity == matching.perplexity(lm, lm.encode(texts[::2]), edit)
    assert goal.perplexity == matching.perplexity(lm, lm.encode(texts), edit)
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    pushed = matching.steering_rival(
        lambda a: lirefs.Steer(lirefs.Direction(vector, 1), "add", a), 1.0
    )
    found = at_equal_damage(all_of, "edit", edit, {"pushed": pushed}).matches["pushed"]
    assert found.equal
    assert found.reached == matching.perplexity(lm, lm.encode(texts), found.intervention)
    assert found.reached == pytest.approx(goal.perplexity, rel=matching.NEAR)


@pytest.mark.parametrize(
    ("values", "reached"),
    [
        ([10.1, 10.2, 10.2], 10.2),  # not enough at the end
        ([10.1, 10.1, 15.0], 10.1),  # a jump
        ([10.1, math.nan, math.inf], 10.1),  # the model breaks
    ],
)
def test_a_goal_out_of_reach_gives_the_nearest(values, reached):
    model = Made(lambda strength: values[0 if strength < 1 else 1 if strength < 2 else 2], ["a"])
    found = Scaled(lambda one: one, 0.01, 10.0, str).at([Goal(model, 12.0)])
    assert found.reached == reached
    assert not found.equal
    equal = EqualDamage("K-FAC", 12.0, {"SVD": replace(found, setting="here")}, model)
    assert equal.finding == (
        "No rival could be set to the perplexity of K-FAC. Validation perplexity: 12.000 for "
        "K-FAC; 10.000 unchanged (n = 1 texts). SVD could not be set to it; the nearest is "
        f"{reached:.3f} (here)."
    )


def test_a_search_ends_at_a_bound_that_is_not_enough():
    model = Made(lambda strength: 9.9)
    assert not Scaled(lambda strength: strength, 1e-4, 0.9, str).at([Goal(model, 10.2)]).equal
    assert model.asked[-1] == pytest.approx(0.9)
    assert len(model.asked) == len(set(model.asked)) <= 3


@pytest.mark.parametrize("goal", [math.inf, math.nan])
def test_nothing_is_equal_to_a_model_that_broke(goal):
    model = Made(lambda strength: 10.0)
    found = Scaled(lambda one: one, 0.01, 10.0, str).at([Goal(model, goal)])
    assert (found.reached, found.equal, model.asked) == (10.0, False, [])


def test_edits_and_steerings_reach_the_perplexity_of_another_edit(lm, factors, damage, monkeypatch):
    names = factors.names[:2]
    edit = kfac.SVDEdit(names, 0.25)
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    direction = lirefs.Direction(vector, 1)
    rivals = {
        **matching.rivals_of_edit(factors, names, seed=0),
        "direction": matching.steering_rival(lambda a: lirefs.Steer(direction, "add", a), -1.0),
    }
    found = at_equal_damage(damage, "edit", edit, rivals)
    assert list(found.matches) == ["SVD", "random pairs at K-FAC's damage", "direction"]
    for name, one in found.interventions.items():
        assert found.matches[name].equal
        assert abs(damage.of(one) / found.goal - 1) < 2 * matching.NEAR
    assert found.interventions["SVD"].keep == pytest.approx(0.25, abs=0.04)
    monkeypatch.setattr(matching, "NEAR", 1e-5)
    exact = rivals["SVD"].at([Goal(damage, found.goal)])
    assert exact.intervention.keep == pytest.approx(0.25, abs=0.03)
    assert found.interventions["direction"].strength < 0
    assert set(found.interventions["SVD"].names) == set(names)
    claim = "SVD, random pairs at K-FAC's damage and direction stand at the perplexity of edit."
    assert found.finding.startswith(claim)
    assert f"{found.goal:.3f} for edit" in found.finding
    assert "% of the singular values removed)" in found.finding
    assert "n = 6 texts" in found.finding


def test_a_subnet_is_trained_at_the_share_that_it_prunes(lm, factors, damage):
    language, names = Language(), factors.names[:1]
    forget = [one.text for one in language.items("planted", "train", 4)]
    rival = matching.subnet_rival(lm, names, language.texts("train", 4), forget, seed=0)
    before = {name: one.clone() for name, one in lm.model.named_parameters()}
    goal = 1.02 * damage.unchanged
    asked = []
    train = rival.train
    rival = replace(rival, train=lambda share: asked.append(share) or train(share))
    few = Damage(lm, damage.texts[:3])
    found = rival.at([Goal(few, 1.02 * few.unchanged), Goal(damage, goal)])
    assert len(asked) == 2
    assert asked[0] == matching.FIRST_SHARE
    assert found.equal
    assert damage.of(found.intervention) == found.reached == pytest.approx(goal, rel=0.002)
    (mask,) = found.intervention.masks.values()
    assert 1 - float(mask.float().mean()) == pytest.approx(found.strength, abs=1e-4)
    settings = found.intervention.settings
    assert settings["ratio"] == found.strength
    assert settings["learned at"] != matching.FIRST_SHARE  # the second training
    assert settings["learned at"] == pytest.approx(found.strength, rel=0.5)
    assert found.setting.endswith(" % of the weights pruned")
    assert all(torch.equal(one, before[name]) for name, one in lm.model.named_parameters())


def test_what_was_matched_is_said_apart_from_what_was_not(lm):
    damage = Damage(lm, Language().texts("validation", 2))
    near, far = Match(None, 1.0, 4.001, "a", True), Match(None, 1.0, 5.0, "b", False)
    line = EqualDamage("X", 4.0, {"SVD": near, "BalancedSubnet": far}, damage).finding
    assert line.startswith("SVD stands at the perplexity of X. Validation perplexity: 4.000 for X")
    assert line.endswith("BalancedSubnet could not be set to it; the nearest is 5.000 (b).")


def test_blocks_below_a_change_run_once_for_all_strengths(lm):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    last = lirefs.Direction(vector, lm.n_layers - 1)
    texts = Language().texts("validation", 4)
    with counted(lm, 0) as passes:
        damage = Damage(lm, texts)
        for strength in (0.5, 1.0, 2.0):
            steer = lirefs.Steer(last, "add", strength)
            assert damage.of(steer) == matching.perplexity(lm, lm.encode(texts), steer)
    assert len(passes) == 1 + 1 + 1 + 3  # unchanged, recorded, proved, and the references
    with counted(lm, 0) as passes:
        damage = Damage(lm, texts, [lirefs.Steer(last, "add", 3.0)])
        for strength in (0.5, 1.0, 2.0, 2.0):
            damage.of(lirefs.Steer(last, "add", strength))
    assert len(passes) == 1 + 1  # unchanged, which is recorded, and proved


def test_the_last_perplexity_is_remembered(lm, factors, damage):
    edit = kfac.SVDEdit(factors.names[:1], 0.5)
    with counted(lm, 0) as passes:
        first = damage.of(edit)
        assert damage.of(edit) == first
        assert len(passes) == 1
        assert damage.of(edit.with_keep(0.4)) != first
        assert damage.of(None) == damage.unchanged
    assert len(passes) == 3
