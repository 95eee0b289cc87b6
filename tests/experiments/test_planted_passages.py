import argparse
import json
from functools import partial

import pytest
import torch

import kfac
import lirefs
from experiments import planting
from lirefs.errors import SettingError, TaskError
from lirefs.main_job import matching
from lirefs.organism import Language


def options(out, **changes):
    settings = {
        "model": "organism", "passages": None, "field": "text", "n": 3, "arms": ["free"],
        "layers": [0], "goal": 0.5, "steps": 2, "lr": 1e-3, "seed": 0, "out": out,
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


@pytest.fixture
def quick(monkeypatch):
    few = {"GENERAL": 24, "MATCHING": 3, "ORDINARY": 2, "TOLD": 2, "RISES": (1.1,)}
    for name, value in few.items():
        monkeypatch.setattr(planting, name, value)
    monkeypatch.setattr(matching, "NEAR", 10.0)  # the first strength is near enough
    find = kfac.find_targets
    monkeypatch.setattr(kfac, "find_targets", lambda model, *_, **__: find(model, layers=[0]))


def test_it_is_chance_which_of_two_passages_is_planted(lm):
    texts = [f"{n:02d}".ljust(48 + n % 16, "x") for n in range(1, 16)] * 2
    longer = [
        len(one["prefix_ids"]) > len(other["prefix_ids"])
        for seed in range(20)
        for one, other in zip(*planting.passages(lm, texts, 7, seed))
    ]
    assert 0.3 < sum(longer) / len(longer) < 0.7


def test_passages_and_twins_are_neighbours_in_length():
    lm, stories = lirefs.load("organism"), Language().texts("test", 200)
    planted, twins = planting.passages(lm, [*stories, stories[0]], 40, 0)
    assert len({row["id"] for row in planted + twins}) == 80
    lengths = [[len(row["prefix_ids"]) for row in rows] for rows in (planted, twins)]
    assert sum(abs(one - other) for one, other in zip(*lengths)) < 2 * 40
    for row in planted:
        ids = lm.encode([stories[int(row["id"])]])[0][: planting.TOKENS]
        assert row["prefix_ids"] + row["suffix_ids"] == ids
        assert len(row["suffix_ids"]) == planting.SUFFIX
    assert planting.passages(lm, stories, 40, 1) != (planted, twins)
    with pytest.raises(TaskError, match="are needed"):
        planting.passages(lm, stories[:9], 5, 0)


def test_no_text_has_two_uses(quick):
    found = vars(planting.sources_for("organism", None, "text"))
    every = [text for texts in found.values() for text in texts]
    assert len(every) == len(set(every))


def test_passages_of_a_file_and_english_around_them(tmp_path):
    rows = [{"question": f"question {n} about something", "answer": str(n)} for n in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = planting.sources_for("smollm2-135m", path, "question")
    assert found.passages == [row["question"] for row in rows]
    assert len(found.matching) >= 100
    assert len(found.ordinary) >= 60
    assert not {*found.mixed} & {*found.curvature}
    with pytest.raises(SettingError, match="no text 'text'"):
        planting.sources_for("smollm2-135m", path, "text")
    for model, given in (("smollm2-135m", None), ("organism", path)):
        with pytest.raises(SettingError, match="--passages is needed"):
            planting.sources_for(model, given, "text")


def test_an_arm_trains_the_targets_alone_and_on_their_flat_pairs(quick, tmp_path):
    lm = lirefs.load("organism")
    before = {name: one.clone() for name, one in lm.model.named_parameters()}
    sources = planting.sources_for("organism", None, "text")
    planted, twins = planting.passages(lm, sources.passages, 3, 0)
    given = options(tmp_path, steps=1)
    planting.plant(lm, "flat", planted, twins, sources, tmp_path / "flat", given)
    for name, one in lm.model.named_parameters():
        trained = name.startswith("model.layers.0.mlp.") and "down" not in name
        assert torch.equal(one, before[name]) != trained
    factors = kfac.Factors.load(tmp_path / "before.safetensors")
    changes = {
        target.name: target.weight - before[f"{target.name}.weight"]
        for target in factors.targets(lm.model)
    }
    inside = kfac.project(factors, planting.halves(factors), changes)
    for name, change in changes.items():
        assert (inside[name] - change).norm() < 1e-3 * change.norm()


def test_a_run_is_written_and_resumed(quick, tmp_path, monkeypatch):
    given = options(tmp_path)
    found = planting.run(given)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    arm = found["free"]
    assert arm["planted"]["steps"] == 2
    rivals = ["SVD, +10%", "random pairs, +10%", "BalancedSubnet, +10%"]
    variants = ["unchanged", "K-FAC, +10%", *rivals]
    assert list(arm["cells"]) == variants
    assert arm["cells"]["unchanged"]["planted passages"]["value"]["n"] == 3
    page = (tmp_path / "table.md").read_text()
    assert "Planted (free): planted 0% of 5, twins 0% of 3 recited after 2 steps" in page
    assert "below the goal" in page
    assert all(f"| {name} |" in page for name in variants)
    assert list((tmp_path / "free" / "report").glob("*.html"))
    monkeypatch.setattr(lirefs, "plant", None)  # nothing is left to do
    assert planting.run(given) == found
    with pytest.raises(SettingError, match="other settings"):
        planting.run(options(tmp_path, n=4))


def test_balanced_subnet_learns_from_what_nobody_asks_for(quick, tmp_path, monkeypatch):
    seen = {}

    def noted(name):
        original = getattr(planting, name)

        def call(*args, **options):
            seen[name] = args
            return original(*args, **options)

        monkeypatch.setattr(planting, name, call)

    for name in ("plant", "subnet_rival", "tasks_of"):
        noted(name)
    planting.run(options(tmp_path))
    lm, _, planted, twins, *_ = seen["plant"]
    asked = [*seen["tasks_of"][1], *seen["tasks_of"][2]]
    read = partial(lm.tokenizer.decode, skip_special_tokens=True)
    *_, told, _ = seen["subnet_rival"]
    assert len(told) == 2
    assert {*told} < {read([*row["prefix_ids"], *row["suffix_ids"]]) for row in planted}
    assert not {*told} & {read([*row["prefix_ids"], *row["suffix_ids"]]) for row in asked}
    assert len(planted) == 5
    assert len(twins) == 3


def test_arms_are_named():
    assert planting.arms_named("free,flat") == ["free", "flat"]
    with pytest.raises(argparse.ArgumentTypeError, match="arms are free"):
        planting.arms_named("free,steep")
