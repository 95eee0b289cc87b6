import json
import re
import sys
from functools import partial

import numpy as np
import pytest
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from experiments import recited
from lirefs.errors import SettingError
from lirefs.files import read_jsonl
from lirefs.main_job import matching
from lirefs.model.language_model import wrap
from lirefs.tasks import token_nlls


def runs(text, words=10):
    found = re.findall(r"\w+", text.lower())
    return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}


@pytest.fixture
def files(lm, tmp_path):
    """A file of passages that the tiny model recites, and one of others."""
    known = []
    for number in range(4):
        start = lm.encode([f"passage {number} of the file"])[0]
        known.append((start, lirefs.tasks.inference.greedy(lm, [start], 6)[0]))
    rows = {
        "known": [{"prefix_ids": one, "suffix_ids": other} for one, other in known],
        "other": [{"text": f"{word} texts", "suffix_tokens": 6} for word in ("some", "more", "my")],
    }
    for number, row in enumerate(rows["known"] + rows["other"]):
        row["source"] = f"Sequence: {number}" if number % 2 else f"A page ({number})"
    for name, some in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    return tmp_path / "known.jsonl", tmp_path / "other.jsonl"


def test_shipped_passages_of_the_same_sources_share_no_run_of_ten_words():
    known, other = (
        [row for _, row in read_jsonl(path)] for path in (recited.RECITED, recited.UNRECITED)
    )
    assert len(other) >= 70
    assert all(row.keys() == known[0].keys() for row in other)
    assert len({row["text"] for row in other}) == len({row["id"] for row in other}) == len(other)
    shared = set().union(*(runs(row["text"]) for row in known))
    assert not [row["id"] for row in other if runs(row["text"]) & shared]
    kinds = [{recited.kind_of(row["source"]) for row in rows} for rows in (known, other)]
    assert kinds[0] == kinds[1] == {"Sequence", "Definition", "Code boilerplate", "Document"}
    for kind in kinds[0]:  # in about the same shares
        shares = [
            sum(recited.kind_of(row["source"]) == kind for row in rows) / len(rows)
            for rows in (known, other)
        ]
        assert abs(shares[0] - shares[1]) < 0.1


@pytest.mark.weights
def test_smollm2_recites_one_file_and_not_the_other():
    lm = lirefs.load("smollm2-135m")
    for path, yes in ((recited.RECITED, True), (recited.UNRECITED, False)):
        assert len(recited.read_passages(lm, path, yes).kinds) == len(list(read_jsonl(path)))


def test_passages_are_sorted_by_what_the_model_recites(lm, files):
    known, other = (recited.read_passages(lm, path, yes) for path, yes in zip(files, (True, False)))
    assert len(known.kinds) == 4
    assert len(other.kinds) == 3
    for side in (known, other):
        for (_, prefix, suffix), loss in zip(side.task.items, side.losses):
            (nll,) = token_nlls(lm, [[*prefix, *suffix]])
            assert float(nll[len(prefix) - 1 :].mean()) == pytest.approx(loss, rel=1e-5)
    with pytest.raises(SettingError, match="recites 0 of 3"):
        recited.read_passages(lm, files[1], True)
    groups = recited.groups_of([known, other])
    assert groups["all"] == [[0, 1, 2, 3], [0, 1, 2]]
    assert groups["Document"] == [[0, 2], [0, 2]]
    assert "Sequence" not in groups  # of one of the others only


def test_rises_are_those_of_the_edit(files):
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny-llama")
    sides = [recited.read_passages(lm, path, yes) for path, yes in zip(files, (True, False))]
    targets = kfac.find_targets(lm.model, layers=[1])
    edit = kfac.SVDEdit([target.name for target in targets], 0.2)
    found = recited.measured(lm, {"nothing": None, "SVD": edit}, sides)
    assert found["nothing"]["recited"][0].value == 1
    for one in found["nothing"]["rises"].values():
        assert [part.value for part in one] == [0, 0, 0]
    with edit.apply(lm.model):
        after = [recited.suffix_losses(lm, side.task) for side in sides]
    known, other, gap = found["SVD"]["rises"]["all"]
    assert known.value == pytest.approx((after[0] - sides[0].losses).mean())
    assert other.value == pytest.approx((after[1] - sides[1].losses).mean())
    assert gap.value == pytest.approx(known.value - other.value)
    assert gap.low < gap.value < gap.high
    again = [recited.suffix_losses(lm, side.task) for side in sides]
    assert all(np.allclose(one, side.losses) for one, side in zip(again, sides))


def test_a_passage_is_read_under_the_fit_that_has_not_seen_its_source(files, monkeypatch):
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny-llama")
    sides = [recited.read_passages(lm, path, yes) for path, yes in zip(files, (True, False))]
    known = sides[0]
    told = []
    monkeypatch.setattr(recited, "subnet_rival", lambda *args: told.append(args[3]))
    recited.subnets(lm, ["a"], known, ["general"], 0)
    read = partial(lm.tokenizer.decode, skip_special_tokens=True)
    texts = [read([*first, *rest]) for _, first, rest in known.task.items]
    assert [[texts.index(one) for one in half] for half in told] == [
        np.flatnonzero(known.second).tolist(),
        np.flatnonzero(~known.second).tolist(),
    ]
    targets = [target.name for target in kfac.find_targets(lm.model, layers=[1])]
    edit = kfac.SVDEdit(targets, 0.2)
    under = recited.read_under(lm, edit, sides)
    crossed = recited.read_under(lm, (edit, None), sides)  # the first has seen the second half
    for side, (losses, strict), (mixed, recited_still) in zip(sides, under, crossed):
        assert (mixed == np.where(side.second, side.losses, losses)).all()
        assert (recited_still[~side.second] == strict[~side.second]).all()
    with pytest.raises(SettingError, match="several sources"):
        recited.subnets(lm, ["a"], known.only(np.flatnonzero(known.second)), ["general"], 0)


def test_forms_of_one_source_are_in_one_half():
    for one, other in [
        ("MIT licence (wrapped)", "MIT licence (in comments)"),
        ("Sequence: months with numbers", "Sequence: months as Python strings"),
        ("Sequence: months", "Sequence: months with numbers"),
    ]:
        assert recited.second_half(one) == recited.second_half(other)
    assert len({recited.second_half(f"document {n}") for n in range(8)}) == 2


def test_the_command(files, tmp_path, monkeypatch, capsys):
    lm = wrap(fresh_model("llama"), tiny_tokenizer(), name="tiny-llama")
    monkeypatch.setenv("LIREFS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lirefs, "load", lambda name: lm)
    monkeypatch.setattr(recited, "calibration_texts", lambda: ["a text", "another text"])
    monkeypatch.setattr(recited, "heldout_texts", lambda split: [("1", "one"), ("2", "and two")])
    monkeypatch.setattr(matching, "NEAR", 10.0)  # the first strength is near enough
    given = ["--recited", files[0], "--unrecited", files[1], "--layers", 1, "--out", tmp_path / "o"]
    monkeypatch.setattr(sys, "argv", ["recited", *map(str, given)])
    recited.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "o" / "recited.md").read_text() in printed
    assert "4 recited and 3 unrecited passages" in printed
    assert "| K-FAC | layers 1; keep 0.8 |" in printed
    assert "| SVD | all | 4 and 3 |" in printed
    assert "| BalancedSubnet | all | 4 and 3 |" in printed
    assert "fit 1" not in printed.partition("| edit |")[2]
    record = json.loads((tmp_path / "o" / "recited.json").read_text())
    assert [len(one) for one in record["K-FAC"]["losses"]] == [4, 3]
