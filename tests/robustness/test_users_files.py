"""Files of the user's own: what a command did not write, it neither removes nor replaces."""

import argparse

import pytest
from command_line import run
from made_up import made_up
from small_jobs import undrawn

import kfac
import lirefs
from experiments import planting, write_flat
from experiments.vision.__main__ import vision
from experiments.vision.report import FIGURES
from lirefs.cli import options
from lirefs.comparison import write_report
from lirefs.comparison.figures.figure import Figure
from lirefs.comparison.journal import Journal, journal_files, remove_journal
from lirefs.errors import DataFileError, SettingError
from lirefs.main_job import jobs
from lirefs.main_job.settings import Job
from lirefs.model.processes.world import World
from lirefs.pictures import Picture
from lirefs.tasks.lm_eval_export import write_lm_eval_task

MINE = "mine, and nobody else's"
PICTURE = Picture(b"\x89PNG", b"<svg/>")
# Every command that writes a folder, and files that it writes there.
WRITTEN = {
    "compare": ["report.html", "report.md", "results.csv", "overview.tex", "results.json",
                "directions.safetensors", "directions-passage.safetensors"],
    "probe": ["report.html", "probe.json", "directions.safetensors",
              *options.figure_files("layers", "best_layer", "scatter", "transfer", "cosines")],
    "mine t.jsonl": ["../out", "../out.json"],
    "curvature collect": ["../out"],
    "curvature bands --factors f": ["bands.json", "bands.png", "bands.svg"],
    "curvature detect --factors f": ["scores.jsonl", "detector.json", "detector.png"],
    "curvature relearn --factors f": ["relearning.json", "relearning.png", "relearning.svg"],
    "curvature edit --factors f": ["curvature_edit.json", "config.json", "notes.txt"],
    "export d": ["../out"],
    "export --to vllm d": ["../out"],
    "export --to baked d": ["steering.json", "config.json"],
    "organism texts": ["questions.jsonl", "training.jsonl", "planted.jsonl", "labelled.jsonl"],
    "organism train": ["config.json", "model.safetensors", "tokenizer.json", "training.json",
                       "log.jsonl", "shipped/config.json", "shipped/README.md"],
    "report made": ["report.html", "report.md", "results.csv", "overview.tex"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "file"), [(name, file) for name, files in WRITTEN.items() for file in files]
)
def test_no_command_replaces_a_file_that_it_did_not_write(
    command, file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lirefs, "load", None)
    write_report(made_up(tasks=2, items=4), tmp_path / "made", [])
    path = tmp_path / "out" / file
    (tmp_path / "out" / file.rpartition("/")[0]).mkdir(parents=True, exist_ok=True)
    if file.startswith("../out"):
        (tmp_path / "out").rmdir()
        path = tmp_path / file.removeprefix("../")
    path.write_text(MINE)
    to = ["out"] if command.startswith(("export", "organism")) else ["--out", "out"]
    for force in ([], ["--force"]):
        assert run(monkeypatch, *command.split(), *to, *force) == 2
        assert "SettingError: " in capsys.readouterr().err
        assert path.read_text() == MINE


def test_figures_of_one_command_never_replace_those_of_another(tmp_path, monkeypatch, capsys):
    """Whatever two commands write to the same folder, the second one notices it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lirefs, "load", None)
    shown = [Figure(name, name, "", PICTURE) for name in ("layers", "retained", "bands")]
    write_report(made_up(tasks=2, items=4), tmp_path / "out", shown)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for command in ("probe", "curvature bands --factors f"):
        assert run(monkeypatch, *command.split(), "--out", "out", "--force") == 2
        assert "this command did not write it" in capsys.readouterr().err
    with pytest.raises(SettingError, match="did not write it"):
        vision(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["results.json", "report.md", *options.figure_files(*FIGURES)])
def test_the_study_of_vision_replaces_its_own_files_alone(name, tmp_path):
    (tmp_path / name).write_text(MINE)
    with pytest.raises(SettingError, match=f"{name}: exists, and this command did not write it"):
        vision(tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "results.json", "table.md"])
def test_the_other_experiments_replace_their_own_files_alone(name, tmp_path):
    (tmp_path / name).write_text(MINE)
    with pytest.raises(SettingError, match=f"{name}: exists, and this command did not write it"):
        write_flat.run(tmp_path, 1, 1, 1e-3, 0)
    names = ("model", "n", "goal", "steps", "lr", "seed", "field", "passages", "layers")
    given = argparse.Namespace(out=tmp_path, **dict.fromkeys(names))
    with pytest.raises(SettingError, match=f"{name}: exists, and this command did not write it"):
        planting.run(given)


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    comparison = made_up(tasks=2, items=4)
    own = Figure("mine", "mine", "", PICTURE)
    for name in ("report.md", "mine.png"):
        (tmp_path / name).mkdir()  # a folder is not a file of ours either
        with pytest.raises(SettingError, match=f"{name}: exists"):
            write_report(comparison, tmp_path, [own])
        (tmp_path / name).rmdir()
    write_report(comparison, tmp_path, [own])
    write_report(comparison, tmp_path, [own])  # its own
    (tmp_path / "results.json").write_text('{"my": "results"}')
    with pytest.raises(SettingError, match=r"results\.json: exists"):
        write_report(comparison, tmp_path, [own])


def test_two_figures_of_a_report_have_two_names(tmp_path):
    dark = Figure("a", "", "", PICTURE, PICTURE)
    for other in ("A", "a-dark"):
        with pytest.raises(SettingError, match="two figures would be written to"):
            write_report(
                made_up(tasks=2, items=4), tmp_path, [dark, Figure(other, "", "", PICTURE)]
            )
    assert not list(tmp_path.iterdir())


def test_a_job_removes_its_journal_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "unfinished"
    (folder / "chapters").mkdir(parents=True)
    for name in ("thesis.tex", "items-0.txt", "chapters/items-0.jsonl"):
        (folder / name).write_text(MINE)
    undrawn(monkeypatch)

    def finish(job, language):
        Journal(folder, World()).add("0" * 64, [])
        jobs._save(Job(out=tmp_path), made_up(tasks=2, items=4), [], {})

    monkeypatch.setattr(jobs, "_on_organism", finish)
    for resume in (False, True):
        Journal(folder, World()).add("1" * 64, [])  # what an interrupted run leaves
        lirefs.main_job.run("organism", out=tmp_path, resume=resume)
    assert (tmp_path / "report.html").exists()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert left == {"thesis.tex", "items-0.txt", "chapters", "chapters/items-0.jsonl"}


@pytest.mark.parametrize("content", [b"", b"\n", b'\n{"ke', b'\x00\n{"key": "%s", "items": ['])
def test_a_journal_that_was_cut_is_known_and_removed(content, tmp_path):
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "items-3.jsonl").write_bytes(content.replace(b"%s", b"0a" * 32))
    assert remove_journal(tmp_path / "j")
    assert not (tmp_path / "j").exists()
    assert not remove_journal(tmp_path / "j")


@pytest.mark.parametrize("content", [MINE, '{"key": "a", "items": []}\n', "{}\n"])
def test_a_file_called_like_a_journal_is_left_alone(content, tmp_path):
    file = tmp_path / "items-0.jsonl"
    file.write_text(content)
    (tmp_path / "items-1.jsonl").symlink_to(tmp_path / "elsewhere")
    assert journal_files(tmp_path) == []
    assert not remove_journal(tmp_path)
    with pytest.raises(SettingError, match=r"items-0\.jsonl: is not a file of a journal"):
        Journal(tmp_path, World())  # it would be appended to
    assert file.read_text() == content


def test_a_folder_of_a_model_is_replaced_if_all_in_it_is_ours(lm, tmp_path):
    out, record = tmp_path / "out", "edit.json"
    options.save_model(lm.model, lm.tokenizer, out, record, {"keep": 1})
    options.keep_folder(out, record, force=True)
    with pytest.raises(SettingError, match="give --force to replace it"):
        options.keep_folder(out, record, force=False)
    weights = (out / "model.safetensors").read_bytes()
    for name, content in (("notes.txt", MINE), ("model.safetensors", "trained further")):
        (out / name).write_text(content)
        with pytest.raises(SettingError, match=f"{name}: was added or changed"):
            options.keep_folder(out, record, force=True)
        (out / "notes.txt").unlink(missing_ok=True)
    (out / "model.safetensors").write_bytes(weights)
    options.keep_folder(out, record, force=True)
    (out / record).write_text('{"mine": []}')
    with pytest.raises(SettingError, match="name a new folder"):
        options.keep_folder(out, record, force=True)


def test_bases_of_other_factors_are_removed_and_nothing_else(lm, tmp_path):
    path = tmp_path / "f.safetensors"
    first, second = (
        kfac.collect(lm, [text], layers=[1], progress=False)
        for text in ("some text", "another one")
    )
    first.save(path)
    first.decompose(progress=False)
    own = tmp_path / "f.safetensors.bases" / f"{'0a' * 16}.safetensors"
    own.write_text(MINE)
    second.save(path)
    assert [one.name for one in own.parent.iterdir()] == [own.name]
    assert own.read_text() == MINE


def test_a_collection_removes_only_the_state_that_it_wrote(model_folder, tmp_path, monkeypatch):
    (tmp_path / "t.jsonl").write_text('{"text": "some text here"}\n')
    own = tmp_path / "f.safetensors.ekfac-checkpoint"
    own.write_text(MINE)
    command = ["curvature", "collect", "--model", model_folder, "--texts", tmp_path / "t.jsonl"]
    command += ["--layers", "1", "--out", tmp_path / "f.safetensors", "--quiet"]
    assert run(monkeypatch, *command) == 0
    assert own.read_text() == MINE


def test_a_file_called_like_a_journal_of_mining_is_left_alone(lm, tmp_path):
    own = tmp_path / "mined.jsonl.partial"
    own.write_text(MINE)  # without a line break, it might be a line that was cut
    with pytest.raises(DataFileError, match="damaged"):
        lirefs.mine(lm, ["some text here " * 9], 4, 4, journal=own, progress=False)
    assert own.read_text() == MINE


def test_a_task_for_lm_eval_replaces_its_own_files_alone(lm, tmp_path):
    ids = lm.encode(["some text here"])[0]
    items = [("a", ids[:-1], ids[-1:])]
    own = tmp_path / "recite.jsonl"
    own.write_text(MINE)
    with pytest.raises(SettingError, match=r"recite\.jsonl: exists"):
        write_lm_eval_task(tmp_path, "recite", items, lm.tokenizer)
    assert own.read_text() == MINE
    for _ in range(2):
        write_lm_eval_task(tmp_path, "other", items, lm.tokenizer)
