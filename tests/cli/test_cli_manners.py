"""What every command does alike: help, version, quiet, JSON, force, progress, the way to go on."""

import io
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from command_line import run
from rich.console import Console
from typer.main import get_command

import kfac
import lirefs
from lirefs.cli import app as cli
from lirefs.cli import options
from lirefs.main_job.console import console_table


def leaves(command=None, name=""):
    """Every command of the command line by its full name."""
    command = get_command(cli.app) if command is None else command
    if not hasattr(command, "commands"):
        return {name.strip(): command}
    found = {}
    for key, one in command.commands.items():
        found |= leaves(one, f"{name} {key}")
    return found


def words(command):
    return {word for one in command.params for word in one.opts}


def test_version_and_help(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"lirefs {lirefs.__version__}\n"
    for arguments in (["-h"], ["compare", "-h"], ["curvature", "edit", "-h"]):
        assert run(monkeypatch, *arguments) == 0
        assert "--help" in capsys.readouterr().out
    assert {"--install-completion", "--show-completion"} <= words(get_command(cli.app))


def test_one_rule_for_all_commands():
    """Who loads a model takes its type and map; who writes takes --force; all can be quiet."""
    for name, command in leaves().items():
        given = words(command)
        assert "--quiet" in given, name
        if "--device" in given and name != "organism train":
            assert {"--model", "--dtype", "--device-map"} <= given, name
        writes = "--out" in given or any(one.name == "out" for one in command.params)
        assert ("--force" in given) == writes, name
        silent = {"report", "organism texts", "curvature collect"}
        assert ("--json" in given) == (name not in silent), name


@pytest.mark.parametrize(
    ("command", "finished"),
    [
        ("compare", "out/results.json"),
        ("compare --resume", "out/results.json"),
        ("probe", "out/probe.json"),
        ("mine t.jsonl", "out"),
        ("curvature collect", "out"),
        ("curvature edit --factors f", "out/curvature_edit.json"),
        ("curvature bands --factors f", "out/bands.json"),
        ("curvature detect --factors f", "out/scores.jsonl"),
        ("curvature relearn --factors f", "out/relearning.json"),
        ("export d", "out"),
        ("export --to vllm d", "out"),
        ("export --to baked d", "out/steering.json"),
        ("organism texts", "out/questions.jsonl"),
        ("organism train", "out/shipped/config.json"),
    ],
)
def test_a_finished_result_is_kept(command, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lirefs, "load", None)
    (tmp_path / finished).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / finished).write_text("mine")
    positional = command.startswith(("export", "organism"))
    arguments = [*command.split(), *(["out"] if positional else ["--out", "out"])]
    assert run(monkeypatch, *arguments) == 2
    line = capsys.readouterr().err.strip()
    assert re.match(r"SettingError: out.*: exists; give --force to replace it", line), line
    assert (tmp_path / finished).read_text() == "mine"


def test_an_edited_model_is_replaced_by_force_and_nothing_else_is(
    model_folder, tmp_path, monkeypatch, capsys
):
    lm = lirefs.load(model_folder, device="cpu")
    kfac.collect(lm, ["a text"], layers=[1], progress=False).save(tmp_path / "f.safetensors")
    out = tmp_path / "edited"
    command = ["curvature", "edit", "--model", model_folder, "--out", out]
    command += ["--factors", tmp_path / "f.safetensors", "--json", "--quiet"]
    assert run(monkeypatch, *command, "--keep", 0.9) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["keep"] == 0.9
    assert said.err == ""
    assert run(monkeypatch, *command, "--keep", 0.5, "--force") == 0
    assert json.loads((out / "curvature_edit.json").read_text())["keep"] == 0.5
    assert {one.name for one in tmp_path.iterdir()} - {"lirefs-cache"} == {
        "edited", "f.safetensors", "f.safetensors.bases"
    }  # fmt: skip
    (out / "curvature_edit.json").unlink()  # then it may be anybody's folder
    assert run(monkeypatch, *command, "--force") == 2
    assert "exists; name a new folder" in capsys.readouterr().err


def test_quiet_says_nothing_but_the_result(model_folder, questions, tmp_path, monkeypatch, capsys):
    command = ["probe", "--model", model_folder, "--questions", questions, "--shuffles", 2]
    assert run(monkeypatch, *command, "--out", tmp_path / "p", "--quiet", "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out) == json.loads((tmp_path / "p" / "probe.json").read_text())
    page = (tmp_path / "p" / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 4
    best = json.loads(said.out)["layers"][json.loads(said.out)["best_layer"]]["test_auroc"]
    assert f"test AUROC {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}]" in page
    assert ", chosen</th>" in page
    assert not re.search(r">nan|nan \[", page)
    assert re.search(r"date <strong>20\d\d-", page)
    shuffled = json.loads(said.out)["shuffled_auroc"]
    interval = f"[{shuffled['low']:.2f}, {shuffled['high']:.2f}]"
    assert page.count(f"{shuffled['value']:.2f} {interval}") == 1  # in the verdict
    assert f'{shuffled["value"]:.2f} <span class="interval">{interval}' in page  # in the table
    assert len(re.findall(r'<tr( class="clear")?><th scope="row">', page)) == 4
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # it needs no other file
    # Errors are never silent.
    assert run(monkeypatch, *command, "--out", tmp_path / "p", "--quiet") == 2
    assert "give --force" in capsys.readouterr().err
    steer = ["steer", tmp_path / "p" / "directions.safetensors", "Q: :cow: [b]?", "--tokens", 3]
    assert run(monkeypatch, *steer, "--model", model_folder, "--json", "--strengths", "2,-2") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["strength"] for one in found["continuations"]] == [None, 2, -2]
    assert found["prompt"] == "Q: :cow: [b]?"


def test_the_type_of_numbers_and_the_map_reach_the_model(tmp_path, monkeypatch):
    given = []

    def load(name, **settings):
        given.append(settings)
        raise lirefs.LirefsError("enough")

    monkeypatch.setattr(lirefs, "load", load)
    (tmp_path / "t.txt").write_text("text")
    one, file = lirefs.Direction(torch.ones(4), 1), tmp_path / "d.safetensors"
    lirefs.Directions({(1, "resid_pre"): one}, {"best_layer": 1}).save(file)
    wanted = {"device": None, "dtype": "bfloat16", "device_map": "auto"}
    where = ["--dtype", "bfloat16", "--device-map", "auto"]
    for command in (
        ["mine", tmp_path / "t.txt", "--out", tmp_path / "m"],
        ["compare", "--model", "smollm2-135m", "--out", tmp_path / "r"],
        ["probe", "--model", "organism", "--out", tmp_path / "p"],
        ["steer", file, "x"],
        ["export", file, tmp_path / "d.gguf"],
        ["export", file, tmp_path / "d", "--to", "baked"],
        ["curvature", "collect", "--out", tmp_path / "f"],
    ):
        assert run(monkeypatch, *command, *where) == 2
        assert given.pop() == wanted, command
        assert not given


def test_an_organism_is_probed_in_its_own_language(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(lirefs, "load", lambda name, **settings: pytest.fail("loaded"))
    monkeypatch.setattr(
        lirefs.Questions, "split", lambda self, **settings: asked.append(self) or 1 / 0
    )
    for model in ("organism", "smollm2-135m"):
        with pytest.raises(ZeroDivisionError):
            run(monkeypatch, "probe", "--model", model, "--out", tmp_path / "p")
    assert list(asked[0]) == list(lirefs.load_questions("organism"))
    assert list(asked[1]) == list(lirefs.load_questions("default"))


def test_no_progress_bar_goes_into_a_file(lm, monkeypatch):
    """Bars are for terminals; nothing of them is written elsewhere."""
    texts = ["some text of some length"] * 3

    def written(terminal):
        screen = io.StringIO()
        screen.isatty = lambda: terminal
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", screen)
            lirefs.capture(lm, texts)
            lirefs.mine(lm, texts, 4, 4)
            kfac.collect(lm, texts, layers=[1])
            lirefs.compare(lm, {}, [lirefs.Perplexity("p", texts)], resamples=10)
        return screen.getvalue()

    shown = written(terminal=True)
    assert all(name in shown for name in ("activations:", "mine:", "compare:"))
    assert "\r" not in written(terminal=False)


def test_tables_cut_nothing(capsys):
    """Rows that differ at the end of a long name stay apart, in a file and in a narrow window."""
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj.{'long.' * 20}{i}" for i in range(2)]
    table = console_table("target", *(f"number {i}" for i in range(8)))
    for name in names:
        table.add_row(name, *["0.95 [0.90, 1.02]"] * 8)
    options.print_result({}, table, as_json=False)
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if "model." in row]
    assert [row[0] for row in rows] == names
    for width in (120, 60):
        screen = io.StringIO()
        Console(file=screen, width=width).print(table)
        assert "\u2026" not in screen.getvalue()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["lirefs", "compare", "--out", "my report"],
         "goes on: lirefs compare --out 'my report' --resume"),
        (["lirefs", "compare", "--resume"], "goes on: lirefs compare --resume"),
        (["/x/lirefs", "mine", "a b.txt"], "goes on: /x/lirefs mine 'a b.txt'"),
        (["lirefs", "curvature", "collect", "--out", "f"],
         "goes on: lirefs curvature collect --out f"),
        (["lirefs", "curvature", "bands"], "starts again: lirefs curvature bands"),
        (["/y/lirefs/__main__.py", "probe"],
         f"starts again: {shlex.quote(sys.executable)} -m lirefs probe"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on_is_printed(argv, line, monkeypatch, capsys):
    def interrupted(**settings):
        raise SystemExit(cli.INTERRUPTED)

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"interrupted; this command {line}\n"
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        cli.main()
    assert f": torchrun --nproc-per-node 4 {argv[0]} {argv[1]}" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_real_process_writes_no_bar_into_a_file(model_folder, questions, tmp_path):
    """transformers' own bars included."""
    code = "from lirefs.cli.app import main; main()"
    command = ["probe", "--model", model_folder, "--questions", questions, "--shuffles", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), "--out", str(tmp_path / "p")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "%|" not in done.stderr
    assert "\r" not in done.stderr


def test_python_m_lirefs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lirefs", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("lirefs", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == f"lirefs {lirefs.__version__}\n"
