"""The claims of both papers over several organisms: their table, and its null run."""

import json
from collections import defaultdict
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest

import experiments.claims as claims
import kfac
import lirefs
from experiments.claims import (
    CLAIMS,
    NULL,
    effects_of,
    minus,
    swapped,
    table,
    tales_and_twins,
    verdict,
)
from lirefs.organism import Language
from lirefs.organism.language import OFTEN
from lirefs.statistics import Estimate


def an_effect(value, half=0.1):
    return Estimate(value, value - half, value + half, 40)


def line_of(text, words):
    (line,) = (line for line in text.splitlines() if words in line)
    return line


def test_verdicts_follow_the_pooled_interval():
    assert verdict(an_effect(0.2)) == "confirmed"
    assert verdict(an_effect(-0.2)) == "refuted"
    assert verdict(an_effect(0.05)) == "undecided"


def test_table_has_a_line_for_every_claim_and_every_organism_in_it():
    ours = {"bands": 0.4, "detector": -0.4, "relearning": 0.01}
    effects = {
        name: {key: an_effect(value + shift) for key, value in ours.items()}
        | {f"{NULL}detector 0": an_effect(0.02 + shift), f"{NULL}detector 1": an_effect(0.4)}
        for name, shift in (("one", -0.01), ("two", 0.0), ("three", 0.01))
    }
    text = table(effects)
    assert "Organisms: one, two, three." in text
    assert "| **confirmed** |" in line_of(text, CLAIMS["bands"].text)
    assert "+0.390, +0.400, +0.410 |" in line_of(text, CLAIMS["bands"].text)
    assert "| **refuted** |" in line_of(text, CLAIMS["detector"].text)
    assert "+1 [" in line_of(text, CLAIMS["relearning"].text)  # in points
    assert "| **undecided** |" in line_of(text, CLAIMS["relearning"].text)
    assert line_of(text, "| null run | detector") == (
        "| null run | detector | 1 of 2 left out 0 | mean +0.210 | | |"
    )
    for key, claim in CLAIMS.items():
        assert ("not measured" in line_of(text, claim.text)) == (key not in ours)


def test_an_effect_that_one_organism_lacks_is_not_pooled_over_the_rest():
    effects = {"one": {"bands": an_effect(1.0)}, "two": {}}
    assert "not measured" in line_of(table(effects), CLAIMS["bands"].text)


def test_one_organism_decides_nothing():
    text = table({"one": {"bands": an_effect(1.0)}})
    assert "| **undecided** |" in line_of(text, CLAIMS["bands"].text)


def test_difference_of_independent_estimates():
    one, other = Estimate(0.5, 0.2, 0.6, 10), Estimate(0.3, 0.1, 0.4, 20)
    gap = minus(one, other)
    assert gap.value == pytest.approx(0.2)
    assert gap.low == pytest.approx(0.2 - sqrt(0.3**2 + 0.1**2))
    assert gap.high == pytest.approx(0.2 + sqrt(0.1**2 + 0.2**2))
    assert gap.n == 30


def test_null_run_exchanges_half_of_the_pairs():
    known, unknown = np.arange(100), np.arange(100) + 1000
    ones, others = swapped(known, unknown, np.random.default_rng(0))
    assert (ones + others == known + unknown).all()  # they stay pairs
    assert 0.3 < (ones != known).mean() < 0.7


def test_tales_of_the_claims_were_shown_often_and_have_their_twins():
    tales, twins = tales_and_twins(Language(0))
    assert all((one.frequency or 0) >= OFTEN for one in tales)
    assert len(tales) == len(twins) > 40


def test_only_tales_that_the_edit_took_are_relearned(monkeypatch):
    lm, language = lirefs.load("organism"), Language(0)
    factors = kfac.collect(lm, lirefs.organism.training_texts(language, 100), layers=[3])
    edit = kfac.CurvatureEdit(factors, 0.95)
    asked = []

    def relearn(model, arms, known, rest, **options):
        asked.append((arms, [*known, *rest]))
        share = [an_effect(0.0), an_effect(0.5)]
        return SimpleNamespace(known=defaultdict(lambda: share), rest=defaultdict(lambda: share))

    monkeypatch.setattr(kfac, "relearn", relearn)
    assert claims.relearned(lm, language, edit)["faster than new"].value == 0
    (arms, told), (others, new) = asked
    assert list(arms) == ["edited", "never edited"]
    assert list(others) == ["never edited"]
    all_tales = len(tales_and_twins(language)[0])
    assert 0 < len(told) == len(new) < all_tales
    assert kfac.teacher_forced_matches(lm.model, told).all()  # all are known to the model
    assert not kfac.teacher_forced_matches(lm.model, new).any()
    with edit.apply(lm.model):
        assert not kfac.teacher_forced_matches(lm.model, told).any()


def test_finished_organism_is_read_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(claims.lirefs, "load", lambda name: pytest.fail("loads a model"))
    done = {"bands": {"value": 0.1, "low": 0.0, "high": 0.2, "n": 4}}
    (tmp_path / "effects.json").write_text(json.dumps(done))
    assert effects_of("organism", tmp_path) == {"bands": Estimate(0.1, 0.0, 0.2, 4)}
