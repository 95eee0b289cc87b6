"""The command line under rude use: wrong places, empty files, wrong numbers and names, Ctrl-C."""

import json
import os
import shlex
import signal
import sys
import time

import pytest
from command_line import run
from made_up import made_up
from typer.main import get_command

import lirefs
from lirefs.cli import app as cli
from lirefs.comparison import write_report
from lirefs.pictures import Picture
from lirefs.tasks import mining

NEEDED = {
    "steer": ["d.safetensors", "hello"],
    "export": ["d.safetensors", "out.gguf"],
    "mine": ["text.jsonl"],
    "report": ["absent"],
    "organism train": ["new"],
    "organism texts": ["new"],
    "curvature collect": ["--out", "new"],
    "curvature edit": ["--factors", "absent", "--out", "new"],
    "curvature bands": ["--factors", "absent", "--out", "new"],
    "curvature detect": ["--factors", "absent", "--out", "new"],
    "curvature relearn": ["--factors", "absent", "--out", "new"],
}
# Command, what is added to its needed arguments, and what the message must hold. A later value of
# an option takes the place of an earlier one.
CASES = [
    ("compare", "--limit 0", "--limit"),
    ("compare", "--limit -3", "--limit"),
    ("compare", "--seed -1", "--seed"),
    ("compare", "--out file", "SettingError: file: exists and is not a folder"),
    ("compare", "--out file/x", "SettingError: file/x: cannot be made"),
    ("compare", "--questions folder", "QuestionsError: folder: cannot be read"),
    ("compare", "--labels one", "QuestionsError: labels must be two"),
    ("compare", "--labels one,two", "QuestionsError: "),
    ("compare", "--questions empty", "QuestionsError: empty: empty"),
    ("compare", "--memorized folder", "DataFileError: folder: a folder without a .txt file"),
    ("compare", "--memorized empty", "DataFileError: empty: empty"),
    ("compare", "--data file --suite skills", "SettingError: data is file"),
    ("compare", "--suite skils", "'skills'"),
    ("compare", "--keep nan", "KeepError: keep is nan"),
    ("compare", "--strength nan", "SettingError: strength is nan"),
    ("compare", "--strength inf", "SettingError: strength is inf"),
    ("compare", "--edit-layers two", "SettingError: --edit-layers 'two'"),
    ("compare", "--direction-layers two", "SettingError: --direction-layers 'two'"),
    ("compare", "--dtype int8", "SettingError: --dtype 'int8'"),
    ("compare", "--device quantum", "SettingError: --device 'quantum'"),
    ("compare", "--device cuda:99", "SettingError: --device cuda:99"),
    ("compare", "--factors folder", "SettingError: folder: is a folder"),
    ("compare", "--factors file/x", "SettingError: file: cannot be made"),
    ("compare", "--model folder --edit-layers 1", "ModelNotFoundError: folder"),
    ("compare", "--factors empty", "FactorsFileError: empty"),
    ("compare", "--data . --suite skills", "DataFileError: gsm8k.jsonl: empty"),
    ("compare", "--nonsense", "--nonsense"),
    ("probe", "--out file", "SettingError: file"),
    ("probe", "--estimator men", "mean, whitened"),
    ("probe", "--site resid", "resid_pre"),
    ("probe", "--questions empty", "QuestionsError: empty: empty"),
    ("probe", "--transfer folder", "QuestionsError: folder"),
    ("probe", "--shuffles 0", "--shuffles"),
    ("steer", "--strengths much", "SettingError: --strengths 'much'"),
    ("steer", "--operator ad", "add, ablate"),
    ("steer", "--tokens 0", "--tokens"),
    ("steer", "", "DirectionsFileError: d.safetensors: no such file"),
    ("export", "", "DirectionsFileError: d.safetensors: no such file"),
    ("export", "--strength much", "--strength"),
    ("export", "--operator ad", "add, ablate"),
    ("export", "--to onnx", "'gguf', 'baked', 'vllm'"),
    ("mine", "--out folder", "SettingError: folder: is a folder"),
    ("mine", "--out file/x", "SettingError: file: cannot be made"),
    ("mine", "empty.jsonl", "DataFileError: empty.jsonl: empty"),
    ("mine", "folder", "DataFileError: folder: a folder without"),
    ("mine", "absent.txt", "DataFileError: absent.txt: no such file"),
    ("mine", "--stride 0", "--stride"),
    ("pool", "absent other", "ResultsFileError: absent: cannot be read"),
    ("pool", "absent absent", "SettingError: a report is named twice"),
    ("report", "", "ResultsFileError: absent: cannot be read"),
    ("report", "--out file", "SettingError: file: exists"),
    ("organism train", "--tokens -5", "--tokens"),
    ("organism train", "--device quantum", "SettingError: --device 'quantum'"),
    ("organism scores", "folder", "ModelLoadError: folder"),
    ("organism scores", "--split tset", "train, validation, test"),
    ("organism texts", "--model absent", "ModelLoadError: absent"),
    ("curvature collect", "--out folder", "SettingError: folder: is a folder"),
    ("curvature collect", "--texts empty", "DataFileError: empty: empty"),
    ("curvature collect", "--texts folder", "DataFileError: folder: a folder without a .txt"),
    ("curvature collect", "--samples 0", "--samples"),
    ("curvature collect", "--budget nan", "SettingError: --budget nan"),
    ("curvature collect", "--budget -1", "SettingError: --budget -1"),
    ("curvature collect", "--estimators kfca", "kfac, marginal"),
    ("curvature edit", "--out folder", "SettingError: folder: exists"),
    ("curvature plan", "--model folder", "ModelNotFoundError: folder"),
    ("curvature plan", "--length 1", "--length"),
    ("curvature plan", "--layers two", "SettingError: --layers 'two'"),
    ("curvature plan", "--budget nan", "SettingError: --budget nan"),
    ("curvature plan", "--budget inf", "SettingError: --budget inf"),
    ("curvature plan", "--estimators all", "SettingError: --estimators 'all'"),
    ("curvature edit", "--out file/x", "SettingError: file/x: cannot be made"),
    ("curvature edit", "--factors folder", "FactorsFileError: folder"),
    ("curvature edit", "--factors empty", "FactorsFileError: empty"),
    ("curvature bands", "--out file", "SettingError: file: exists"),
    ("curvature bands", "--clean empty", "DataFileError: empty: empty"),
    ("curvature bands", "--memorized empty", "DataFileError: empty: empty"),
    ("curvature detect", "--out file", "SettingError: file: exists"),
    ("curvature detect", "--texts empty", "DataFileError: empty: empty"),
    ("curvature relearn", "--out file", "SettingError: file: exists"),
    ("curvature relearn", "--memorized empty", "DataFileError: empty: empty"),
    ("curvature relearn", "--steps ,", "SettingError: --steps"),
]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder, a file and empty files in the working folder, and no model to load from the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "gsm8k.jsonl").touch()
    (tmp_path / "text.jsonl").write_text('{"text": "hello"}')
    return tmp_path


def test_every_command_is_used_rudely():
    def leaves(command, name=""):
        if not hasattr(command, "commands"):
            return {name.strip()}
        return set().union(*(leaves(one, f"{name} {k}") for k, one in command.commands.items()))

    assert {command for command, *_ in CASES} == leaves(get_command(cli.app))


@pytest.mark.parametrize(("command", "arguments", "message"), CASES)
def test_it_ends_with_a_name_before_anything_is_loaded(
    command, arguments, message, places, monkeypatch, capsys
):
    load = lirefs.load

    def only_a_folder(model, **settings):
        assert model == "folder", "a model was loaded"
        return load(model, **settings)

    monkeypatch.setattr(lirefs, "load", only_a_folder)
    before = sorted(places.rglob("*"))
    monkeypatch.setenv("COLUMNS", "200")
    needed = NEEDED.get(command, [])
    assert run(monkeypatch, *command.split(), *needed, *arguments.split()) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if "Error: " in message:
        assert said.strip().splitlines()[-1].startswith(message)
    else:
        assert message in said
    assert sorted(places.rglob("*")) == before
    assert (places / "file").read_text() == "mine"


def test_lm_eval_tasks_are_found_before_a_model_is_loaded(places, monkeypatch, capsys):
    def unknown(names, folder, limit):
        raise lirefs.errors.TaskError(f"lm-eval has no task {names[0]}")

    monkeypatch.setattr(lirefs, "lm_eval_tasks", unknown)
    monkeypatch.setattr(lirefs, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    assert run(monkeypatch, "compare", "--lm-eval", "nonsense") == 2
    assert "TaskError: lm-eval has no task nonsense" in capsys.readouterr().err


def test_a_misspelt_command_gets_a_suggestion(monkeypatch, capsys):
    assert run(monkeypatch, "compar") == 2
    assert "Did you mean 'compare'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["compare"], ["mine", "text.jsonl"], ["organism", "texts"]])
def test_a_folder_without_permission_is_named_first(arguments, places, monkeypatch, capsys):
    # Whoever runs the tests may be allowed everything.
    monkeypatch.setattr("os.access", lambda place, mode: False)
    out = ["locked"] if arguments[0] == "organism" else ["--out", "locked/x"]
    assert run(monkeypatch, *arguments, *out) == 2
    assert "SettingError: locked: nothing can be written in" in capsys.readouterr().err.replace(
        "locked/x", "locked"
    )


def test_a_disk_that_is_full_ends_in_one_line(tmp_path, monkeypatch, capsys):
    results = saved(tmp_path)

    def full(self, folder, name):
        raise OSError(28, "No space left on device", str(folder / name))

    monkeypatch.setattr(Picture, "save", full)
    capsys.readouterr()
    assert run(monkeypatch, "report", results, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("OSError: ")
    assert "No space left" in line


def test_what_else_is_in_the_folder_stays(tmp_path, monkeypatch, capsys):
    results, out = saved(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("mine")
    for force in ([], ["--force"]):
        assert run(monkeypatch, "report", results, "--out", out, *force) == 2
        assert "report.html: exists, and this command did not" in capsys.readouterr().err
    assert (out / "report.html").read_text() == "mine"
    (out / "report.html").unlink()
    assert run(monkeypatch, "report", results, "--out", out) == 0
    assert run(monkeypatch, "report", results, "--out", out) == 2
    assert "exists; give --force to replace it" in capsys.readouterr().err
    assert run(monkeypatch, "report", results, "--out", out, "--force") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def saved(folder):
    return write_report(made_up(tasks=2, items=4), folder / "report").parent


def test_ctrl_c_ends_in_one_line_and_the_same_command_continues(
    model_folder, tmp_path, monkeypatch, capsys
):
    rows = [{"id": str(i), "text": f"the text number {i} goes on and on"} for i in range(12)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["mine", tmp_path / "t.jsonl", "--model", model_folder, "--batch-tokens", "64"]
    command += ["--prefix-tokens", "6", "--suffix-tokens", "6"]
    assert run(monkeypatch, *command, "--out", tmp_path / "whole.jsonl") == 0
    search, calls = mining._search, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return search(*arguments)

    monkeypatch.setattr(mining, "_search", interrupted)
    capsys.readouterr()
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, *command, "--out", out) == 130
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    assert line == "interrupted; this command goes on: " + shlex.join(
        ["lirefs", *map(str, command), "--out", str(out)]
    )
    assert not out.exists()
    journal = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert len(journal) == 1 + 2  # settings and two batches
    assert run(monkeypatch, *command, "--out", out) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_ctrl_c_from_outside(monkeypatch):
    """A signal to the process, while it waits where Python is not running."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        sys.stderr = os.fdopen(writer, "w", buffering=1)
        sys.argv = ["lirefs", "probe", "--seed", "1"]
        lirefs.load = lambda *a, **k: sys.stderr.write("ready\n") and time.sleep(60)
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.readline() == "ready\n"
        os.kill(process, signal.SIGINT)
        (line,) = said.readlines()
    assert line == "interrupted; this command starts again: lirefs probe --seed 1\n"
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
