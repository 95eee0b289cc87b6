import json

import pytest
import torch

import kfac
import lirefs
from experiments import write_flat
from lirefs.errors import SettingError
from lirefs.organism import Language


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"TEXTS": 6, "MOST_EPOCHS": 1, "BISECTIONS": 1}.items():
        monkeypatch.setattr(write_flat, name, value)
    find = kfac.find_targets
    monkeypatch.setattr(kfac, "find_targets", lambda model, **_: find(model, layers=[0]))
    monkeypatch.setattr(write_flat, "TASKS", ("common facts", "rare facts", "stories"))


def test_new_facts_are_about_strangers():
    language = Language()
    facts = write_flat.new_facts(language, 40, 0)
    assert len({question for question, _ in facts}) == 40
    assert not any(person in question for question, _ in facts for person in language.known)


def test_halves_are_halves_and_training_stays_on_them(quick):
    lm, language = lirefs.load("organism"), Language()
    targets = kfac.find_targets(lm.model, layers=[0])
    factors = kfac.collect(lm, language.texts("train", 4), targets, progress=False)
    keeps = write_flat.halves(factors)
    for one in kfac.CurvatureEdit(factors, keeps).report():
        assert one.kept_share == pytest.approx(0.5, abs=0.02)
    facts = write_flat.new_facts(language, 8, 0)
    before = [target.weight.clone() for target in targets]
    for arm, share in (("flat", 1.0), ("sharp", 0.0)):
        _, record = write_flat.teach(lm, factors, keeps, facts, arm, 1e-3, 0)
        assert record["flat_share"] == pytest.approx(share, abs=1e-5)
        assert record["steps"] == 1
        assert record["norm"] > 0
        for target, start in zip(targets, before):
            assert torch.equal(target.weight, start)
            assert target.parameter.grad is None


@pytest.mark.slow
def test_a_run_is_written_and_resumed(quick, tmp_path, monkeypatch):
    results = write_flat.run(tmp_path, 6, 3, 1e-3, 0)
    assert set(results["cost"]) == set(write_flat.ARMS)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "| new facts, change against that of free |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "write_flat.png").read_bytes().startswith(b"\x89PNG")
    for name in ("teach", "edited"):
        monkeypatch.setattr(write_flat, name, None)  # nothing is left to do
    assert write_flat.run(tmp_path, 6, 3, 1e-3, 0) == results
    with pytest.raises(SettingError, match="other settings"):
        write_flat.run(tmp_path, 7, 3, 1e-3, 0)
