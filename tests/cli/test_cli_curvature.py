import itertools
import json
import os
import signal

import command_line
import pytest
import torch
from tiny import fresh_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import kfac
from kfac.collection import batches
from lirefs.cli import curvature
from lirefs.tasks import default_suite

PNG = b"\x89PNG"
TEXTS = ["the sun sets red", "one two three", "abc def ghi jkl", "zebra crossing", "my own text"]


def run(monkeypatch, *arguments):
    return command_line.run(monkeypatch, "curvature", *arguments)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model on disk that recites TEXTS, and the texts."""
    folder = tmp_path_factory.mktemp("curvature")
    model, tokenizer = fresh_model("llama", num_hidden_layers=2), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [{"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in TEXTS]
    for _ in range(80):
        loss = sum(kfac.analysis.losses.passage_losses(model, one).mean() for one in batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    jsonl(folder / "texts.jsonl", [{"text": f"sample {i} of plain text"} for i in range(8)])
    jsonl(folder / "memorized.jsonl", [{"text": text, "suffix_tokens": 5} for text in TEXTS])
    return folder


@pytest.fixture(scope="module")
def factors(made):
    with pytest.MonkeyPatch.context() as patch:
        path = made / "f.safetensors"
        arguments = ["--model", made / "model", "--texts", made / "texts.jsonl", "--layers", "0,1"]
        assert run(patch, "collect", *arguments, "--out", path) == 0
    return path


def test_collect(made, factors):
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    known = kfac.Factors.load(factors, model)
    assert len(known.names) == 4
    assert set(known.provenance) >= {"data", "model", "tokenizer"}


def test_an_interrupted_collection_continues_in_both_passes(made, factors, tmp_path, monkeypatch):
    out = tmp_path / "f.safetensors"
    arguments = ["--model", made / "model", "--texts", made / "texts.jsonl", "--layers", "0,1"]
    arguments += ["--estimators", "kfac,ekfac", "--out", out]
    monkeypatch.setitem(kfac.collect.__kwdefaults__, "batch_tokens", 64)
    monkeypatch.setattr(batches.module_and_batches, "__defaults__", (64,))
    add, calls = kfac.collection.correct._CorrectionSums.add_gradient, []

    def counted(*call):
        calls.append(1)
        if len(calls) == 6:  # of four targets: in the second batch
            signal.raise_signal(signal.SIGINT)
        add(*call)

    monkeypatch.setattr(kfac.collection.correct._CorrectionSums, "add_gradient", counted)
    assert run(monkeypatch, "collect", *arguments) == 130
    states = ["f.safetensors.checkpoint", "f.safetensors.ekfac-checkpoint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == states
    assert run(monkeypatch, "collect", *arguments) == 0
    assert len(calls) == 4 * 4  # no batch twice
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    assert "ekfac" in kfac.Factors.load(out).estimators


def test_edit_saves_a_model_for_transformers(made, factors, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "edited"
    arguments = ["--model", made / "model", "--factors", factors, "--keep", "0.5", "--out", out]
    mask = os.umask(0o027)
    try:
        assert run(monkeypatch, "edit", *arguments) == 0
    finally:
        os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert "pairs kept" in capsys.readouterr().out
    edited = AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(made / "model")
    AutoTokenizer.from_pretrained(out)
    with kfac.CurvatureEdit(kfac.Factors.load(factors), 0.5).apply(plain):
        for a, b in zip(edited.parameters(), plain.parameters()):
            assert torch.equal(a, b)
    record = json.loads((out / "curvature_edit.json").read_text())
    assert record["keep"] == 0.5
    assert [path.name for path in out.parent.iterdir()] == ["edited"]
    assert run(monkeypatch, "edit", *arguments) == 2  # the folder exists now
    assert "SettingError" in capsys.readouterr().err


def test_edit_writes_small_files_and_reports_first(made, factors, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lirefs.cli.options.SHARD", "20KB")
    out = tmp_path / "edited"
    arguments = ["--model", made / "model", "--factors", factors, "--keep", "0.5", "--out", out]
    printed = []
    written = PreTrainedModel.save_pretrained

    def save(model, *folder, **options):
        printed.append(capsys.readouterr().out)
        written(model, *folder, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    assert run(monkeypatch, "edit", *arguments) == 0
    assert "pairs kept" in printed[0]
    assert len(list(out.glob("*.safetensors"))) > 2
    edited = AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(made / "model")
    kfac.CurvatureEdit(kfac.Factors.load(factors), 0.5).bake(plain)
    for a, b in zip(edited.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bands(made, factors, tmp_path, monkeypatch, capsys):
    # Of seven texts the model recites five.
    rows = [{"text": text, "suffix_tokens": 5} for text in [*TEXTS, "never seen", "nor this one"]]
    texts = jsonl(tmp_path / "m.jsonl", rows)
    arguments = ["--model", made / "model", "--factors", factors, "--out", tmp_path / "b"]
    arguments += ["--memorized", texts, "--clean", made / "texts.jsonl"]
    assert run(monkeypatch, "bands", *arguments) == 0
    assert "recites 5 of 7" in capsys.readouterr().err
    assert (tmp_path / "b" / "bands.png").read_bytes().startswith(PNG)
    numbers = json.loads((tmp_path / "b" / "bands.json").read_text())
    assert numbers["texts"] == [5, 8]
    assert len(numbers["ratio"][0]) == 2  # gate and up share their input


def test_detect(made, factors, tmp_path, monkeypatch, capsys):
    rows = [{"text": text, "label": "memorized"} for text in TEXTS]
    rows += [{"text": f"sample {i} of plain text", "label": "clean"} for i in range(8)]
    texts = jsonl(tmp_path / "t.jsonl", rows)
    arguments = ["--model", made / "model", "--factors", factors, "--out", tmp_path / "d"]
    assert run(monkeypatch, "detect", *arguments, "--texts", texts) == 0
    assert "AUROC by text" in capsys.readouterr().out
    lines = [json.loads(x) for x in (tmp_path / "d" / "scores.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    joined = "".join(word for word, _ in lines[1]["tokens"])
    assert joined.replace("<s>", "") == TEXTS[1]
    area = json.loads((tmp_path / "d" / "detector.json").read_text())
    assert 0 <= area["token_auroc"] <= 1
    assert area["auroc"]["value"] > 0.8
    # Of the default passages only those that the model recites are called memorized.
    folder = tmp_path / "data"
    folder.mkdir()
    passages = [{"id": str(i), "text": text} for i, text in enumerate([*TEXTS[:2], "x" * 20])]
    jsonl(folder / "passages.jsonl", [one | {"suffix_tokens": 5} for one in passages])
    monkeypatch.setattr(curvature, "DATA", folder)
    monkeypatch.setattr(default_suite, "heldout_texts", lambda split: [("2", "some other text")])
    arguments[-1] = tmp_path / "g"
    assert run(monkeypatch, "detect", *arguments) == 0
    assert "recites 2 of 3" in capsys.readouterr().err
    lines = [json.loads(x) for x in (tmp_path / "g" / "scores.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["memorized", "memorized", "clean"]
    # Without labels there are scores and no figure.
    arguments[-1] = tmp_path / "e"
    assert run(monkeypatch, "detect", *arguments, "--texts", made / "texts.jsonl") == 0
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["scores.jsonl"]


def test_relearn(made, factors, tmp_path, monkeypatch):
    arguments = ["--model", made / "model", "--factors", factors, "--out", tmp_path / "r"]
    arguments += ["--memorized", made / "memorized.jsonl", "--keep", "0.5", "--steps", "0,2"]
    long = [(str(i), f"some other text {i}, " * 4) for i in range(3)]
    monkeypatch.setattr(default_suite, "heldout_texts", lambda split: long)
    given, plain = [], kfac.relearn

    def watched(model, arms, known, rest, *, other, **settings):
        given.extend([known, other])
        return plain(model, arms, known, rest, other=other, **settings)

    monkeypatch.setattr(kfac, "relearn", watched)
    assert run(monkeypatch, "relearn", *arguments) == 0
    known, other = given
    assert len(other) == 3
    # A step on other text reads and counts as many tokens as one on a passage.
    for one, two in zip(other, itertools.cycle(known)):
        assert one["input_ids"].shape == two["input_ids"].shape
        assert torch.equal(one["labels"] == -100, two["labels"] == -100)
    assert (tmp_path / "r" / "relearning.png").read_bytes().startswith(PNG)
    arms = json.loads((tmp_path / "r" / "relearning.json").read_text())["arms"]
    assert set(arms) == {"edited", "never edited", "edited (other text)"}
    assert arms["never edited"]["rest"][0]["value"] == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["collect", "--out", "f", "--layers", "x"], "SettingError"),
        (["collect", "--out", "f", "--estimators", "magic"], "SettingError"),
        (["collect", "--out", "f", "--texts", "absent.jsonl"], "DataFileError"),
        (["collect", "--out", "."], "SettingError"),
        (["edit", "--factors", "absent", "--out", "o"], "FactorsFileError"),
        (["bands", "--factors", "absent", "--out", "o"], "FactorsFileError"),
        (["detect", "--factors", "absent", "--out", "o"], "FactorsFileError"),
        (["detect", "--factors", "f", "--out", "o", "--texts", "bad.jsonl"], "SettingError"),
        (["detect", "--factors", "f", "--out", "o", "--texts", "list.jsonl"], "SettingError"),
        (["relearn", "--factors", "absent", "--out", "o"], "FactorsFileError"),
        (["relearn", "--factors", "f", "--out", "o", "--steps", "a"], "SettingError"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "bad.jsonl", [{"text": "a", "label": "unknown"}])
    jsonl(tmp_path / "list.jsonl", [{"text": "a", "label": ["clean"]}])
    assert run(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"{error}: ")
    assert not (tmp_path / "o").exists()


def test_wrong_values_end_in_one_line(made, factors, tmp_path, monkeypatch, capsys):
    common = ["--model", made / "model", "--factors", factors, "--out", tmp_path / "o"]
    for command, options, error in (
        ("edit", ["--keep", "0"], "KeepError"),
        ("edit", ["--shape", "circle"], "EditError"),
        ("edit", ["--estimator", "ekfac"], "EstimatorError"),
        ("detect", ["--flat", "2"], "SpectrumError"),
        ("relearn", ["--lr", "0", "--memorized", made / "memorized.jsonl"], "EditError"),
        ("relearn", ["--memorized", made / "texts.jsonl"], "SettingError"),
        ("bands", ["--memorized", made / "texts.jsonl"], "SettingError"),
    ):
        assert run(monkeypatch, command, *common, *options) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"{error}: ")
        assert not (tmp_path / "o").exists()


def test_plan_reads_the_configuration_alone(tmp_path, monkeypatch, capsys):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=33_000,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--dtype", "float32", "--layers", "1"]
    assert run(monkeypatch, "plan", *arguments, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["targets"] == [f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up")]
    assert found["phases"]["collect"]["sums"] == 8 * (16**2 + 2 * 33_000**2)
    assert "LAPACK" in found["impossible"][-1]
    assert "impossible here: a side of 33000" in printed.err
    assert run(monkeypatch, "plan", *arguments, "--length", "64", "--layers", "7") == 2
    capsys.readouterr()
    assert run(monkeypatch, "plan", *arguments[:2], "--layers", "1", "--json") == 0
    own = json.loads(capsys.readouterr().out)["phases"]["collect"]["weights"]
    assert 2 * own == pytest.approx(found["phases"]["collect"]["weights"], rel=1e-3)
