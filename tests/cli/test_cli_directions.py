import ast
import json
import shlex
from pathlib import Path

import pytest
import torch
from command_line import run
from tiny import build, fresh_model, tiny_config, tiny_tokenizer

import lirefs
from lirefs import Directions
from lirefs.export.gguf import from_gguf


@pytest.fixture
def fitted(model_folder, questions, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text(
        "\n".join(json.dumps({**row, "question": "also " + row["question"]}) for row in rows)
    )
    second = tmp_path / "second"
    build(tiny_config("llama", max_position_embeddings=1024), seed=1).save_pretrained(second)
    tiny_tokenizer().save_pretrained(second)
    out = tmp_path / "probe"
    arguments = ["probe", "--model", model_folder, "--questions", questions, "--shuffles", "5"]
    arguments += ["--transfer", other, "--against", second, "--out", out]
    assert run(monkeypatch, *arguments) == 0
    return out


def test_probe_of_a_concept_of_ones_own(model_folder, questions, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.jsonl"
    text = questions.read_text()
    own.write_text(text.replace('"reasoning"', '"harmful"').replace('"memory"', '"harmless"'))
    arguments = ["probe", "--model", model_folder, "--questions", own, "--shuffles", "2"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "a") != 0
    assert "expected 'reasoning' or 'memory'" in capsys.readouterr().err
    labels = ["--labels", "harmful,harmless"]
    assert run(monkeypatch, *arguments, *labels, "--out", tmp_path / "a") == 0
    assert Directions.load(tmp_path / "a/directions.safetensors").names == ("harmful", "harmless")
    for file in (tmp_path / "a").glob("*.svg"):
        assert "reasoning" not in file.read_text()
    layers = json.loads((tmp_path / "a/probe.json").read_text())["layers"]
    assert "cosine_harmless" in layers[0]


def test_probe_steer_and_export(fitted, model_folder, tmp_path, monkeypatch, capsys):
    assert {path.name for path in fitted.iterdir()} == {
        "directions.safetensors",
        "probe.json",
        "report.html",
        *(
            f"{name}.{kind}"
            for name in (
                "layers", "best_layer", "scatter", "cosines", "transfer", "side_by_side"
            )
            for kind in ("png", "svg")
        ),
    }  # fmt: skip
    file = fitted / "directions.safetensors"
    directions = Directions.load(file)
    found = json.loads((fitted / "probe.json").read_text())
    assert directions.provenance["best_layer"] == found["best_layer"]
    assert len(found["transfer"]) == 4
    capsys.readouterr()
    model = ["--model", model_folder, "--layer", 2]
    arguments = ["--strengths", "-1,2", "--tokens", 4]
    assert run(monkeypatch, "steer", file, "Q: what", *model, *arguments) == 0
    text = capsys.readouterr().out
    assert "unsteered" in text
    assert "-1" in text
    assert run(monkeypatch, "export", file, tmp_path / "c.gguf", *model) == 0
    assert list(from_gguf(tmp_path / "c.gguf")) == [(1, "resid_post")]
    capsys.readouterr()

    wrong = [
        (["steer", file, "x", *model, "--strengths", "much"], "SettingError"),
        (["steer", file, "x", *model, "--operator", "push"], "SettingError"),
        (["steer", file, "x", "--model", model_folder, "--layer", 77], "SettingError"),
        (["steer", tmp_path / "absent", "x", *model], "DirectionsFileError"),
        (
            ["export", file, tmp_path / "d.gguf", "--model", model_folder, "--layer", 0],
            "BackendError",
        ),
    ]
    for arguments, error in wrong:
        assert run(monkeypatch, *arguments) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"{error}: ")
    # Directions from elsewhere need not say which layer is the best.
    provenance = {"model": directions.provenance["model"]}
    Directions(dict(directions), provenance).save(tmp_path / "made.safetensors")
    arguments = ["steer", tmp_path / "made.safetensors", "x", "--model", model_folder]
    assert run(monkeypatch, *arguments) == 2
    assert "SettingError: give --layer:" in capsys.readouterr().err
    # Every strength is looked at before any text is made.
    with monkeypatch.context() as patched:
        patched.setattr("lirefs.model.language_model.LanguageModel.generate", None)
        assert run(patched, "steer", file, "x", *model, "--strengths", "1,nan") == 2
    assert "InterventionError" in capsys.readouterr().err
    other = tmp_path / "other"
    fresh_model("llama", num_hidden_layers=3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    assert run(monkeypatch, "steer", file, "x", "--model", other) == 2
    assert "ProvenanceError" in capsys.readouterr().err


@pytest.fixture
def exported(model_folder, tmp_path, monkeypatch, capsys):
    """`lirefs export` of a direction in `mlp_out` of layer 1, which this model can hold baked."""
    lm = lirefs.load(model_folder, device="cpu")
    items = {
        (layer, "mlp_out"): lirefs.Direction(torch.arange(32.0) - layer, layer, "mlp_out")
        for layer in (1, 2)
    }
    file = tmp_path / "all.safetensors"
    Directions(items, {"model": lm.fingerprint, "labels": ["a", "b"]}).save(file)

    def export(*arguments):
        command = ["export", file, *arguments, "--model", model_folder, "--layer", 1]
        code = run(monkeypatch, *command, "--json", "--quiet")
        said = capsys.readouterr()
        return said.err if code else json.loads(said.out)["next"]

    def steered(**settings):
        with lirefs.Steer(items[1, "mlp_out"], **settings).apply(lm.model):
            return lm.generate("...", max_new_tokens=5)

    assert steered(operator="ablate") != lm.generate("...", max_new_tokens=5)
    return export, steered


def test_a_baked_model_is_loaded_by_transformers_alone(exported, tmp_path, capsys):
    export, steered = exported
    out = tmp_path / "baked"
    assert "a control vector can only be added" in export(out, "--operator", "ablate")
    assert not out.exists()
    lines = export(out, "--operator", "ablate", "--to", "baked")
    assert json.loads((out / "steering.json").read_text())["operator"] == "ablate"
    baked = lirefs.load(out, device="cpu")
    assert baked.generate("...", max_new_tokens=5) == steered(operator="ablate")
    exec("\n".join(lines).replace('"...",', '"...", max_new_tokens=5,'))
    text = ast.literal_eval(capsys.readouterr().out)[0]["generated_text"]
    assert text == "..." + steered(operator="ablate")
    assert "give --force" in export(out, "--operator", "ablate", "--to", "baked")
    assert export(out, "--operator", "ablate", "--to", "baked", "--force") == lines
    for to, problem in (("baked", "exists; name a new folder"), ("vllm", "is a folder")):
        assert problem in export(tmp_path, "--to", to, "--force")  # anybody's folder


def test_a_direction_in_a_file_of_its_own(exported, tmp_path, capsys):
    export, steered = exported
    lines = export(tmp_path / "one.safetensors", "--strength", 2)
    found = Directions.load(tmp_path / "one.safetensors")
    assert list(found) == [(1, "mlp_out")]
    assert found.names == ("a", "b")
    exec("\n".join(lines).replace('"...")', '"...", max_new_tokens=5)'))
    assert capsys.readouterr().out == steered(operator="add", strength=2.0) + "\n"


def test_the_command_that_serves_with_vllm(exported, tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    export, _ = exported
    (line,) = export("one", "--to", "vllm", "--operator", "clamp", "--strength", 3)
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", str(model_folder)]
    assert json.loads(words[-1]) == {
        "lirefs": {"directions": str(tmp_path / "one"), "operator": "clamp", "strength": 3.0}
    }
    assert list(Directions.load(tmp_path / "one")) == [(1, "mlp_out")]


def test_the_server_gets_the_folder_of_a_built_in_model(tmp_path, monkeypatch, capsys):
    lm = lirefs.load("organism")
    found = {(1, "resid_pre"): lirefs.Direction(torch.ones(lm.width), 1)}
    Directions(found, {"model": lm.fingerprint}).save(tmp_path / "d")
    settings = ("--to", "vllm", "--model", "organism", "--layer", 1)
    assert run(monkeypatch, "export", tmp_path / "d", tmp_path / "one", *settings) == 0
    folder = Path(shlex.split(capsys.readouterr().out)[2])
    assert (folder / "config.json").is_file()


def test_wrong_settings_end_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "probe", "--estimator", "magic") == 2
    assert "SettingError" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"question": "a", "label": "memory", "score": "high"}')
    assert run(monkeypatch, "probe", "--questions", tmp_path / "q.jsonl") == 2
    assert "QuestionsError" in capsys.readouterr().err


def test_what_can_be_wrong_is_found_before_the_first_fit(
    model_folder,
    questions,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr("lirefs.fit", None)
    arguments = [
        "probe",
        "--model",
        model_folder,
        "--questions",
        questions,
        "--out",
        tmp_path / "out",
    ]
    small = tmp_path / "small.jsonl"
    rows = [{"question": f"is {label}", "label": label} for label in ("memory", "reasoning")]
    small.write_text("\n".join(map(json.dumps, rows)))
    wide = tmp_path / "wide"
    fresh_model("llama", hidden_size=64).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    for more, error in [
        (["--transfer", questions], "were fitted on"),
        (["--transfer", small], "too few questions"),
        (["--against", wide], "width 64"),
    ]:
        assert run(monkeypatch, *arguments, *more) == 2
        assert error in capsys.readouterr().err


def test_directions_are_written_before_anything_else_can_fail(
    model_folder,
    questions,
    tmp_path,
    monkeypatch,
):
    def fails(*arguments):
        raise lirefs.LirefsError("no picture")

    monkeypatch.setattr("lirefs.directions.figures.probe_by_layer", fails)
    arguments = ["probe", "--model", model_folder, "--questions", questions, "--shuffles", "2"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
    assert Directions.load(tmp_path / "out" / "directions.safetensors")
