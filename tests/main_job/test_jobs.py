"""The main job from Python: `lirefs.main_job.run`."""

import io
import json

import pytest
from rich.console import Console
from small_jobs import small_jobs, undrawn

import lirefs
from lirefs.errors import DataFileError, KeepError, QuestionsError, SettingError
from lirefs.main_job import jobs, run
from lirefs.main_job.console import console_table


def test_a_name_and_a_loaded_model_give_the_same_report(
    model_folder, questions, tmp_path, monkeypatch
):
    small_jobs(monkeypatch)
    undrawn(monkeypatch)
    settings = {
        "questions": questions,
        "edit_layers": [1, 2],
        "keep": 0.9,
        "limit": 3,
        "quick": True,
    }
    screen = io.StringIO()
    named = run(str(model_folder), out=tmp_path / "named", console=Console(file=screen), **settings)
    assert "report: " in screen.getvalue()
    lm = lirefs.load(model_folder)
    monkeypatch.setattr(lirefs, "load", None)  # nothing is loaded again
    loaded = run(lm, out=tmp_path / "loaded", **settings)
    assert loaded.results == named.results
    assert loaded.variants == [
        "unchanged", "LiReF", "K-FAC", "LiReF + K-FAC", "random direction",
        "random direction at LiReF's damage", "random pairs", "SVD",
        "random pairs at K-FAC's damage", "LiReF at K-FAC's damage",
        "random direction at K-FAC's damage", "prompt",
    ]  # fmt: skip
    assert "Equal damage: at the perplexity of K-FAC" in screen.getvalue()
    assert {len(items) for items in loaded.results["K-FAC"].values()} <= {1, 3}
    recited = loaded.results["K-FAC"]["passages"]
    assert [set(one.scores) for one in recited] == [{"strict"}] * len(recited)  # no decoding
    for name, found in (("named", named), ("loaded", loaded)):
        saved = json.loads((tmp_path / name / "results.json").read_text())
        assert saved["provenance"]["findings"] == found.provenance["findings"]
        assert saved["provenance"]["settings"]["keep"] == 0.9
        assert (tmp_path / name / "report.html").stat().st_size > 10_000
        assert not (tmp_path / name / "unfinished").exists()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_resume_is_said(there, model_folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_on_language_model", lambda job, question_set: None)
    screen, out = io.StringIO(), tmp_path / "report"
    if there:
        (out / "unfinished").mkdir(parents=True)
        (out / "unfinished" / "items-0.jsonl").write_text("")
    settings = {"questions": questions, "edit_layers": [1], "limit": 2, "quick": True, "out": out}
    run(model_folder, resume=True, console=Console(file=screen), **settings)  # a Path is a name
    assert ("nothing to resume in" in screen.getvalue()) is not there
    assert "starting again" not in screen.getvalue()


@pytest.mark.parametrize("width", [140, 80, 60, 40])
def test_no_head_of_a_console_table_is_cut(width):
    heads = ["variant", "memorization", "arithmetic", "closed-book", "open-book", "language"]
    table = console_table(*heads, title="retained share")
    table.add_row("random direction", *["0.95 [0.90, 1.02]"] * 5)
    screen = io.StringIO()
    Console(file=screen, width=width).print(table)
    lines = screen.getvalue().splitlines()
    assert "\u2026" not in screen.getvalue()
    columns = sum(len(line.replace(" ", "")) for line in lines[1 : lines.index(rule(lines))])
    assert columns >= sum(map(len, heads))
    assert max(map(len, lines)) <= width


def rule(lines):
    """The line under the heads of a table."""
    return next(line for line in lines if "\u2500\u2500" in line)


def test_of_several_processes_only_the_first_writes(model_folder, questions, tmp_path, monkeypatch):
    small_jobs(monkeypatch)
    out = tmp_path / "report"
    monkeypatch.setattr(jobs, "first_process", lambda: False)
    console = Console(quiet=True)
    settings = {"questions": questions, "edit_layers": [1], "limit": 2, "console": console}
    found = run(str(model_folder), out=out, **settings)
    assert len(found.variants) == 12
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": float("nan")}, KeepError, "keep is nan, must be in"),
        ({"keep": 0}, KeepError, "keep is 0"),
        ({"strength": float("inf")}, SettingError, "strength is inf, must be finite"),
        ({"limit": 0}, SettingError, "limit is 0"),
        ({"suite": "skils"}, SettingError, "suite is 'skils', must be one of memorization, skills"),
        ({"out": "file"}, SettingError, "out is file, which exists and is not a folder"),
        ({"data": "file", "suite": "skills"}, SettingError, "data is file, which is not a folder"),
        ({"data": "."}, SettingError, "data is read by a suite"),
        ({"model": "organism", "suite": "skills"}, SettingError, "own language only"),
        ({"model": "organism", "lm_eval": ["arc_easy"]}, SettingError, "own language only"),
        ({"questions": "absent"}, QuestionsError, "absent"),
        ({"memorized": "absent"}, DataFileError, "absent"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(
    settings, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(lirefs, "load", None)
    with pytest.raises(error, match=message):
        run(**settings)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_organism_in_memory_is_known_by_its_language(lm, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(jobs, "_on_organism", lambda job, language: taken.append(language.seed))
    monkeypatch.setattr(lm.model.config, "language_seed", 3, raising=False)
    run(lm, out=tmp_path)
    assert taken == [3]
    with pytest.raises(SettingError, match="own language only"):
        run(lm, memorized="mine.jsonl", out=tmp_path)
