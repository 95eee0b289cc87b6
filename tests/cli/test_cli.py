import json
import shlex

import pytest
from command_line import run
from small_jobs import small_jobs, undrawn
from tiny import fresh_model, tiny_tokenizer

import kfac
import lirefs
from lirefs.comparison.journal import Journal


def quick(model, questions):
    model_and_data = ["--model", model, "--questions", questions]
    return ["compare", *model_and_data, "--quick", "--limit", "3", "--edit-layers", "1,2"]


def test_compare_writes_a_whole_report_and_reuses_its_work(
    model_folder, questions, tmp_path, monkeypatch, capsys
):
    small_jobs(monkeypatch)
    arguments = quick(model_folder, questions)
    arguments += ["--keep", "0.9", "--factors", tmp_path / "f.safetensors"]
    out = tmp_path / "report"
    assert run(monkeypatch, *arguments, "--out", out, "--quiet", "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.md",
        "results.json",
        "results.csv",
        "overview.tex",
        *(
            f"{name}.{kind}"
            for name in (
                "retained",
                "retained-dark",
                "retained_tasks",
                "separation",
                "spectrum",
            )
            for kind in ("png", "svg")
        ),
        "directions.safetensors",
    }
    first = json.loads((out / "results.json").read_text())
    retained = json.loads(said.out)["retained"]
    assert list(retained) == list(first["results"])[1:]
    assert set(retained["K-FAC"]["language"]) == {"value", "low", "high", "n"}
    assert set(first["results"]) >= {"unchanged", "LiReF", "K-FAC", "LiReF + K-FAC"}
    assert set(first["results"]) >= {"random direction", "SVD", "random pairs"}
    monkeypatch.setattr(kfac, "collect", None)  # a second collection would fail
    undrawn(monkeypatch)
    assert run(monkeypatch, *arguments, "--out", tmp_path / "again") == 0
    second = json.loads((tmp_path / "again" / "results.json").read_text())
    assert second["results"] == first["results"]
    # The same factors are refused for another model.
    other = tmp_path / "other"
    fresh_model("llama", num_hidden_layers=3).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    arguments[2] = other
    assert run(monkeypatch, *arguments, "--out", tmp_path / "third") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("FactorsMismatchError: ")
    assert not (tmp_path / "third").exists()


def test_compare_takes_labels_of_ones_own(model_folder, questions, tmp_path, monkeypatch, capsys):
    small_jobs(monkeypatch)
    undrawn(monkeypatch)
    text = questions.read_text()
    questions.write_text(text.replace('"reasoning"', '"harmful"').replace('"memory"', '"safe"'))
    arguments = [*quick(model_folder, questions), "--out", tmp_path / "report", "--quiet"]
    assert run(monkeypatch, *arguments) == 2
    assert "expected 'reasoning' or 'memory'" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--labels", "harmful,safe") == 0
    found = lirefs.Directions.load(tmp_path / "report" / "directions.safetensors")
    assert found.names == ("harmful", "safe")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "QuestionsError"),
        ('{"question": "a"}', "QuestionsError"),
        ('{"question": "a", "label": "memory"}\n{broken', "line 2"),
        ('{"question": "a", "label": "memory"}', "one class only"),
    ],
)
def test_wrong_questions_end_in_one_line(
    content, error, model_folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    out = tmp_path / "report"
    assert (
        run(monkeypatch, "compare", "--model", model_folder, "--questions", path, "--out", out) == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert error in lines[0]
    assert lines[0].startswith("QuestionsError: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--model", "no-such-model"], "ModelNotFoundError"),
        (["--keep", "0"], "KeepError"),
        (["--keep", "1.5"], "KeepError"),
        (["--edit-layers", "one"], "SettingError"),
        (["--direction-layers", "one"], "SettingError"),
        (["--memorized", "absent.jsonl"], "DataFileError"),
        (["--questions", "absent.jsonl"], "QuestionsError"),
        (["--model", "absent.gguf"], "ModelNotFoundError"),
        (["--data", "absent", "--suite", "skills"], "SettingError"),
        (["--data", "."], "SettingError"),
        (["--model", "organism", "--suite", "skills"], "SettingError"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compare", *arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"{error}: ")
    assert not (tmp_path / "report").exists()


def test_layers_out_of_range_and_a_file_in_the_way(model_folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "compare", "--model", model_folder, "--edit-layers", "99") == 2
    assert "99 does not exist" in capsys.readouterr().err
    (tmp_path / "taken").write_text("mine")
    assert run(monkeypatch, "compare", "--model", model_folder, "--out", tmp_path / "taken") == 2
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_broken_factor_file_is_named(model_folder, questions, tmp_path, monkeypatch, capsys):
    (tmp_path / "f.safetensors").write_bytes(b"not factors")
    arguments = ["--questions", questions, "--factors", tmp_path / "f.safetensors"]
    out = tmp_path / "report"
    assert run(monkeypatch, "compare", "--model", model_folder, *arguments, "--out", out) == 2
    assert "FactorsFileError" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def timeless(path):
    """The results in a file, without date, command and run time."""
    results = json.loads(path.read_text())
    assert results.pop("run")
    return results


def test_a_suite_killed_and_resumed_gives_the_same_report(
    model_folder, questions, tmp_path, monkeypatch, capsys
):
    small_jobs(monkeypatch)
    undrawn(monkeypatch)
    rows = [{"prefix": f"the quote number {i} is", "suffix": f" of no use {i}"} for i in range(4)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "quotes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = quick(model_folder, questions)
    # Short passages, because the stress test recites them at many positions.
    passages = [{"text": f"passage {i} says it", "suffix_tokens": 4} for i in range(3)]
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, passages)))
    arguments += ["--suite", "memorization", "--data", data]
    arguments += ["--memorized", tmp_path / "passages.jsonl"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "whole") == 0
    assert "left out: memorized_windows" in capsys.readouterr().err
    whole = timeless(tmp_path / "whole" / "results.json")
    assert {"passages", "quotes", "passages, stress test", "held-out texts, top 10"} <= set(
        whole["tasks"]
    )

    out, add, parts = tmp_path / "again", Journal.add, []

    def dies(self, key, items):
        add(self, key, items)
        parts.append(key)
        if len(parts) in (5, 8):
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", dies)
    assert run(monkeypatch, *arguments, "--out", out) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("interrupted; this command goes on: lirefs compare --model ")
    # The very command that is printed, read as a shell reads it, is the one that goes on.
    assert shlex.split(line.partition(": ")[2])[1:] == [
        *map(str, arguments), "--out", str(out), "--resume"
    ]  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    assert run(monkeypatch, "report", out) == 2
    assert "its run is unfinished; continue it with" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--out", out, "--resume") == 130
    assert run(monkeypatch, *arguments, "--out", out, "--resume") == 0
    assert timeless(out / "results.json") == whole
    assert len(set(parts)) == len(parts)  # nothing was done twice
    assert not (out / "unfinished").exists()
    # Without --resume, what is left of another run is not used.
    (out / "unfinished").mkdir()
    (out / "unfinished" / "items-0.jsonl").write_text('{"key": "')
    assert run(monkeypatch, "report", out) == 0
    assert "results of an earlier run" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--out", out) == 2  # the earlier report is finished
    assert "results.json: exists; give --force to replace it" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--out", out, "--force") == 0
    assert "starting again" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["folder", "folder/results.json", "nowhere", "nowhere/x.json"])
def test_a_report_of_a_run_without_results(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert run(monkeypatch, "report", given) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("ResultsFileError: ")
    unfinished = (
        "its run is unfinished; continue it with `lirefs compare ... --out folder --resume`"
    )
    assert (unfinished in line) is given.startswith("folder")


def test_a_task_of_lm_eval_is_compared_beside_ours(
    model_folder, questions, tmp_path, monkeypatch, capsys, quick_lm_eval
):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    small_jobs(monkeypatch)
    undrawn(monkeypatch)
    lm = lirefs.load(str(model_folder))
    items = [(str(i), lm.encode([f"a prefix {i}"])[0], [40, 50 + i]) for i in range(4)]
    lirefs.write_lm_eval_task(tmp_path / "tasks", "recite", items, lm.tokenizer)
    arguments = quick(model_folder, questions)
    arguments += ["--lm-eval", "recite", "--data", tmp_path / "tasks"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "report") == 0
    saved = lirefs.load_comparison(tmp_path / "report")
    assert saved.tasks["recite"].group == "lm-eval"
    assert len(saved.results["K-FAC"]["recite"]) == 3
    assert "lm-eval" in (tmp_path / "report" / "report.md").read_text()
    assert run(monkeypatch, *arguments, "--lm-eval", "absent", "--out", tmp_path / "no") == 2
    assert "no task absent" in capsys.readouterr().err


@pytest.mark.gpu
def test_compare_runs_on_a_gpu(model_folder, questions, tmp_path, monkeypatch):
    small_jobs(monkeypatch)
    arguments = ["--questions", questions, "--quick", "--edit-layers", "1,2", "--device", "cuda"]
    out = tmp_path / "report"
    assert run(monkeypatch, "compare", "--model", model_folder, *arguments, "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["provenance"]["device"] == "cuda:0"
